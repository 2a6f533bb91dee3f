"""Gradients of learning through the whole model, at the widths of a real block, against those of whole logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import numerics
from compress.linear import linears
from compress.losses.heads import proven_head
from compress.model import StreamedModel
from compress.quantize import end_to_end
from compress.quantize.end_to_end import EndToEndOptions, Student, lessons
from compress.quantize.end_to_end_stage import is_norm
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

SIZES = {
    "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 1152, "num_hidden_layers": 1, "pad_token_id": 0,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
SCHEME = Scheme(group_size=128)


def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
    w_OGg = numerics.to_groups(w_OI, SCHEME)
    scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), SCHEME)
    return QuantizedWeight.from_parts(numerics.quantize(w_OGg, scale, zero, SCHEME), scale, zero, SCHEME)


@pytest.mark.parametrize(("family", "again"), [("Llama", False), ("Gemma2", True)])
def test_gradients_are_those_of_whole_logits(family: str, again: bool, save_model: Any, tmp_path: Path) -> None:
    """Every factor's, beside autograd in float64 on weights written as the formula and logits that are all there.

    again: blocks compute their inner values again in the backward pass. Gemma 2 multiplies by 1 + w and caps logits.
    """
    folder = save_model(tmp_path / "model", family, **SIZES)
    opened = StreamedModel.open(folder)
    opened.load_whole()
    if family == "Gemma2":  # else the embedding, which it multiplies by 32, drowns the one block
        opened.embedding.weight.data.mul_(0.02)
    ids = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    original, plain = (copy.deepcopy(opened.model).double() for _ in range(2))
    head = proven_head(opened.model, opened.base, folder)
    taught = lessons(opened.base, head, ids, 2, torch.float32)
    prefix = f"{opened.blocks_name}.0."
    layers = {prefix + n: rounded(m.weight.data) for n, m in linears(opened.blocks[0]).items()}  # type: ignore[union-attr, arg-type]
    norms = {n: m.weight.data.half() for n, m in opened.model.named_modules() if is_norm(m)}  # type: ignore[union-attr, operator]
    student = Student(base=opened.base, head=head, blocks=opened.blocks, model=opened.model, layers=layers, norms=norms)

    logs: dict[str, torch.Tensor] = {n: torch.zeros(w.scale_OG.shape, dtype=torch.float64) for n, w in layers.items()}
    logs |= {n: torch.zeros(w.shape, dtype=torch.float64) for n, w in norms.items()}
    one = 1.0 if family == "Gemma2" else 0.0
    weights = {}
    for name, log in logs.items():
        log.requires_grad_()
        if name in layers:
            q = layers[name]
            codes = numerics.to_groups(q.codes_OI, SCHEME).double() - q.zero_point_OG.double()[..., None]
            weights[f"{name}.weight"] = (codes * (q.scale_OG.double() * log.exp())[..., None]).flatten(1)
        else:
            weights[f"{name}.weight"] = (norms[name].double() + one) * log.exp() - one
    found = torch.func.functional_call(plain, weights, (ids,), {"use_cache": False}).logits.log_softmax(-1)
    with torch.no_grad():
        wanted = original(ids, use_cache=False).logits.log_softmax(-1)
    slow = (wanted.exp() * (wanted - found)).sum(-1).mean()
    slow.backward()

    options = EndToEndOptions(updates=1)
    learning = end_to_end._learn(student, options)
    with end_to_end._checkpointed(opened.blocks if again else ()):
        passed_on = learning.place()
        ours = end_to_end._divergence(student, taught, options, torch.arange(4))
        ours.backward()
        passed_on()
    expected = float(slow.detach())
    assert expected > 1e-6 and float(ours.detach()) == pytest.approx(expected, rel=1e-2)
    gradients = {
        name: part.reshape(logs[name].shape)
        for stack in learning.all
        for name, part in zip(stack.names, stack.log.grad.split(stack.rows), strict=True)  # type: ignore[union-attr, no-untyped-call]
    }
    assert gradients.keys() == logs.keys()
    for name, log in logs.items():
        assert log.grad is not None
        assert float((gradients[name] - log.grad).norm()) <= 2e-3 * float(log.grad.norm()), name
