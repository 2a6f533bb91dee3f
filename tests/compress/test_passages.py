"""Finding again what was calibrated on, however it was cut."""

import json
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import calibration_data
from compress import passages as module
from compress.passages import LENGTH, Passages, passages
from compress.texts import documents


def text(seed: int, length: int) -> str:
    """Characters without white space, so that its runs are the passages."""
    dice = random.Random(seed)
    return "".join(dice.choice("abcdefgh語é.") for _ in range(length))


def runs(value: str) -> set[str]:
    return {value[i : i + LENGTH] for i in range(len(value) - LENGTH + 1)}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3000), st.integers(100, 4000), st.integers(0, 2))
def test_a_shared_piece_is_found_wherever_it_begins(start: int, length: int, other: int) -> None:
    """Against the definition: the share of the second text's runs that stand in the first."""
    calibrated = text(0, 8000)
    judged = text(10 + other, 500) + calibrated[start : start + length] + text(20, 4000)
    found, told = passages(calibrated).found_in(judged)
    share = len(runs(calibrated) & runs(judged)) / len(runs(judged))
    assert abs(found / told - share) < 5 * (0.25 / told) ** 0.5


def test_what_fits_is_kept_whole_and_then_counts_exactly() -> None:
    calibrated, rest = text(0, 1000), text(1, 1000)
    kept = passages(calibrated)
    assert len(kept.low) == len(runs(calibrated))
    judged = rest + calibrated[100:200]
    assert kept.found_in(judged) == (len(runs(calibrated) & runs(judged)), len(runs(judged)))
    assert kept.found_in(rest) == (0, len(runs(rest)))
    assert kept.found_in(calibrated[: LENGTH - 1]) == (0, 0)


def test_white_space_and_case_do_not_matter() -> None:
    calibrated = text(0, 4096)
    judged = "\n\n".join(calibrated[i : i + 7].upper() for i in range(0, 4096, 7))
    found, told = passages(calibrated).found_in(judged)
    assert found == told


def test_parts_leave_no_trace() -> None:
    calibrated = text(0, 9000)
    whole = passages(calibrated)
    held, module._AT_ONCE = module._AT_ONCE, 100
    try:
        parts = passages(calibrated)
        assert (whole.limit, whole.low.tolist()) == (parts.limit, parts.low.tolist())
        assert whole.found_in(calibrated[3:]) == parts.found_in(calibrated[3:])
    finally:
        module._AT_ONCE = held


def test_a_hash_is_the_polynomial_of_a_passage_mixed() -> None:
    """Sketches lie in manifests: what a passage is hashed to may never change."""
    value = text(3, LENGTH + 2)
    expected = []
    for run in (value[i : i + LENGTH] for i in range(3)):
        h = 0
        for character in run:
            h = (h * 0x9E3779B97F4A7C15 + ord(character) + 1) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            h = (h ^ (h >> shift)) * factor % 2**64
        expected.append(h ^ (h >> 31))
    assert sorted(h & 0xFFFFFFFF for h in expected) == passages(value).low.tolist()


def test_a_sketch_survives_json_and_others_are_not_taken_for_one() -> None:
    kept = passages(text(0, 50_000))
    assert len(kept.low) == module.KEPT and len(json.dumps(kept.to_json())) < 12_000
    again = Passages.from_json(json.loads(json.dumps(kept.to_json())))
    assert again is not None and again.limit == kept.limit and (again.low == kept.low).all()
    for other in (None, {}, {"tokens": 13}, {"characters": LENGTH, "limit": "x", "hashes": ""}, {"characters": LENGTH}):
        assert Passages.from_json(other) is None


def test_texts_by_different_hands_share_nothing(shared_data: Path) -> None:
    """The texts of our own measurements must be accepted as each other's evaluation text."""
    names = ["wikitext-2/wiki.valid.tokens.txt", "wikitext-2/wiki.test.raw", "novels-heldout.txt"]
    bundled = [calibration_data.default_calibration(), calibration_data.default_evaluation()]
    texts = {p.name: "\n".join(documents(str(p)))[:400_000] for p in (*(shared_data / n for n in names), *bundled)}
    for calibrated in texts:
        kept = passages(texts[calibrated])
        for judged in texts:
            found, told = kept.found_in(texts[judged])
            assert found == told if judged == calibrated else found <= 0.002 * told, (calibrated, judged, found, told)
