"""A model folder's tensors as an ONNX graph stores them: transposed, packed, cast, one at a time.

Shapes: K in_features, N out_features, G groups along K, R rows, V vocabulary, H hidden size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from compress.dense import read_dense
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import awq_gemm
from compress.model import StreamedModel
from compress.plan import LayerScheme
from compress.quantized import QuantizedWeight
from exporters.trt.graph.external import Stored
from exporters.trt.layout import LAYOUT

ROWS_BYTES = 64 << 20
_NUMPY: dict[int, Any] = {onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.FLOAT: np.float32}


class Weights:
    """A model's weights by today's transformers name (`model.layers.0.mlp.up_proj`), and which were asked for.

    float_type: ONNX element type of everything that is not a code, FLOAT16 or FLOAT.
    """

    def __init__(self, model: StreamedModel, float_type: int) -> None:
        self.checkpoint = model.checkpoint
        self.model = model
        self.float_type = float_type
        self.used: set[str] = set()
        self._names: dict[str, Any] = model.model.state_dict(keep_vars=True)
        self.stored = model.stored
        other = next((s for s in self.stored.plan.groups() if not LAYOUT.takes_int8(s)), None)
        if self.stored.format not in (None, awq_gemm) and other is not None:
            raise UnsupportedError(
                f"{self.checkpoint.path}: of {self.stored.format.NAME} folders onnx-trt reads INT8 with one scale a "
                f"row and inputs as floats or static, not {other.label()}; quantize the original with `compress awq "
                "--bits 4 --sym`"
            )
        self._last: tuple[tuple[str, ...], list[QuantizedWeight]] | None = None

    def has(self, name: str) -> bool:
        """Whether the model has the parameter `name` (with its `.weight` or `.bias`)."""
        return name in self._names

    def unused(self) -> list[str]:
        """Parameters that nobody asked for; a graph that leaves one out is another model."""
        sources = {self.model.source_name(n) for n in self.used}
        return sorted(n for n in self._names if self.model.source_name(n) not in sources)

    def source(self, name: str) -> str:
        """The folder's name of a parameter; marks it as used."""
        self.used.add(name)
        return self.model.source_name(name)

    def is_quantized(self, layer: str) -> bool:
        return self.model.source_name(f"{layer}.weight").removesuffix(".weight") in self.stored

    def joins(self, layers: Sequence[str]) -> bool:
        """Whether linears of one input can be one: all plain or all of one scheme (and range of inputs), all or none
        with a bias."""
        kinds = {(self.scheme(layer), self.input_scale(layer)) for layer in layers}
        return len(kinds) == 1 and len({self.has(f"{layer}.bias") for layer in layers}) == 1

    def scheme(self, layer: str) -> LayerScheme | None:
        """What a layer is in the folder, None for a plain one."""
        source = self.model.source_name(f"{layer}.weight").removesuffix(".weight")
        return self.stored.scheme(source) if source in self.stored else None

    def input_scale(self, layer: str) -> float | None:
        """The step of a layer's inputs where they have one range for all tokens, else None."""
        scheme = self.scheme(layer)
        if scheme is None or scheme.input is None:
            return None
        static = self.stored.static(self.model.source_name(f"{layer}.weight").removesuffix(".weight"))
        assert static is not None
        return float(static.scale)

    def size(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, from the model's definition."""
        return tuple(self._names[name].shape)

    def vector(self, name: str, *, offset: float = 0.0, part: str = "norms and biases") -> Stored:
        """A norm's weight plus `offset`, or a bias."""
        source = self.source(name)

        def chunks() -> Iterator[bytes]:
            yield self._bytes(read_dense(self.stored, [source])[source].float() + offset, source)

        return Stored(name=name, data_type=self.float_type, dims=self.size(name), chunks=chunks, part=part)

    def biases(self, layers: Sequence[str], name: str) -> Stored:
        """The biases of linears that are one, end to end."""
        parts = [self.vector(f"{layer}.bias") for layer in layers]

        def chunks() -> Iterator[bytes]:
            for part in parts:
                yield from part.chunks()

        dims = (sum(p.dims[0] for p in parts),)
        return Stored(name=f"{name}.bias", data_type=self.float_type, dims=dims, chunks=chunks, part=parts[0].part)

    def rows(self, name: str, part: str) -> Stored:
        """A matrix as it is, in slices of rows: embeddings and the output matrix can be gigabytes."""
        source = self.source(name)
        num_rows, width = self.size(name)
        info = self.checkpoint.info(source)
        if info.shape != (num_rows, width):
            raise ArtifactError(
                f"{self.checkpoint.path}: tensor {source} has shape {info.shape}, but config.json says "
                f"{(num_rows, width)}; the config belongs to another model"
            )

        def chunks() -> Iterator[bytes]:
            step = max(1, ROWS_BYTES // (4 * width))
            for start in range(0, num_rows, step):
                rows = self.checkpoint.rows(source, torch.arange(start, min(start + step, num_rows)))
                yield self._bytes(rows.float(), source)

        return Stored(name=name, data_type=self.float_type, dims=(num_rows, width), chunks=chunks, part=part)

    def dense_KN(self, layers: Sequence[str], name: str, part: str) -> Stored:
        """Plain linears of one input as one, transposed to feed a MatMul: `[K, N]`, N the sum of theirs."""
        sources = [self.source(f"{layer}.weight") for layer in layers]
        sizes = [self.size(f"{layer}.weight") for layer in layers]

        def chunks() -> Iterator[bytes]:
            found = read_dense(self.stored, sources)
            yield np.ascontiguousarray(np.concatenate([self._array(found[s].float(), s) for s in sources]).T).tobytes()

        dims = (sizes[0][1], sum(n for n, _ in sizes))
        return Stored(name=f"{name}.weight", data_type=self.float_type, dims=dims, chunks=chunks, part=part)

    def int4_KN(self, layers: Sequence[str], name: str, part: str) -> tuple[Stored, Stored, int]:
        """Quantized linears of one input as one: INT4 codes `[K, N]` in -8..7, scales `[G, N]`, the group size along K.

        UnsupportedError when a zero point is not 8: TensorRT's blocked INT4 has none.
        """
        sources = [self.source(f"{layer}.weight").removesuffix(".weight") for layer in layers]
        scheme = self.stored.scheme(sources[0]).weight
        assert scheme is not None
        sizes = [self.size(f"{layer}.weight") for layer in layers]
        in_features, out_features = sizes[0][1], sum(n for n, _ in sizes)

        def codes() -> Iterator[bytes]:
            found = self._codes(sources)
            for source, q in zip(sources, found, strict=True):
                if not bool((q.zero_point_OG == 8).all()):
                    raise UnsupportedError(
                        f"{source}: a zero point is not 8, and TensorRT reads symmetric INT4 only; "
                        "quantize with `compress awq --bits 4 --sym`"
                    )
            yield pack_int4(torch.cat([q.codes_OI for q in found]).t().contiguous())

        def scales() -> Iterator[bytes]:
            scale_GN = torch.cat([q.scale_OG for q in self._codes(sources)]).t()
            yield self._bytes(scale_GN.float(), f"{sources[0]}.scales")

        groups = scheme.groups(in_features, layers[0])
        float_type, int4 = self.float_type, onnx.TensorProto.INT4
        weight = f"{name}.weight"
        return (
            Stored(name=f"{weight}.codes", data_type=int4, dims=(in_features, out_features), chunks=codes, part=part),
            Stored(
                name=f"{weight}.scales", data_type=float_type, dims=(groups, out_features), chunks=scales, part=part
            ),
            in_features // groups,
        )

    def int8_KN(self, layers: Sequence[str], name: str, part: str) -> tuple[Stored, Stored]:
        """Quantized linears of one input as one: INT8 codes `[K, N]` in -128..127 and scales `[N]`."""
        sources = [self.source(f"{layer}.weight").removesuffix(".weight") for layer in layers]
        sizes = [self.size(f"{layer}.weight") for layer in layers]
        in_features, out_features = sizes[0][1], sum(n for n, _ in sizes)

        def codes() -> Iterator[bytes]:
            yield torch.cat([q.signed_OI() for q in self._codes(sources)]).t().contiguous().numpy().tobytes()

        def scales() -> Iterator[bytes]:
            scale_N = torch.cat([q.scale_OG for q in self._codes(sources)]).reshape(-1)
            yield self._bytes(scale_N.float(), f"{sources[0]}.weight_scale")

        weight, int8 = f"{name}.weight", onnx.TensorProto.INT8
        return (
            Stored(name=f"{weight}.codes", data_type=int8, dims=(in_features, out_features), chunks=codes, part=part),
            Stored(name=f"{weight}.scales", data_type=self.float_type, dims=(out_features,), chunks=scales, part=part),
        )

    def _codes(self, sources: Sequence[str]) -> list[QuantizedWeight]:
        """Layers' codes; the last ones are kept, since codes and scales are asked for one after the other."""
        if self._last is None or self._last[0] != tuple(sources):
            self._last = (tuple(sources), [self.stored.weight(source) for source in sources])
        return self._last[1]

    def _bytes(self, values: Tensor, source: str) -> bytes:
        """Little-endian bytes in the graph's float type."""
        return self._array(values, source).tobytes()

    def _array(self, values: Tensor, source: str) -> np.ndarray[Any, Any]:
        """Values in the graph's float type; ArtifactError for what float16 cannot hold."""
        with np.errstate(over="ignore"):  # what overflows is reported below
            array = values.numpy().astype(_NUMPY[self.float_type])
        if not np.isfinite(array).all():
            raise ArtifactError(
                f"{self.checkpoint.path}: tensor {source} reaches {float(values.abs().max()):.3g}, beyond float16's "
                "65504 or not finite; TensorRT would compute infinities from it"
            )
        return array


def pack_int4(codes_KN: Tensor) -> bytes:
    """Unsigned codes 0..15, uint8, into ONNX INT4 of `code - 8`: row-major, the first of two values in the low nibble.

    `code - 8` in four bits of two's complement is `code XOR 8`.
    """
    signed = (codes_KN ^ 8).reshape(-1).numpy()
    if signed.size % 2:
        signed = np.append(signed, np.uint8(0))
    data: bytes = (signed[0::2] | (signed[1::2] << 4)).astype(np.uint8).tobytes()
    return data


def array(name: str, values: np.ndarray[Any, Any], part: str = "tables") -> Stored:
    """An array of the graph's own, such as a rotary table."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)

    def chunks() -> Iterable[bytes]:
        return [values.tobytes()]

    return Stored(name=name, data_type=kind, dims=values.shape, chunks=chunks, part=part)
