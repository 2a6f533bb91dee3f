"""A model folder's tensors as an ONNX graph stores them: transposed, packed, cast, one at a time.

Shapes: K in_features, N out_features, G groups along K, R rows, V vocabulary, H hidden size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from compress.dense import read_dense
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import awq_gemm
from compress.model import StreamedModel
from compress.quantized import QuantizedWeight
from exporters.trt.graph.external import Stored

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
        if self.stored.format not in (None, awq_gemm):
            raise UnsupportedError(
                f"{self.checkpoint.path}: onnx-trt reads AutoAWQ gemm folders and plain ones, not "
                f"{self.stored.format.NAME}; quantize the original with `compress awq --bits 4 --sym`"
            )
        self._last: tuple[str, QuantizedWeight] | None = None

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

    def size(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, from the model's definition."""
        return tuple(self._names[name].shape)

    def vector(self, name: str, *, offset: float = 0.0, part: str = "norms and biases") -> Stored:
        """A norm's weight plus `offset`, or a bias."""
        source = self.source(name)

        def chunks() -> Iterator[bytes]:
            yield self._bytes(read_dense(self.stored, [source])[source].float() + offset, source)

        return Stored(name=name, data_type=self.float_type, dims=self.size(name), chunks=chunks, part=part)

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

    def dense_KN(self, layer: str, part: str) -> Stored:
        """A plain linear's weight, transposed to feed a MatMul."""
        name = f"{layer}.weight"
        source = self.source(name)
        out_features, in_features = self.size(name)

        def chunks() -> Iterator[bytes]:
            w_KN = read_dense(self.stored, [source])[source].t().contiguous()
            yield self._bytes(w_KN.float(), source)

        return Stored(name=name, data_type=self.float_type, dims=(in_features, out_features), chunks=chunks, part=part)

    def int4_KN(self, layer: str, part: str) -> tuple[Stored, Stored, int]:
        """A quantized linear: INT4 codes `[K, N]` in -8..7, scales `[G, N]`, and the group size along K.

        UnsupportedError when a zero point is not 8: TensorRT's blocked INT4 has none.
        """
        source = self.source(f"{layer}.weight").removesuffix(".weight")
        scheme = self.stored.scheme(source).weight
        assert scheme is not None
        out_features, in_features = self.size(f"{layer}.weight")

        def codes() -> Iterator[bytes]:
            q = self._codes(source)
            if not bool((q.zero_point_OG == 8).all()):
                raise UnsupportedError(
                    f"{source}: a zero point is not 8, and TensorRT reads symmetric INT4 only; "
                    "quantize with `compress awq --bits 4 --sym`"
                )
            yield pack_int4(q.codes_OI.t().contiguous())

        def scales() -> Iterator[bytes]:
            yield self._bytes(self._codes(source).scale_OG.t().float(), f"{source}.scales")

        groups = scheme.groups(in_features, layer)
        return (
            Stored(
                name=f"{layer}.weight.codes",
                data_type=onnx.TensorProto.INT4,
                dims=(in_features, out_features),
                chunks=codes,
                part=part,
            ),
            Stored(
                name=f"{layer}.weight.scales",
                data_type=self.float_type,
                dims=(groups, out_features),
                chunks=scales,
                part=part,
            ),
            in_features // groups,
        )

    def _codes(self, source: str) -> QuantizedWeight:
        """A layer's codes; the last one is kept, since codes and scales are asked for one after the other."""
        if self._last is None or self._last[0] != source:
            self._last = (source, self.stored.weight(source))
        return self._last[1]

    def _bytes(self, values: Tensor, source: str) -> bytes:
        """Little-endian bytes in the graph's float type; ArtifactError for what float16 cannot hold."""
        with np.errstate(over="ignore"):  # what overflows is reported below
            array = values.numpy().astype(_NUMPY[self.float_type])
        if not np.isfinite(array).all():
            raise ArtifactError(
                f"{self.checkpoint.path}: tensor {source} reaches {float(values.abs().max()):.3g}, beyond float16's "
                "65504 or not finite; TensorRT would compute infinities from it"
            )
        data: bytes = array.tobytes()
        return data


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
