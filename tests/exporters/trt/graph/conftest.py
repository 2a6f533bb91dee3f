"""An AutoAWQ folder in a second: rounded to nearest without a search, for tests of how codes are carried."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import numerics
from compress.checkpoint import Checkpoint
from compress.formats import awq_gemm
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

RoundToNearest = Callable[..., Path]


@pytest.fixture(scope="session")
def round_to_nearest() -> RoundToNearest:
    """Quantizes every `*_proj` of a plain folder, and what is named in `also`, to symmetric INT4; returns `out`."""

    def quantize(model: Path, out: Path, group_size: int, also: tuple[str, ...] = ()) -> Path:
        from safetensors.torch import save_file

        shutil.copytree(model, out)
        scheme = Scheme(group_size=group_size, symmetric=True)
        checkpoint = Checkpoint.open(model)
        tensors = {}
        for name in checkpoint.names():
            value = checkpoint.tensor(name)
            if not name.endswith("_proj.weight") and name not in also:
                tensors[name] = value.half()
                continue
            grouped = numerics.to_groups(value.float(), scheme)
            scale, zero = numerics.scale_and_zero(*numerics.range_of(grouped), scheme)
            codes = numerics.quantize(grouped, scale, zero, scheme)
            parts = awq_gemm.tensors(QuantizedWeight.from_parts(codes, scale, zero, scheme))
            tensors.update({f"{name.removesuffix('.weight')}.{key}": part for key, part in parts.items()})
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = awq_gemm.config(LayerPlan({"*": LayerScheme(weight=scheme)}))
        (out / "config.json").write_text(json.dumps(config))
        return out

    return quantize
