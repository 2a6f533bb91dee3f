"""Text sampled from the model itself, token by token.

Shapes: B rows sampled together, T seq_len, V vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress import kv_cache
from compress.checkpoint import Checkpoint
from compress.drawing import Drawer, drawer_of
from compress.errors import ConfigError, explained
from compress.long_text import token_ids
from compress.tell import SILENT, Tell
from compress.turns import Turns, turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The most weights (bytes, as stored) that a model may have to be sampled from unasked: token by token a larger one
# takes hours on a CPU, and all of it is held in float32.
LARGEST_ON_CPU = 1_000_000_000
LARGEST_ON_GPU = 4_000_000_000
# Rows sampled together: on a CPU, and at most on a GPU, where a step takes as long for many as for few, and at most so
# many bytes of keys and values are held.
ROWS_ON_CPU, ROWS_ON_GPU, CACHE_BYTES = 32, 256, 8_000_000_000


def largest(device: str) -> int:
    """The most bytes of weights that a model may have to be sampled from unasked."""
    return LARGEST_ON_CPU if torch.device(device).type == "cpu" else LARGEST_ON_GPU


def may_sample_from(model: Path, device: str) -> str | None:
    """Why the model in a folder is too large to be sampled from without being asked to; None if it is not."""
    size = sum(info.num_bytes for info in Checkpoint.open(model).tensors.values())
    most = largest(device)
    if size <= most:
        return None
    return (
        f"{model} holds {size / 1e9:.1f} GB of weights, more than the {most / 1e9:.0f} GB up to which text is "
        f"sampled from the model itself by default on {torch.device(device).type}"
    )


def sample_from_folder(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    device: str = "cpu",
    chat: bool = False,
    trust_remote_code: bool = False,
    tell: Tell = SILENT,
) -> Tensor:
    """`sample_from_model` of the model in a folder, loaded for it and released."""
    tell.say(f"sampling {num_samples} rows of {seq_len} tokens from {model} itself, token by token")
    loaded = load_model_float32(model, device, trust_remote_code=trust_remote_code)
    return sample_from_model(
        loaded,
        tokenizer,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        batch_size=rows_at_once(loaded, seq_len),
        chat=chat,
        tell=tell,
    )


def rows_at_once(model: PreTrainedModel, seq_len: int) -> int:
    """How many rows to sample together on the model's device, by its config alone: so the same rows come out again."""
    if model.device.type == "cpu":
        return ROWS_ON_CPU
    row_bytes = seq_len * kv_cache.bytes_a_token(model.config.get_text_config(), model.dtype.itemsize)
    return max(1, min(ROWS_ON_GPU, CACHE_BYTES // row_bytes))


def load_model_float32(model: Path, device: str = "cpu", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in the folder `model`, float32, on `device`.

    It holds the whole model in memory (4 bytes a parameter), unlike the rest of this toolkit.
    """
    from transformers import AutoModelForCausalLM

    with explained(
        f"the model in {model} cannot be loaded to sample text from it", "pass a text file instead of self", ConfigError
    ):
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        )
        return loaded.to(device).eval()


@torch.inference_mode()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = ROWS_ON_CPU,
    first_row: int = 0,
    chat: bool = False,
    tell: Tell = SILENT,
) -> Tensor:
    """int64 [num_samples, seq_len] drawn from `model` at temperature 1 with nothing cut off, on the CPU.

    Each row begins as the tokenizer begins a text, or else with its end-of-text or BOS token; after an
    end-of-text token the row goes on with a new text. Ids are used as drawn, never decoded and encoded again.
    Ids behind the tokenizer's last are never drawn: many models pad their vocabulary.

    chat: where the tokenizer has a chat template, every other row (those of odd number) holds conversations instead:
    the model writes both the user's and the assistant's words, between what the template puts around them (`Turns`).

    A row depends on (seed, row number, from `first_row` on) and on rounding: same machine, same libraries, same result.
    It draws by inverting the cumulative distribution with a uniform number from PCG64, in float64.
    """
    turns = turns_of(tokenizer) if chat else None
    text = _Text(_start_ids(tokenizer), tokenizer.eos_token_id)
    rows = []
    drawers: dict[int, Drawer] = {}
    tell.start("sampled position", seq_len * -(-num_samples // batch_size))
    positions = itertools.count(1)

    def step() -> None:
        tell.step(next(positions))

    for first in range(0, num_samples, batch_size):
        numbers = range(first, min(first + batch_size, num_samples))
        streams = [np.random.Generator(np.random.PCG64([seed, first_row + row])) for row in numbers]
        uniform_BT = torch.from_numpy(np.stack([stream.random(seq_len) for stream in streams]))
        writers = [text.begun() if turns is None or (first_row + row) % 2 == 0 else _Talk(turns) for row in numbers]
        if len(numbers) not in drawers:
            drawers.clear()  # before the next one's cache is there
            drawers[len(numbers)] = drawer_of(model, len(tokenizer), len(numbers), seq_len, tell)
        rows.append(_sample_batch(drawers[len(numbers)], writers, uniform_BT, step))
    return torch.cat(rows)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a text: at least one id."""
    own = token_ids(tokenizer, "", special=True)
    if own and tokenizer.bos_token_id in own:
        return own[: own.index(tokenizer.bos_token_id) + 1]
    # end-of-text before BOS: a tokenizer that adds no BOS has models that saw texts apart by end-of-text only
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [token]
    raise ConfigError(
        "sampling text from the model needs a token to start from, and the tokenizer has neither end-of-text nor BOS; "
        "pass a text file instead of self"
    )


class _Text:
    """One row of plain text: which tokens it takes before it draws again."""

    def __init__(self, start: list[int], end_of_text: int | None) -> None:
        self.start, self.end_of_text = start, end_of_text
        self.forced = list(start)
        self.restart = [] if end_of_text is None or start == [end_of_text] else start

    def begun(self) -> _Text:
        return _Text(self.start, self.end_of_text)

    def take(self, drawn: int) -> int:
        """The row's next token: one that must come, or the one drawn."""
        token = self.forced.pop(0) if self.forced else drawn
        if not self.forced and token == self.end_of_text:
            self.forced = list(self.restart)
        return token


class _Talk:
    """One row of conversations, one after another: the user's words and the assistant's are drawn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.forced = list(turns.opening)
        self.of_user = True

    def take(self, drawn: int) -> int:
        """The row's next token: one that must come, or the one drawn."""
        if self.forced:
            return self.forced.pop(0)
        if drawn == self.turns.end:
            self.forced = list(self.turns.bridge if self.of_user else (*self.turns.closing, *self.turns.opening))
            self.of_user = not self.of_user
        return drawn


def _sample_batch(
    drawer: Drawer, writers: Sequence[_Text | _Talk], uniform_BT: Tensor, step: Callable[[], None]
) -> Tensor:
    num_rows, seq_len = uniform_BT.shape
    ids_BT = torch.empty(num_rows, seq_len, dtype=torch.int64)
    drawn_B = [0] * num_rows
    drawer.begin(uniform_BT)
    for position in range(seq_len):
        for row, writer in enumerate(writers):
            ids_BT[row, position] = writer.take(drawn_B[row])
        step()
        if position + 1 < seq_len:
            drawn_B = drawer.draw(ids_BT[:, position : position + 1], position)
    return ids_BT
