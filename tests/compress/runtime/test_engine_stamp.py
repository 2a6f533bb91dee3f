"""What an engine is refused for, and how a prompt is cut, before anything is loaded; its stamp is a real export's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ArtifactError, ConfigError
from compress.runtime import engine_stamp
from compress.runtime.engine_stamp import Stamp
from compress.runtime.open import open_decoder
from compress.tell import Heard

IDS = {
    "prefill": {"min": [1, 1], "opt": [2, 32], "max": [2, 64]},
    "decode": {"min": [2, 1], "opt": [2, 1], "max": [2, 1]},
    "any": {"min": [1, 1], "opt": [4, 1], "max": [4, 16]},
}


def stamp(*profiles: str, **changes: Any) -> Stamp:
    fields: dict[str, Any] = {
        "folder": Path("out"), "library": "tensorrt_rtx", "version": "1.7.1.116", "sm": "8.0", "capacity": 256,
        "profiles": profiles, "shapes": {name: {"input_ids": IDS[name]} for name in profiles}, "caches": {},
        "caches_in_place": True, "engine_bytes": 3, "weight_bytes": 2,
    }  # fmt: skip
    return Stamp(**{**fields, **changes})


@given(st.integers(1, 300))
def test_pieces_cover_a_prompt_once(length: int) -> None:
    found = stamp("prefill", "decode")
    pieces = found.pieces(length)
    assert [t for start, stop in pieces for t in range(start, stop)] == list(range(length))
    assert all(1 <= stop - start <= 64 for start, stop in pieces)


def test_roles_have_their_profiles() -> None:
    two, one = stamp("decode", "prefill"), stamp("any")
    assert (two.profile("prefill"), two.profile("decode"), two.longest) == (1, 0, 64)
    assert (one.profile("prefill"), one.profile("decode"), one.longest) == (0, 0, 16)


@pytest.mark.parametrize(
    ("found", "capacity", "batch", "said"),
    [
        (stamp("prefill", "decode"), 257, 2, "257 tokens are asked for and its caches hold 256; .* larger --context"),
        (stamp("prefill", "decode"), 256, 1, "a batch of 1 .* its profiles take 2; .* --batch 1"),
        (stamp("any"), 256, 5, "a batch of 5 .* its profiles take 1 to 4"),
    ],
)
def test_requests_beyond_the_profiles(found: Stamp, capacity: int, batch: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        found.refuse_request(capacity, batch)


@pytest.mark.parametrize(
    ("sm", "version", "said"),
    [
        (None, None, "for a GPU of SM 8.0, and PyTorch sees none here"),
        ("9.0", "1.7.1.116", "for SM 8.0, and the GPU here is SM 9.0; export again for this one"),
        ("8.0", None, r"tensorrt_rtx 1.7.1.116, which is not installed; pip install tensorrt-rtx==1.7.1.116"),
        ("8.0", "1.8.0.1", "which is 1.8.0.1 here"),
    ],
)
def test_other_cards_and_versions(sm: str | None, version: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stamp("prefill", "decode").refuse_elsewhere(sm, version)
    stamp("any").refuse_elsewhere("8.0", "1.7.1.116")


def written(folder: Path, **changes: Any) -> Path:
    """A folder with an engine of three bytes and its stamp, as build_engine.py names the fields."""
    (folder / engine_stamp.ENGINE).write_bytes(b"abc")
    fields: dict[str, Any] = {
        "stamp": 1, "library": "tensorrt_rtx", "version": "1", "sm": "8.0", "capacity": 256, "profiles": ["any"],
        "shapes": {"any": {"input_ids": IDS["any"]}}, "caches": {}, "caches_in_place": True, "engine_bytes": 3,
        "onnx_data_bytes": 2,
    }  # fmt: skip
    text = json.dumps({k: v for k, v in {**fields, **changes}.items() if v is not None})
    (folder / engine_stamp.STAMP).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine_bytes": 4}, "model.engine has 3 bytes, and its stamp says 4"),
        ({"stamp": 2}, "stamp 2 is not 1"),
        ({"sm": None}, "not a stamp that build_engine.py wrote .*'sm'"),
        ({"shapes": {}}, "not a stamp that build_engine.py wrote"),
        ({"library": "antigravity"}, "library is 'antigravity'"),
    ],
)
def test_stamps_that_do_not_hold(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said):
        engine_stamp.read(written(tmp_path, **changes))


@given(
    key=st.sampled_from(["library", "version", "sm", "capacity", "profiles", "shapes", "caches", "engine_bytes"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["any", "min", "x"]), inner),
        max_leaves=6,
    ),
)
def test_whatever_a_field_holds_it_is_read_or_refused(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = written(tmp_path_factory.mktemp("stamp"), **{key: value})
    try:
        found = engine_stamp.read(folder)
    except (ArtifactError, ConfigError):
        return
    assert found.package.startswith("tensorrt") and found.pieces(5) and found.batches("decode")


def test_an_engine_without_a_stamp(tmp_path: Path) -> None:
    (tmp_path / engine_stamp.ENGINE).write_bytes(b"abc")
    with pytest.raises(ArtifactError, match="has no model.engine.json beside it"):
        open_decoder(tmp_path, capacity=8)


def test_beside_its_graph_the_graph_is_run_where_there_is_no_gpu(reference_model: Path, tmp_path: Path) -> None:
    """What build_engine.py leaves on a device, opened elsewhere."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA DEVICE is here")
    pytest.importorskip("onnxruntime")
    from exporters.trt.graph.write import write_graph

    write_graph(reference_model, written(tmp_path), opset=24, capacity=64)
    heard = Heard()
    assert open_decoder(tmp_path, capacity=8, tell=heard).runtime == "onnxruntime"
    assert "the graph beside it runs on the CPU instead" in heard.notes[0]


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA DEVICE is here")
    with pytest.raises(ConfigError, match="for a GPU of SM 8.0, and PyTorch sees none here"):
        open_decoder(written(tmp_path), capacity=8)
