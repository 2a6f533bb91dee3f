# make demo    quantize the bundled model and judge it       make check   ruff and mypy
# make test    all tests                                     make bench   peak memory against depth
# make elsewhere   AutoAWQ and gptqmodel read what we write (an environment of its own)
# make edge    TensorRT Edge-LLM's exporter on our artifacts (another one, 2 GB)
#
# PYTHON picks the interpreter (3.10 to 3.13). TORCH_ARGS goes to the pip call that installs torch; on a machine without a
# GPU, pass the index of PyTorch's CPU builds there to avoid several gigabytes of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_ARGS ?=
TEST_ARGS ?=
# Test processes, of one thread each.
WORKERS ?= 2

.PHONY: demo test elsewhere edge check bench clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[dev]'
	touch $@

# INT4 of the small bundled model does not keep 98 %, and the gate says so (exit code 3, or 4): no failure of the demo.
DEMO := artifacts/reference-lm-awq-w4g128
demo: $(VENV)/installed
	$(BIN)/compress awq --bits 4 --force -o $(DEMO)
	$(BIN)/compress evaluate $(DEMO) --gate 0.98 --report artifacts/demo-report; case $$? in 0|3|4) ;; *) exit 1;; esac
	@for model in calibration_data/reference_lm $(DEMO); do echo; echo "$$model writes:"; \
	$(BIN)/compress generate $$model "Once upon a time" --max-new-tokens 40 --quiet || exit 1; done
	@echo; echo "next: source $(BIN)/activate, open artifacts/demo-report/index.html, compress status, and for a model of"
	@echo "your own: compress init a100-awq --model MODEL --calib notes.txt --data held_out.txt"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)

# AutoAWQ and gptqmodel pin torch to CUDA builds, so they are installed without their dependencies and beside ours.
ELSEWHERE := $(VENV)-elsewhere
$(ELSEWHERE)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) torch==2.13.0
	$(ELSEWHERE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[dev]' \
		threadpoolctl packaging protobuf pillow requests jinja2 ninja datasets dill torchao==0.18.0 zstandard
	$(ELSEWHERE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps autoawq==0.2.9 device-smi \
		pypcre tokenicer logbar defuser gptqmodel==7.7.0
	touch $@

elsewhere: $(ELSEWHERE)/installed
	$(ELSEWHERE)/bin/python -m pytest tests/test_loads_elsewhere.py

edge: $(VENV)/installed
	COMPRESS_EDGE_TEST=1 $(BIN)/python -m pytest tests/exporters/test_edge.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python tests/bench/depth.py

clean:
	rm -rf $(VENV) artifacts build dist
