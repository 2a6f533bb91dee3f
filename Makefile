# make demo    quantize the bundled model and judge it       make check   ruff and mypy
# make test    all tests                                     make bench   speed, memory and quality beside rivals
#
# PYTHON picks the interpreter (3.10 to 3.13). TORCH_ARGS goes to the pip call that installs torch; on a machine without a
# GPU, pass the index of PyTorch's CPU builds there to avoid several gigabytes of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/compress awq --bits 4 --force
	$(BIN)/compress evaluate

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python tests/bench/depth.py

clean:
	rm -rf $(VENV) artifacts build dist
