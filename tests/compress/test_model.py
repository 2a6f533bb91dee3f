"""A streamed model against transformers' own: block by block, and with inputs quantized as its folder says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import numerics
from compress.activations import fake_quantize
from compress.checkpoint import Checkpoint
from compress.formats import compressed_tensors, stored
from compress.model import StreamedModel
from compress.plan import DENSE, ActivationScheme, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme
from compress.shards import save_atomically

IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
W8 = Scheme(num_bits=8, group_size=-1, symmetric=True)


@torch.no_grad()
def streamed_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = StreamedModel.open(folder, dtype=dtype)
    hidden = model.embed(IDS)
    for index in range(model.num_blocks):
        model.load_block(index)
        hidden = model.run_block(index, hidden)
        model.release_block(index)
    return model.head(hidden)


def quantized(model: Path, out: Path, scheme: LayerScheme, scale: float = 0.25) -> Path:
    """A compressed-tensors folder of `model`, rounded to nearest; static input scales are all `scale`."""
    shutil.copytree(model, out)
    checkpoint = Checkpoint.open(model)
    layers: dict[str, LayerScheme] = {"lm_head": DENSE}
    tensors = {}
    for name in checkpoint.names():
        value = checkpoint.tensor(name)
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        groups = numerics.to_groups(value.float(), W8)
        s_OG, zero_OG = numerics.scale_and_zero(*numerics.range_of(groups), W8)
        codes = numerics.quantize(groups, s_OG, zero_OG, W8)
        q = QuantizedWeight.from_parts(codes, s_OG, zero_OG, W8, torch.float32)
        static = None
        if scheme.input is not None and not scheme.input.dynamic:
            zero = 128 if scheme.input.symmetric else 120
            static = StaticInput(scale=torch.tensor([scale]), zero_point=torch.tensor([zero], dtype=torch.uint8))
        layer = name.removesuffix(".weight")
        layers[layer] = scheme
        tensors |= {f"{layer}.{k}": v for k, v in compressed_tensors.tensors(q, scheme, static).items()}
    save_atomically(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.config(LayerPlan(layers))
    (out / "config.json").write_text(json.dumps(config))
    return out


class Slow(nn.Module):
    """A linear whose inputs are quantized and read back, one float64 product."""

    def __init__(self, w_OI: Tensor, scheme: ActivationScheme, static: StaticInput | None) -> None:
        super().__init__()
        self.w_OI, self.scheme, self.static = w_OI, scheme, static

    def forward(self, x: Tensor) -> Tensor:
        return (fake_quantize(x, self.scheme, self.static).double() @ self.w_OI.double().t()).to(x.dtype)


@torch.no_grad()
def slow_logits(model: Path, folder: Path) -> Tensor:
    """transformers' model with every quantized linear replaced by a slow one."""
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    layers = stored(Checkpoint.open(folder))
    for name in layers.layers:
        scheme = layers.scheme(name).input
        assert scheme is not None
        above, _, leaf = name.rpartition(".")
        setattr(source.get_submodule(above), leaf, Slow(layers.dense(name), scheme, layers.static(name)))
    out: Tensor = source(IDS).logits
    return out


SCHEMES = {
    "token": ActivationScheme(),
    "token-asym": ActivationScheme(symmetric=False),
    "tensor": ActivationScheme(dynamic=False),
    "tensor-asym": ActivationScheme(dynamic=False, symmetric=False),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_inputs_are_quantized_as_the_folder_says(
    scheme: ActivationScheme, build_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = build_model()
    folder = quantized(model, tmp_path / "q", LayerScheme(weight=W8, input=scheme))
    ours, wanted, weights_only = (
        streamed_logits(folder),
        slow_logits(model, folder),
        streamed_logits(quantized(model, tmp_path / "w", LayerScheme(weight=W8))),
    )
    size = float(wanted.abs().max())
    # float32 noise may tip a value over to the next code, so a few in a million differ by one code's worth
    assert float((ours - wanted).abs().max()) < 2e-3 * size
    assert float((ours - wanted).abs().mean()) < 2e-5 * size
    assert float((ours - weights_only).abs().max()) > 1e-2 * size, "quantizing the inputs changed nothing"


@torch.no_grad()
def test_static_inputs_are_those_that_transformers_computes(build_model: Callable[..., Path], tmp_path: Path) -> None:
    """Through compressed-tensors: an independent reader of the file and of what it means."""
    model = build_model()
    scheme = LayerScheme(weight=W8, input=ActivationScheme(dynamic=False, symmetric=False))
    folder = quantized(model, tmp_path / "q", scheme)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    ours = streamed_logits(folder)
    assert float((ours - theirs).abs().mean()) < 2e-5 * float(theirs.abs().max())


@torch.no_grad()
def test_gradients_pass_the_rounding_of_inputs(build_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized(build_model(), tmp_path / "q", LayerScheme(weight=W8, input=ActivationScheme()))
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    block = model.load_block(0)
    with torch.enable_grad():
        weights = {"mlp.down_proj.weight": block.get_submodule("mlp.down_proj").weight.clone().requires_grad_()}  # type: ignore[union-attr,operator]
        out = model.run_with(0, hidden, weights)
        out.square().mean().backward()
    torch.testing.assert_close(out, model.run_block(0, hidden), rtol=1e-4, atol=1e-4)
    gradient = weights["mlp.down_proj.weight"].grad
    assert gradient is not None and float(gradient.abs().max()) > 0


def test_release_leaves_nothing_installed(build_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized(build_model(), tmp_path / "q", LayerScheme(weight=W8, input=ActivationScheme()))
    model = StreamedModel.open(folder)
    block = model.load_block(0)
    assert "forward" in block.get_submodule("mlp.down_proj").__dict__
    model.release_block(0)
    assert not any("forward" in module.__dict__ for module in block.modules())
    assert all(p.is_meta for p in block.parameters())
