"""What was written, compared with what was meant: every kind of difference is found and named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.files import file_sha256, json_bytes, read_json
from compress.formats import Format, awq_gemm, compressed_tensors
from compress.formats.format import parts_of
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.shards import save_atomically, tensor_sha256
from compress.verify import ReadingBack, read_back, stamp_of, verify_written

LAYER = "model.layers.0.q_proj"
NORM = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
CASES = {
    "awq": (awq_gemm, LayerScheme(weight=Scheme(num_bits=4, group_size=16))),
    "packed": (compressed_tensors, LayerScheme(weight=Scheme(num_bits=3, group_size=16))),
}


def weight(scheme: Scheme) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return QuantizedWeight(
        codes_OI=torch.randint(0, scheme.max_code + 1, (8, 32), dtype=torch.uint8, generator=generator),
        scale_OG=torch.rand(8, 2, generator=generator).half() + 0.5,
        zero_point_OG=torch.randint(0, scheme.max_code + 1, (8, 2), dtype=torch.uint8, generator=generator),
        scheme=scheme,
    )


def written(folder: Path, format: Format, scheme: LayerScheme, **changed: Tensor) -> dict[str, str]:
    """A folder of one quantized layer and a norm; returns what was meant. changed: other tensors than were meant."""
    assert scheme.weight is not None
    q = weight(scheme.weight)
    meant = {f"{LAYER}.{key}": tensor_sha256(value) for key, value in parts_of(q).items()}
    meant["norm.weight"] = tensor_sha256(NORM)
    tensors = {f"{LAYER}.{leaf}": value for leaf, value in format.tensors(q, scheme).items()}
    folder.mkdir()
    save_atomically(folder / "model.safetensors", {**tensors, "norm.weight": NORM, **changed})
    config = {"quantization_config": format.config(LayerPlan({LAYER: scheme}))}
    (folder / "config.json").write_bytes(json_bytes(config))
    return meant


@pytest.mark.parametrize("case", CASES)
def test_what_was_meant_is_counted(case: str, tmp_path: Path) -> None:
    assert verify_written(tmp_path / "f", written(tmp_path / "f", *CASES[case])) == 4


@pytest.mark.parametrize("case", CASES)
def test_one_changed_bit_anywhere_is_found(case: str, tmp_path: Path) -> None:
    format, scheme = CASES[case]
    assert scheme.weight is not None
    leaves = format.tensors(weight(scheme.weight), scheme)
    for number, (leaf, value) in enumerate(leaves.items()):
        if leaf == "weight_shape":
            continue
        wrong = value.clone()
        wrong.view(torch.uint8).view(-1)[-1] ^= 1
        meant = written(tmp_path / str(number), format, scheme, **{f"{LAYER}.{leaf}": wrong})
        with pytest.raises(ArtifactError, match="differs from what was computed"):
            verify_written(tmp_path / str(number), meant)


def test_plain_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    meant = written(tmp_path / "a", *CASES["awq"], **{"norm.weight": NORM + 1})
    with pytest.raises(ArtifactError, match="norm.weight differs from what was computed"):
        verify_written(tmp_path / "a", meant)
    meant = written(tmp_path / "b", *CASES["awq"], extra=torch.ones(1))
    with pytest.raises(ArtifactError, match="extra was not meant to be there"):
        verify_written(tmp_path / "b", meant)
    meant = written(tmp_path / "c", *CASES["awq"])
    with pytest.raises(ArtifactError, match="other.weight was not written"):
        verify_written(tmp_path / "c", {**meant, "other.weight": meant["norm.weight"]})


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_back_before_is_not_read_again_but_compared(case: str, tmp_path: Path) -> None:
    """What changes in a known file goes unseen, so it was not read; what it held is compared with what was meant."""
    meant = written(tmp_path / "f", *CASES[case])
    path, config = tmp_path / "f" / "model.safetensors", read_json(tmp_path / "f" / "config.json")
    with ReadingBack(config) as reading:
        reading.take(path)
        (known,) = reading.found()
    assert known.sha256 == file_sha256(path) and known.stamp == stamp_of(path)
    assert verify_written(tmp_path / "f", meant, {path.name: known}) == 4
    with pytest.raises(ArtifactError, match="differs from what was computed"):
        verify_written(tmp_path / "f", {**meant, f"{LAYER}.codes": "0"}, {path.name: known})
    with open(path, "rb+") as f:
        f.seek(-1, 2)
        f.write(b"\xff")
    assert stamp_of(path) != known.stamp
    assert verify_written(tmp_path / "f", meant, {path.name: known}) == 4
    with pytest.raises(ArtifactError, match="differs from what was computed"):
        verify_written(tmp_path / "f", meant, {"other.safetensors": known})


def test_a_layer_is_read_again_where_the_folder_says_another_scheme_of_it(tmp_path: Path) -> None:
    format, scheme = CASES["awq"]
    meant = written(tmp_path / "f", format, scheme)
    other = {
        "quantization_config": format.config(LayerPlan({LAYER: LayerScheme(weight=Scheme(num_bits=4, group_size=32))}))
    }
    known = read_back(tmp_path / "f" / "model.safetensors", other)
    damaged = replace(known, digests={**known.digests, LAYER: {"codes": "0"}})
    assert verify_written(tmp_path / "f", meant, {"model.safetensors": damaged}) == 4


def test_what_cannot_be_read_back_is_raised_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"none")
    with ReadingBack({}) as reading:
        reading.take(tmp_path / "a.safetensors")
        with pytest.raises(ArtifactError, match="truncated or corrupt"):
            reading.found()
