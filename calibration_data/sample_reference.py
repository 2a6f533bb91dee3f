"""Samples the default calibration and evaluation texts from the bundled reference model.

    python -m calibration_data.sample_reference [--held-out] [--out FILE]

Text that a model writes itself follows the distribution that the model has learnt, and belongs to nobody
else. So it can be shipped, and it is never a part of a test set.

The file comes out byte for byte the same on any machine and with any number of threads, because

- the forward pass is written out here in float64 throughout (transformers normalises in float32, whatever the
  dtype of the weights);
- the noise is our own, one PCG64 stream a row. It is added to the logits and the largest wins (Gumbel-max),
  which draws from softmax(logits) exactly: temperature 1, nothing cut off;
- a token could differ only where the two best candidates lie closer than the rounding error of the logits,
  about 1e-13. `sample_rows` returns the closest call it met; provenance.json records it.
"""

# Shapes: B rows, T positions so far, V vocabulary, D hidden,
#         K key-value heads, R query heads per key-value head, H head size

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibration_data import default_calibration, default_evaluation, reference_model

SEED = 20240229
NUM_ROWS = 66
HELD_OUT_FIRST_ROW = 1000  # other rows, so other noise: the evaluation text shares nothing with the calibration text
HELD_OUT_ROWS = 26
ROW_TOKENS = 1024
START_TOKEN = 0  # <|endoftext|> starts each document in the model's training text


@dataclass(frozen=True, kw_only=True)
class Llama64:
    """A Llama's weights in float64, and the four numbers that its forward pass needs."""

    weights: dict[str, Tensor]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float

    @property
    def vocab_size(self) -> int:
        return int(self.weights["model.embed_tokens.weight"].shape[0])


def load_float64(folder: Path) -> Llama64:
    """The model in `folder`: a Llama with tied embeddings, plain rotary embedding, one safetensors file."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Llama64(
        weights={name: w.to(torch.float64) for name, w in load_file(folder / "model.safetensors").items()},
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_parameters"]["rope_theta"],
    )


class Decoder:
    """Next-token logits for B rows that grow by one token a step; holds their keys and values."""

    def __init__(self, model: Llama64, num_rows: int, max_tokens: int) -> None:
        self._model = model
        self._position = 0
        cache_shape = (model.num_layers, 2, num_rows, model.num_kv_heads, max_tokens, model.head_dim)
        self._cache_L2BKTH = torch.empty(cache_shape, dtype=torch.float64)
        exponent = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
        frequency_H = (model.rope_theta**-exponent).repeat(2)
        self._angle_TH = torch.outer(torch.arange(max_tokens, dtype=torch.float64), frequency_H)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits of the token that follows `ids_B` (int64): float64 [B, V]."""
        embedding_VD = self._model.weights["model.embed_tokens.weight"]
        hidden_BD = embedding_VD[ids_B]
        for layer in range(self._model.num_layers):
            hidden_BD = hidden_BD + self._attention(layer, self._norm(hidden_BD, layer, "input_layernorm"))
            hidden_BD = hidden_BD + self._mlp(layer, self._norm(hidden_BD, layer, "post_attention_layernorm"))
        self._position += 1
        return self._rms(hidden_BD, self._model.weights["model.norm.weight"]) @ embedding_VD.T

    def _weight(self, layer: int, name: str) -> Tensor:
        return self._model.weights[f"model.layers.{layer}.{name}.weight"]

    def _rms(self, x_BD: Tensor, gain_D: Tensor) -> Tensor:
        return x_BD * torch.rsqrt(x_BD.pow(2).mean(-1, keepdim=True) + self._model.norm_eps) * gain_D

    def _norm(self, x_BD: Tensor, layer: int, name: str) -> Tensor:
        return self._rms(x_BD, self._weight(layer, name))

    def _rotate(self, x_BKRH: Tensor) -> Tensor:
        angle_H = self._angle_TH[self._position]
        first, second = x_BKRH.chunk(2, dim=-1)
        return x_BKRH * angle_H.cos() + torch.cat([-second, first], dim=-1) * angle_H.sin()

    def _attention(self, layer: int, x_BD: Tensor) -> Tensor:
        shape = (x_BD.shape[0], self._model.num_kv_heads, -1, self._model.head_dim)
        query_BKRH, key_BK1H, value_BK1H = (
            (x_BD @ self._weight(layer, f"self_attn.{name}_proj").T).view(shape) for name in "qkv"
        )
        keys, values = self._cache_L2BKTH[layer]
        keys[:, :, self._position] = self._rotate(key_BK1H)[:, :, 0]
        values[:, :, self._position] = value_BK1H[:, :, 0]
        keys_BKTH, values_BKTH = keys[:, :, : self._position + 1], values[:, :, : self._position + 1]
        # K @ Q.mT and not Q @ K.mT: this product alone took 1.3 ms instead of 4.5 (2 cores, 512 positions)
        scores_BKTR = keys_BKTH @ self._rotate(query_BKRH).mT / self._model.head_dim**0.5
        mixed_BKRH: Tensor = scores_BKTR.softmax(-2).mT @ values_BKTH
        return mixed_BKRH.reshape(x_BD.shape) @ self._weight(layer, "self_attn.o_proj").T

    def _mlp(self, layer: int, x_BD: Tensor) -> Tensor:
        gate: Tensor = torch.nn.functional.silu(x_BD @ self._weight(layer, "mlp.gate_proj").T)
        up = x_BD @ self._weight(layer, "mlp.up_proj").T
        return (gate * up) @ self._weight(layer, "mlp.down_proj").T


def row_noise(row: int) -> Iterator[npt.NDArray[np.float64]]:
    """Standard Gumbel noise of one row, float64 [4096] a step; it depends on SEED and the row's number only.

    Made from uniform numbers and not by `Generator.gumbel`, whose stream numpy may change between versions.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, row])))
    while True:
        yield -np.log(-np.log(generator.random(4096)))


@torch.inference_mode()
def sample_rows(model: Llama64, num_rows: int, num_tokens: int, first_row: int = 0) -> tuple[Tensor, float]:
    """Rows `first_row` and on of the sample: int64 [num_rows, num_tokens], and the smallest winning margin.

    Each row follows START_TOKEN, which is not part of it. A row does not depend on how many others there are.
    """
    assert model.vocab_size == 4096, model.vocab_size
    decoder = Decoder(model, num_rows, num_tokens)
    noise = [row_noise(first_row + row) for row in range(num_rows)]
    ids_BT = torch.empty(num_rows, num_tokens, dtype=torch.int64)
    ids_B = torch.full((num_rows,), START_TOKEN)
    margin = float("inf")
    for position in range(num_tokens):
        noise_BV = torch.from_numpy(np.stack([next(stream) for stream in noise]))
        best_B2 = (decoder.step(ids_B) + noise_BV).topk(2, dim=-1)
        margin = min(margin, (best_B2.values[:, 0] - best_B2.values[:, 1]).min().item())
        ids_B = best_B2.indices[:, 0]
        ids_BT[:, position] = ids_B
    return ids_BT, margin


def cut_documents(row: Iterable[int]) -> Iterator[list[int]]:
    """The documents of a row: cut at each end-of-text; the last document ends where the row does."""
    document: list[int] = []
    for token in row:
        if token == START_TOKEN:
            yield document
            document = []
        else:
            document.append(token)
    yield document


def to_jsonl(ids_BT: Tensor, folder: Path) -> str:
    """One line {"text": ...} a document, in the order of the rows; an empty document is left out.

    Bytes that are not UTF-8 (a row may end inside a character) become U+FFFD.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (tokenizer.decode(document) for row in ids_BT.tolist() for document in cut_documents(row))
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample the default calibration or evaluation text.")
    parser.add_argument("--held-out", action="store_true", help="the evaluation text instead of the calibration text")
    parser.add_argument("--out", type=Path, help="JSONL file [the bundled one]")
    arguments = parser.parse_args()
    held_out: bool = arguments.held_out
    out: Path = arguments.out or (default_evaluation() if held_out else default_calibration())
    num_rows, first_row = (HELD_OUT_ROWS, HELD_OUT_FIRST_ROW) if held_out else (NUM_ROWS, 0)
    folder = reference_model()
    torch.set_num_threads(1)  # these products are small: threads that wait for a busy core took 4 times as long
    ids_BT, margin = sample_rows(load_float64(folder), num_rows, ROW_TOKENS, first_row)
    text = to_jsonl(ids_BT, folder)
    out.write_bytes(text.encode("utf-8"))
    num_documents = text.count("\n")
    print(
        f"wrote {out}: {num_documents} documents from {ids_BT.numel()} tokens, closest call {margin:.1e}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
