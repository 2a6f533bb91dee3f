"""The README of an export says one command, quoted, that is typed in its folder."""

import shlex

from hypothesis import given
from hypothesis import strategies as st

from exporters import readme

USAGE = readme.Usage(
    what="A folder.",
    verb="run it",
    command=("python3", f"{readme.FOLDER}/run.py", "Once upon a time"),
    needs=("a", "b"),
)


def test_the_command_is_quoted_for_its_folder() -> None:
    assert USAGE.line() == "python3 ./run.py 'Once upon a time'"
    folder = "it's my model"
    assert shlex.split(USAGE.line(folder)) == ["python3", f"{folder}/run.py", "Once upon a time"]


def test_what_it_says() -> None:
    text = readme.text(
        USAGE,
        name="m",
        format="onnx",
        target="cpu",
        context=64,
        batch=1,
        parts={"x": 1_500_000, "y": 500_000},
        fp16=4_000_000,
    )
    assert text.startswith("# m, onnx for cpu\n") and "one sequence of at most 64 tokens" in text
    assert f"\n    {USAGE.line()}\n" in text and "- a\n- b\n" in text
    assert "| x | 1.50 |" in text and "| all | 2.00 |" in text and "FP16 | 4.00 |" in text


@given(st.text(max_size=40))
def test_no_name_breaks_the_title(name: str) -> None:
    made = readme.plain(name)
    assert made and not set(made) & set("#`<>[]()|*\n\r\x1b") and len(made.splitlines()) == 1
