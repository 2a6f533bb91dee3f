"""Where a recipe's fields stand, and what is said of one that is wrong."""

import pytest

from compress.errors import ConfigError
from compress.recipe import parse, read_recipe, ready_recipes, with_overrides

TEXT = '''about = """two
lines = 1"""
model = "here"

[prune]
depth = 1 # a comment with [brackets] = 2

[recover]
stage = "distill"
data = [
    "a.txt",   # [not.a.table]
    "b.txt",
]
tokens = 5
[awq]
skip = ["*.a", "[b]"]
'''


def test_every_field_knows_its_line() -> None:
    found = parse(TEXT, name="r", said="r.toml")
    assert found.about == "two\nlines = 1" and found.model is not None and found.model.where == "r.toml line 3"
    assert [(s.name, s.stage, s.where) for s in found.steps] == [
        ("prune", "prune", "r.toml line 5"),
        ("recover", "distill", "r.toml line 8"),
        ("awq", "awq", "r.toml line 15"),
    ]
    where = {(s.name, key): f.where for s in found.steps for key, f in s.fields.items()}
    assert where == {
        ("prune", "depth"): "r.toml line 6",
        ("recover", "data"): "r.toml line 10",
        ("recover", "tokens"): "r.toml line 14",
        ("awq", "skip"): "r.toml line 16",
    }
    assert found.steps[1].fields["data"].value == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[awq\nx = 1", r"r.toml is not TOML: .*line 1"),
        ("", "has no step; add one, such as"),
        ("modell = 'x'\n[awq]", "r.toml line 1: modell is no field of a recipe; did you mean model"),
        ("\n[awk]\nbits = 4", "r.toml line 2: awk is no stage; did you mean awq"),
        ("[mine]\nstage = 'distil'", "r.toml line 2: distil is no stage; did you mean distill"),
        ("[[awq]]\nbits = 4", "awq is no field"),
        ("[awq]\n[awq]", "not TOML"),
        ("model = 3\n[awq]", "r.toml line 1: model is 3 and not a text"),
        ('["a/b"]\nstage = "awq"', "no name for it"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text, name="r", said="r.toml")


def test_settings_stand_over_what_the_recipe_says() -> None:
    found = parse(TEXT, name="r", said="r.toml")
    settings = ["awq.samples = 8", "awq.effort=fast", "recover.tokens=7", "model=org/name", 'awq.skip=["x"]']
    changed = with_overrides(found, settings)
    values = {f"{s.name}.{k}": f.value for s in changed.steps for k, f in s.fields.items()}
    assert values["awq.samples"] == 8 and values["awq.effort"] == "fast" and values["awq.skip"] == ["x"]
    assert values["recover.tokens"] == 7 and values["prune.depth"] == 1
    assert changed.model is not None and changed.model.value == "org/name"
    assert found.steps[2].fields.keys() == {"skip"}, "the recipe itself is as it was"
    for wrong, said in (("awk.bits=4", "did you mean awq"), ("bits", "is not STEP.OPTION=VALUE")):
        with pytest.raises(ConfigError, match=said):
            with_overrides(found, [wrong])


def test_ready_recipes_are_read_by_name() -> None:
    names = set(ready_recipes())
    assert names >= {"a100-awq", "a100-int8", "orin-awq", "orin-nano-edge", "cpu-offline", "lambda"}
    assert all(read_recipe(name).about for name in names)
    with pytest.raises(ConfigError, match="did you mean a100-awq"):
        read_recipe("a100-awk")
