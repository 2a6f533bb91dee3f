"""Which list of modules is the decoder, and whether it can be run one block at a time: asked of the model itself.

The model's own forward is run once or twice on four tokens, with a recorder in the place of every block and made-up
weights around them, so nothing is read and nothing is large. What is then known and not assumed: which list of blocks
runs, that each runs once and in order, that nothing touches the hidden states between two of them, and that what a
block is called with besides them does not depend on the tokens. Where one of these does not hold, a block at a time
would compute another model, so the model is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError, explained, reason
from compress.linear import is_linear

# A block whose causality is tried out is made up whole, in float32.
_PROBED_NUMBERS = 500_000_000
_MEND = "mend config.json or fetch it again"
_IDS = ([[3, 1, 2, 0]], [[0, 2, 1, 3]])


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """`name` of the module list, its members, and whether a block gives its hidden states in a tuple."""

    name: str
    blocks: Sequence[nn.Module]
    returns_tuple: bool


@dataclass(kw_only=True)
class _Seen:
    """One call of a block: its place and arguments, and whether its hidden states are those of the block before."""

    path: str
    index: int
    hidden: Tensor
    names: list[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    untouched: bool

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors it is called with besides hidden states, by the names of its arguments."""
        return dict(_tensors(dict(zip(self.names, self.args, strict=False)) | self.kwargs))


def base_of(model: nn.Module) -> nn.Module:
    """The model without its output matrix."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    base = getattr(model, prefix, None) if prefix else None
    return base if isinstance(base, nn.Module) else model


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The module that looks token ids up; UnsupportedError when the model does not say which it is."""
    for module in (base_of(model), model):
        with suppress(NotImplementedError, AttributeError):
            found = module.get_input_embeddings()  # type: ignore[operator]
            if isinstance(found, nn.Module) and getattr(found, "weight", None) is not None:
                return found  # type: ignore[return-value]
    raise UnsupportedError(
        f"{type(model).__name__} has no table of token embeddings that it names; it cannot be streamed"
    )


def find_decoder(model: nn.Module, path: object = "") -> Decoder:
    """The decoder of a causal LM whose parameters are on the meta device and whose buffers are real.

    path: the folder, for the message. UnsupportedError when there is no such decoder.
    """
    name = f"{path}: {type(model).__name__}" if str(path) else type(model).__name__
    lists = candidates(model)
    if not lists:
        raise UnsupportedError(
            f"{name} has no list of blocks with linear layers; only decoder-only transformers can be streamed"
        )
    vocab_size = int(input_embedding(model).weight.shape[0])
    ids = [torch.tensor(row).clamp(max=vocab_size - 1) for row in _IDS]
    seen, as_tuple = _run(name, model, lists, ids[0], as_tuple=False), False
    if not all(call.untouched for call in seen):
        with suppress(UnsupportedError):
            seen, as_tuple = _run(name, model, lists, ids[0], as_tuple=True), True
    found = _check(name, lists, seen)
    other = _run(name, model, lists, ids[1], as_tuple)
    _refuse_two_directions(name, lists[found][0], seen[0])
    for one, two in zip(seen, other, strict=True):
        unlike = [key for key, value in one.inputs.items() if not _equal(value, two.inputs.get(key))]
        if unlike:
            raise UnsupportedError(
                f"{name}: block {found}.{one.index} is given {unlike[0]}, which depends on the tokens beside its "
                "hidden states (per-layer embeddings, for one); such models are not supported yet"
            )
    return Decoder(name=found, blocks=lists[found], returns_tuple=as_tuple)


def candidates(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every outermost module list whose members hold linear layers, by name."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len(module) and any(is_linear(m) for m in module[0].modules()):
            found[name] = list(module)
    return found


def _check(name: str, lists: Mapping[str, list[nn.Module]], seen: Sequence[_Seen]) -> str:
    """The one list that ran, each of its blocks once and in order, passing hidden states on untouched."""
    ran = list(dict.fromkeys(call.path for call in seen))
    if len(ran) != 1:
        which = f"runs {len(ran)} lists of blocks ({', '.join(ran)})" if ran else "runs none of its lists of blocks"
        raise UnsupportedError(f"{name} {which}; only models with one list of decoder blocks can be streamed")
    order = [call.index for call in seen]
    if order != list(range(len(lists[ran[0]]))):
        raise UnsupportedError(
            f"{name} runs the {len(lists[ran[0]])} blocks of {ran[0]} in the order {str(order)[:60]}; only models that "
            "run each once, one after the other, can be streamed"
        )
    touched = next((call.index for call in seen if not call.untouched), None)
    if touched is not None:
        raise UnsupportedError(
            f"{name} changes the hidden states between the blocks {touched - 1} and {touched} of {ran[0]}; only models "
            "that pass them on as they are can be streamed"
        )
    return ran[0]


def _refuse_two_directions(name: str, block: nn.Module, call: _Seen) -> None:
    """Of an encoder (BERT), transformers makes a causal LM that is not causal.

    Where the block does not say that it is, it is run with made-up weights: the last token must not change the others.
    """
    if any(getattr(m, "is_causal", False) is True for m in block.modules()):
        return
    if sum(p.numel() for p in block.parameters()) > _PROBED_NUMBERS:
        return
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.ones(p.shape) if p.ndim < 2 else torch.randn(p.shape, generator=generator) * 0.05
        for key, p in block.named_parameters()
    }
    hidden = torch.randn(call.hidden.shape, generator=generator)
    outs = []
    with explained(f"{name}: a block does not run as its config.json describes it", _MEND), torch.no_grad():
        for last in (hidden[:, -1:], -hidden[:, -1:]):
            inputs = torch.cat([hidden[:, :-1], last], dim=1)
            out = torch.func.functional_call(block, weights, (inputs, *call.args), dict(call.kwargs))
            outs.append((out[0] if isinstance(out, tuple | list) else out)[:, :-1])
    if not torch.allclose(outs[0], outs[1], rtol=1e-4, atol=1e-5):
        raise UnsupportedError(
            f"{name} reads a text in both directions (an encoder, as BERT is) and is not a causal language model; "
            "pass a decoder-only model such as a Llama, Qwen or Gemma"
        )


def _run(
    name: str, model: nn.Module, lists: Mapping[str, list[nn.Module]], ids_BT: Tensor, as_tuple: bool
) -> list[_Seen]:
    """One forward of the model without its output matrix, with recorders for blocks."""
    seen: list[_Seen] = []
    generator = torch.Generator().manual_seed(0)
    passed: list[Tensor] = []

    def recorder(path: str, index: int, names: list[str]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            untouched = not passed or _equal(hidden, passed[-1])
            seen.append(
                _Seen(
                    path=path,
                    index=index,
                    hidden=hidden,
                    names=names,
                    args=args[1:],
                    kwargs=kwargs,
                    untouched=untouched,
                )
            )
            shape = hidden.shape if not passed else passed[-1].shape
            passed.append(torch.rand(shape, generator=generator).to(hidden.dtype))
            return (passed[-1],) if as_tuple else passed[-1]

        return forward

    members = [(path, i, block) for path, blocks in lists.items() for i, block in enumerate(blocks)]
    try:
        with _made_up(model, tuple(f"{path}." for path in lists)), torch.no_grad():
            for path, i, block in members:
                block.forward = recorder(path, i, list(inspect.signature(block.forward).parameters)[1:])
            base_of(model)(input_ids=ids_BT, use_cache=False)
    except Exception as e:
        if seen:
            raise UnsupportedError(
                f"{name} expects of its blocks more than hidden states ({reason(e)}), as recurrent models do; such "
                "models are not supported yet"
            ) from e
        with explained(f"{name} does not run as its config.json describes it", _MEND):
            raise
    finally:
        for _, _, block in members:
            block.__dict__.pop("forward", None)
    return seen


@contextmanager
def _made_up(model: nn.Module, inside: tuple[str, ...]) -> Iterator[None]:
    """The model with values for all parameters outside the blocks: one number a row, so that rows differ."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, module in model.named_modules():
            if f"{name}.".startswith(inside):
                continue
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    held.append((module, key, parameter))
                    module._parameters[key] = nn.Parameter(_made_up_like(parameter), requires_grad=False)
        yield
    finally:
        for module, key, parameter in held:
            module._parameters[key] = parameter


def _made_up_like(parameter: Tensor) -> Tensor:
    if parameter.ndim < 2:
        return torch.ones(parameter.shape, dtype=parameter.dtype)
    rows = (torch.arange(parameter.shape[0]) % 89 + 1).to(parameter.dtype) / 890
    return rows.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a block's arguments, each with the name of its argument."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(torch.equal(a, b))
