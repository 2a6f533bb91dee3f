"""LoRA students: thin matrices beside frozen ones, merged into an ordinary model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.distill import lora, models
from compress.distill.data import Mix
from compress.distill.request import DistillRequest
from compress.distill.run import distill
from compress.errors import ConfigError
from compress.workspace import resolve

pytest.importorskip("peft", reason='LoRA needs peft: pip install "compress-toolkit[distill]"')


def test_merged_weights_compute_what_the_thin_ones_do(pair: tuple[Path, Path]) -> None:
    loaded = models.load(pair[1], dtype=torch.float32)
    lora.add(loaded, 4, seed=0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    plain = models.load(pair[1], dtype=torch.float32)
    ids = torch.arange(12)[None]
    before = plain.model(ids).logits
    missing = plain.model.load_state_dict(lora.merged(loaded.model.state_dict()))
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.testing.assert_close(plain.model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, plain.model(ids).logits, atol=1e-2)


def test_an_ordinary_folder_with_frozen_parts_as_they_were(
    tmp_path: Path, pair: tuple[Path, Path], prose: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file

    request = DistillRequest(
        teacher=resolve(str(pair[0])), student=resolve(str(pair[1])), data=Mix.of([str(prose(60))], None), rate=1e-2,
        out=tmp_path / "out", tokens=6 * 8 * 24, seq_len=24, batch=8, lora=2,
    )  # fmt: skip
    record = distill(request).record
    distill(replace(request, out=tmp_path / "again"))
    before, after = load_file(pair[1] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in after.items())
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "proj" not in name}
    assert record["options"]["lora"] == 2
    with pytest.raises(ConfigError, match=r"--lora 99 is outside 1\.\.16, the smallest side of a matrix"):
        lora.add(models.load(pair[1], dtype=torch.float32), 99, seed=0)
