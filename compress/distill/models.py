"""Whole models in memory, for training and for being learned from: loading, their heads, and whether they fit together.

Unlike the rest of this toolkit, distillation holds both models entirely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, torch_dtype
from compress.errors import ConfigError
from compress.formats import Stored
from compress.losses import heads
from compress.losses.heads import Head
from compress.model import StreamedModel
from compress.tokens import load_tokenizer

# Of blocks of all kinds, with and without gradients: those of a student, its teacher and a watched text.
COMPILED_SHAPES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A causal language model in memory and the folder that it came from, with how that stores quantized layers.

    base: the model without its head. names: the model's state names -> the folder's (`.weight` for a quantized layer).
    Tied parameters are tied, and so have one name in the folder.
    """

    checkpoint: Checkpoint
    stored: Stored
    model: nn.Module
    base: nn.Module
    blocks: Sequence[nn.Module]
    names: Mapping[str, str]

    @property
    def vocab_size(self) -> int:
        """Rows of the output matrix."""
        return int(output_layer(self).weight.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(output_layer(self).weight.shape[1])

    def compile_blocks(self) -> None:
        """Each block by `torch.compile`, for the shapes that it meets; blocks of one kind share what is compiled."""
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            block.compile(dynamic=False)


def load(path: Path, *, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False) -> LoadedModel:
    """The model in the folder `path`, quantized weights dequantized, every parameter in `dtype`. In evaluation mode.

    No parameter takes a gradient. A folder whose plan quantizes inputs has linears that do.
    """
    opened = StreamedModel.open(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened.load_whole()
    return LoadedModel(
        checkpoint=opened.checkpoint,
        stored=opened.stored,
        model=opened.model,
        base=opened.base,
        blocks=opened.blocks,
        names={name: opened.source_name(name) for name in opened.model.state_dict()},
    )


def output_layer(loaded: LoadedModel) -> nn.Linear:
    """See `heads.output_layer`."""
    return heads.output_layer(loaded.model, loaded.checkpoint.path)


def head_of(loaded: LoadedModel) -> Head:
    """See `heads.head_of`."""
    return heads.head_of(loaded.model, loaded.checkpoint.path)


def proven_head(loaded: LoadedModel) -> Head:
    """See `heads.proven_head`."""
    return heads.proven_head(loaded.model, loaded.base, loaded.checkpoint.path)


def common_vocabulary(student: Path, teacher: Path, rows_student: int, rows_teacher: int) -> int:
    """How many ids the two models share: all of the tokenizer's. ConfigError, saying where, when they differ.

    The output matrices may be padded to different lengths behind that.
    """
    ours, theirs = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours != theirs:
        raise ConfigError(_difference(student, teacher, ours, theirs))
    used = max(ours.values()) + 1
    common = min(rows_student, rows_teacher)
    if common < used:
        which, rows = (student, rows_student) if rows_student < rows_teacher else (teacher, rows_teacher)
        raise ConfigError(
            f"the tokenizer has {used} ids and the output matrix of {which} {rows} rows; the vocabulary was cut, and a "
            "student needs its teacher's: choose another student"
        )
    return common


def _difference(student: Path, teacher: Path, ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Where two vocabularies part, at the lowest id."""
    by_id, other = ({i: t for t, i in v.items()} for v in (ours, theirs))
    first = min(i for i in by_id.keys() | other.keys() if by_id.get(i) != other.get(i))

    def named(tokens: dict[int, str]) -> str:
        return repr(tokens[first]) if first in tokens else "nothing"

    differing = len(ours.items() ^ theirs.items())
    return (
        f"student {student} and teacher {teacher} have different vocabularies ({len(ours)} and {len(theirs)} tokens, "
        f"{differing} entries differ): id {first} is {named(by_id)} to the student and {named(other)} to the teacher; "
        "choose a student with the teacher's tokenizer"
    )


def num_parameters(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def gathered_parameters(loaded: LoadedModel) -> int:
    """What a process has whole at once of a model that is shared by blocks: all outside of them, and two of them."""
    sizes = sorted((num_parameters(block) for block in loaded.blocks), reverse=True)
    return num_parameters(loaded.model) - sum(sizes) + sum(sizes[:2])


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def stored_state(loaded: LoadedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state by the folder's names, tied tensors once, in the dtypes that the folder stores."""
    out: dict[str, Tensor] = {}
    for name, source in loaded.names.items():
        if source not in out and source.removesuffix(".weight") not in loaded.stored:
            info = loaded.checkpoint.tensors.get(source)
            dtype = torch.float16 if info is None else torch_dtype(info.dtype)
            out[source] = state[name].detach().to("cpu", dtype).contiguous()
    return out
