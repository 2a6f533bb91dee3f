"""The chunked losses against their formulas on whole logits, their gradients, and their memory."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.losses import at_once, in_blocks
from compress.losses.arithmetic import GRADIENTS
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head, SparseTeacher
from compress.losses.in_blocks import IGNORED, KINDS, Objective

_SPEC = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
assert _SPEC and _SPEC.loader
plain = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plain)


def case(
    dtype: torch.dtype, tokens: int = 7, vocabulary: int = 13, wider: int = 3, capped: bool = False, seed: int = 0
) -> tuple[Tensor, Head, DenseTeacher, Tensor]:
    """A student and a teacher of other widths, the teacher's vocabulary padded further; some labels ignored."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    head = Head(
        weight_VH=r(vocabulary, 5).requires_grad_(),
        bias_V=r(vocabulary).requires_grad_() if capped else None,
        scale=0.7 if capped else 1.0,
        cap=3.0 if capped else None,
    )
    teacher = DenseTeacher(
        hidden_PH=r(tokens, 8), head=Head(weight_VH=r(vocabulary + wider, 8), cap=5.0 if capped else None)
    )
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    labels[::3] = IGNORED
    return r(tokens, 5).requires_grad_(), head, teacher, labels


def reference(hidden: Tensor, head: Head, teacher: DenseTeacher, labels: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    z = plain.logits(hidden, head.weight_VH, head.bias_V, head.scale, head.cap)
    h = teacher.head
    t = plain.logits(teacher.hidden_PH, h.weight_VH, h.bias_V, h.scale, h.cap)[:, : z.shape[1]]
    entropy = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORED, reduction="none")
    return plain.divergence(z, t, o.kind, o.temperature, o.beta), entropy


def gradients(outputs: tuple[Tensor, Tensor], hidden: Tensor, head: Head) -> list[Tensor]:
    """Of a sum in which every token counts differently."""
    weight = torch.linspace(0.5, 1.5, len(hidden), dtype=outputs[0].dtype)
    inputs = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None]
    return list(torch.autograd.grad((outputs[0] * weight).sum() + (outputs[1] * weight.flip(0)).sum(), inputs))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 17),
    block=st.tuples(st.integers(1, 10), st.integers(1, 20)),
    capped=st.booleans(),
    seed=st.integers(0, 5),
)
def test_equals_the_formula(
    kind: str,
    temperature: float,
    beta: float,
    tokens: int,
    vocabulary: int,
    block: tuple[int, int],
    capped: bool,
    seed: int,
) -> None:
    """In float64, whatever the blocks: the value and every gradient."""
    hidden, head, teacher, labels = case(torch.float64, tokens, vocabulary, capped=capped, seed=seed)
    o = Objective(kind=kind, temperature=temperature, beta=beta)
    wanted = reference(hidden, head, teacher, labels, o)
    found = in_blocks.losses(hidden, head, teacher, labels, o, block=block)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(found, hidden, head), gradients(wanted, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 17),
    budget=st.integers(1, 60),
    capped=st.booleans(),
    counts=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 5),
)
def test_at_once_equals_the_formula(
    kind: str,
    temperature: float,
    tokens: int,
    vocabulary: int,
    budget: int,
    capped: bool,
    counts: tuple[bool, bool],
    seed: int,
) -> None:
    """Weights of the tokens given beforehand: the total, each token's losses, and every gradient, in float64."""
    hidden, head, teacher, labels = case(torch.float64, tokens, vocabulary, capped=capped, seed=seed)
    o = Objective(kind=kind, temperature=temperature, beta=0.3)
    weight = torch.linspace(0.5, 1.5, tokens, dtype=torch.float64)
    of = (weight, weight.flip(0))
    wanted = reference(hidden, head, teacher, labels, o)
    value = sum((x * w).sum() for x, w, c in zip(wanted, of, counts, strict=True) if c)
    found, *each = at_once.total(
        hidden, head, teacher, labels, o,
        Weights(divergence_P=of[0] if counts[0] else None, cross_entropy_P=of[1] if counts[1] else None), budget=budget,
    )  # fmt: skip
    torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)
    for a, b, counted in zip(each, wanted, counts, strict=True):
        torch.testing.assert_close(a, b.detach() * counted, rtol=1e-9, atol=1e-9)
    inputs = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None]
    for a, b in zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * value, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_at_once_in_sixteen_bits() -> None:
    """As `test_autocast_computes_in_sixteen_bits`; sums over parts of the tokens stay float32."""
    hidden, head, teacher, labels = case(torch.float32, 32, 50)
    weight = torch.full((32,), 1 / 32)
    found = []
    for coarse in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            total, *_ = at_once.total(
                hidden,
                head,
                teacher,
                labels,
                Objective(),
                Weights(divergence_P=weight, cross_entropy_P=weight),
                budget=200,
            )
        found.append((total.detach(), *torch.autograd.grad(total, [hidden, head.weight_VH])))
    assert 0 < float((found[0][0] - found[1][0]).abs()) < 0.05
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * a.norm()


def test_at_once_compiles_and_gives_its_gradient_once() -> None:
    hidden, head, teacher, labels = case(torch.float32, 8, 12)
    weight = torch.full((8,), 1 / 8)
    step = torch.compile(at_once.whole_rows, backend="aot_eager", fullgraph=True, dynamic=False)
    z, t = head.logits(hidden.detach()).detach(), teacher.head.logits(teacher.hidden_PH, slice(0, 12))
    arguments = (z, t, labels, weight, weight, "forward-kl", 1.0, 0.5, 1.0, None, torch.float32)
    for a, b in zip(step(*arguments), at_once.whole_rows(*arguments), strict=True):
        torch.testing.assert_close(a, b)
    total, *_ = at_once.total(
        hidden, head, teacher, labels, Objective(), Weights(divergence_P=weight, cross_entropy_P=None)
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for already"):
        total.backward()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fewer_passes_are_the_same_to_the_bit(temperature: float) -> None:
    """The forward divergence and its gradient, beside the formula that blocks of logits use, written out."""
    z, t, count = torch.randn(9, 1003) * 8, torch.randn(9, 1003) * 8, torch.rand(9)
    kept = z.clone(), t.clone()
    value, _, part, grad = at_once.whole_rows(
        z, t, torch.zeros(9, dtype=torch.int64), count, None, "forward-kl", temperature, 0.5, 1.0, None, torch.float32
    )
    student, other = (z / temperature).logsumexp(-1), (t / temperature).logsumexp(-1)
    log_q, log_p = z / temperature - student[:, None], t / temperature - other[:, None]
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.equal(value, expected * temperature**2) and torch.equal(part, (value * count).sum())
    assert torch.equal(grad, GRADIENTS["forward-kl"](z, t, student, other, expected, count, temperature, 0.5))
    assert torch.equal(z, kept[0]) and torch.equal(t, kept[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capped", [False, True])
def test_gradcheck(kind: str, capped: bool) -> None:
    hidden, head, teacher, labels = case(torch.float64, 4, 6, capped=capped)
    bias = head.bias_V if head.bias_V is not None else None

    def run(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        mine = Head(weight_VH=w, bias_V=b, scale=head.scale, cap=head.cap)
        return in_blocks.losses(h, mine, teacher, labels, Objective(kind=kind, temperature=1.3), block=(3, 4))

    assert torch.autograd.gradcheck(run, (hidden, head.weight_VH, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_noise(kind: str) -> None:
    """At a real vocabulary: equal to the plain loss to float32 noise, gradients too."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=g).mul_(3).requires_grad_()
    head = Head(weight_VH=torch.randn(4096, 32, generator=g).mul_(0.7).requires_grad_())
    near = (head.weight_VH.detach() + 0.05 * torch.randn(4096, 32, generator=g), hidden.detach() * 1.02)
    teacher = DenseTeacher(hidden_PH=near[1], head=Head(weight_VH=near[0]))
    labels = torch.randint(0, 4096, (64,), generator=g)
    o = Objective(kind=kind)
    wanted = reference(hidden, head, teacher, labels, o)
    found = in_blocks.losses(hidden, head, teacher, labels, o, block=(50, 1000))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for a, b in zip(gradients(found, hidden, head), gradients(wanted, hidden, head), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_without_teacher_or_labels() -> None:
    hidden, head, teacher, labels = case(torch.float64)
    only_text = in_blocks.losses(hidden, head, None, labels, Objective())
    assert not only_text[0].any()
    torch.testing.assert_close(only_text[1], reference(hidden, head, teacher, labels, Objective())[1])
    only_teacher = in_blocks.losses(hidden, head, teacher, None, Objective(), block=(2, 5))
    assert not only_teacher[1].any()
    torch.testing.assert_close(only_teacher[0], reference(hidden, head, teacher, labels, Objective())[0])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_teacher_that_knows_all(temperature: float) -> None:
    """Every token listed with its probability, some twice at half of it: forward KL exactly, gradient too."""
    hidden, head, teacher, labels = case(torch.float64, wider=0)
    t = teacher.head.logits(teacher.hidden_PH) / temperature
    p = t.softmax(-1)
    ids = torch.arange(13).repeat(7, 1)
    sparse = SparseTeacher(
        ids_PK=torch.cat([ids, ids[:, :4]], 1),
        mass_PK=torch.cat([torch.cat([p[:, :4] / 2, p[:, 4:]], 1), p[:, :4] / 2], 1),
        entropy_P=-(p * t.log_softmax(-1)).sum(-1),
        vocabulary=13,
    )
    o = Objective(temperature=temperature)
    wanted = in_blocks.losses(hidden, head, teacher, labels, o)
    found = in_blocks.losses(hidden, head, sparse, labels, o, block=(3, 5))
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(gradients(found, hidden, head), gradients(wanted, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_sixteen_bits() -> None:
    """Products of bfloat16 inputs summed in float32: close to float32, not equal to it; gradients are float32."""
    hidden, head, teacher, labels = case(torch.float32, 32, 50)
    exact = in_blocks.losses(hidden, head, teacher, labels, Objective())
    with torch.autocast("cpu", torch.bfloat16):
        coarse = in_blocks.losses(hidden, head, teacher, labels, Objective())
    assert coarse[0].dtype == torch.float32
    assert 0 < float((exact[0] - coarse[0]).detach().abs().max()) < 0.1
    for a, b in zip(gradients(exact, hidden, head), gradients(coarse, hidden, head), strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.02 * a.norm()


class Peak(TorchDispatchMode):
    """Bytes of tensors that operations inside the context made and that live at the same time, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), held)
        return out

    def _count(self, storage: torch.UntypedStorage, held: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in held:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(way: str, vocabulary: int, kind: str) -> int:
    """Of the loss and its gradients, less the gradient of the output matrix, which every loss has to return."""
    tokens, width = 64, 16
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=g, requires_grad=True)
    other = torch.randn(vocabulary, width, generator=g)
    theirs = torch.randn(tokens, width, generator=g)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    with Peak() as peak:
        if way == "at once":
            each = torch.ones(tokens)
            counts = Weights(divergence_P=each, cross_entropy_P=each)
            teacher = DenseTeacher(hidden_PH=theirs, head=Head(weight_VH=other))
            parts = at_once.total(
                hidden, Head(weight_VH=weight), teacher, labels, Objective(kind=kind), counts, budget=1 << 18
            )[:1]
        elif way == "blocks":
            teacher = DenseTeacher(hidden_PH=theirs, head=Head(weight_VH=other))
            parts = in_blocks.losses(hidden, Head(weight_VH=weight), teacher, labels, Objective(kind=kind))
        else:
            z, t = hidden @ weight.t(), theirs @ other.t()
            parts = (
                plain.divergence(z, t, kind, 1.0, 0.5),
                torch.nn.functional.cross_entropy(z, labels, reduction="none"),
            )
        sum(part.sum() for part in parts).backward()
    return peak.most - weight.nbytes


@pytest.mark.parametrize(("way", "kind"), [("blocks", "forward-kl"), ("blocks", "jsd"), ("at once", "forward-kl")])
def test_memory_is_flat_in_the_vocabulary(way: str, kind: str) -> None:
    """At 128k and 262k entries: the same memory, and at most a fifth of the plain loss's (measured: far less)."""
    chunked = {v: peak_bytes(way, v, kind) for v in (131_072, 262_144)}
    assert chunked[262_144] <= 1.02 * chunked[131_072]
    for vocabulary, size in chunked.items():
        assert size <= 0.2 * peak_bytes("plain", vocabulary, kind)


def test_the_tracer_sees_memory() -> None:
    with Peak() as peak:
        a = torch.ones(1000)
        b = a * 2
        del a
        c = b.view(10, 100) + 1
    assert peak.most == 8000 and peak.now == 8000 and c.shape == (10, 100)
