"""The manifest: what it lists, that it signs itself, and that nothing in it is taken for granted."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.artifact import (
    MANIFEST,
    Manifest,
    carried_files,
    links_elsewhere,
    names_in,
    read_manifest,
    write_manifest,
)
from compress.errors import ArtifactError, CompressError
from compress.files import file_sha256, json_bytes

RECORD: dict[str, Any] = {
    "stage": "awq",
    "format": "awq-gemm",
    "options": {"scheme": {"num_bits": 4}, "effort": "fast", "ratio": 0.1},
    "parent": {"path": "../model", "sha256": "ab" * 32},
    "calibration": {"source": "self", "sha256": "cd" * 32, "num_samples": 4, "seq_len": 64},
    "layers": [{"layer": "a.b", "error": 1e-3}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "deep" / "part").write_bytes(bytes(range(256)))
    write_manifest(tmp_path / "a", Manifest(lineage=[RECORD], reports=[]))
    return tmp_path / "a"


def test_every_file_is_listed_with_its_hash_and_two_equal_folders_have_equal_manifests(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.files is not None
    assert names_in(folder) == ["config.json", "deep/part"] == list(manifest.files)
    assert all(file_sha256(folder / name) == digest for name, digest in manifest.files.items())
    assert {**manifest.record, "files": None} == {**RECORD, "files": None}
    first = (folder / MANIFEST).read_bytes()
    write_manifest(folder, Manifest(lineage=[RECORD], reports=[]))
    assert (folder / MANIFEST).read_bytes() == first


def test_known_hashes_are_taken_and_the_rest_is_read(folder: Path) -> None:
    signed = write_manifest(folder, Manifest(lineage=[RECORD], reports=[]), {"config.json": "ef" * 32, "gone": "00"})
    assert signed.files == {"config.json": "ef" * 32, "deep/part": file_sha256(folder / "deep" / "part")}


def test_any_flipped_bit_of_a_manifest_is_noticed(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 3, 5) if position % 7 == 0 else (position % 8,):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError) as error:
                read_manifest(folder)
            assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert read_manifest(folder) is not None


@pytest.mark.parametrize("change", [b" ", b"\n", b"\n\n", b"{}"])
def test_what_is_added_to_a_manifest_is_noticed(folder: Path, change: bytes) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes() + change)
    with pytest.raises(ArtifactError):
        read_manifest(folder)


def test_an_edited_manifest_is_refused_and_an_older_one_is_read(folder: Path) -> None:
    path = folder / MANIFEST
    value = json.loads(path.read_text())
    value["lineage"][0]["options"]["effort"] = "best"
    path.write_bytes(json_bytes(value))
    with pytest.raises(ArtifactError, match="is not as it was written, damaged or edited"):
        read_manifest(folder)
    del value["sha256"], value["lineage"][0]["files"]
    value["reports"] = [{"kind": "evaluation"}]
    path.write_text(json.dumps(value))
    older = read_manifest(folder)
    assert older is not None and older.files is None and older.reports == [{"kind": "evaluation"}]


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", "", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "lineage": [{**RECORD, "files": {name: "00"}}]}))
    with pytest.raises(ArtifactError, match="is no file of this folder; refused"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PLACES: list[tuple[Any, ...]] = [
    (), ("lineage",), ("reports",), ("schema",), ("lineage", 0), *((("lineage", 0, key)) for key in RECORD),
    ("lineage", 0, "files"), ("lineage", 0, "parent", "path"), ("lineage", 0, "parent", "sha256"),
    *(("lineage", 0, "calibration", key) for key in RECORD["calibration"]),
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_anywhere_is_read_or_refused(folder: Path, place: tuple[Any, ...], value: Any) -> None:
    """Of a manifest without a signature, as older versions wrote them and other programs may."""
    whole: Any = {"schema": 1, "lineage": [json.loads(json.dumps({**RECORD, "files": {"config.json": "00"}}))]}
    if place:
        inner = whole
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    else:
        whole = value
    (folder / MANIFEST).write_text(json.dumps(whole))
    try:
        manifest = read_manifest(folder)
    except CompressError as e:
        assert "\n" not in str(e)
        return
    assert manifest is not None
    record = manifest.record
    assert isinstance(record["stage"], str) and isinstance(record["parent"]["path"], str)
    assert isinstance(record.get("options") or {}, dict) and isinstance(manifest.files or {}, dict)


def test_a_link_out_of_the_model_is_not_taken_along_and_is_named(tmp_path: Path) -> None:
    secret = tmp_path / "home" / "id_rsa"
    secret.parent.mkdir()
    secret.write_text("a private key")
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "tokenizer.json").write_text("{}")
    (model / "deep" / "NOTICE").write_text("notice")
    (model / "LICENSE").symlink_to(secret)
    (model / "LICENSE.txt").symlink_to("../home/id_rsa")
    (model / "NOTICE").symlink_to("deep/NOTICE")
    (model / "vocab.txt").symlink_to("/dev/zero")
    (model / "vocab.json").symlink_to("vocab.json")
    assert [p.name for p in carried_files(model)] == ["NOTICE", "tokenizer.json"]
    said = links_elsewhere(model)
    assert len(said) == 3 and str(secret) in said[0] and "was not taken along" in said[0]
    (tmp_path / "link").symlink_to(model)  # the model read through a link
    assert [p.name for p in carried_files(tmp_path / "link")] == ["NOTICE", "tokenizer.json"]


def test_links_of_a_hub_snapshot_lead_to_its_own_blobs(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for name in ("models--a--b", "models--c--d"):
        (hub / name / "blobs").mkdir(parents=True)
        (hub / name / "blobs" / "0123").write_text("{}")
    snapshot = hub / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "LICENSE").symlink_to("../../../models--c--d/blobs/0123")
    assert [p.name for p in carried_files(snapshot)] == ["tokenizer.json"]
    assert len(links_elsewhere(snapshot)) == 1
