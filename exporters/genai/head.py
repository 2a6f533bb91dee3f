"""The output matrix in 8 bits, for a CPU that decodes: it is what a small model with a large vocabulary reads most of.

In float it is widened to float32 when the graph is loaded: 113 MB a token for SmolLM2-135M, whose INT4 linears are 60.
In blocks of columns with a scale each it is little over a quarter of that, and goes through ONNX Runtime's integer
kernel, which is quicker the longer the blocks are: 35, 40 and 49 GB/s a core with 32, 64 and 128 columns. Each
value is off by at most half a step, 1/254 of the largest of its block; the embedding that rows are taken from stays.

Shapes: V vocabulary, H hidden size, G blocks along H
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import helper

from compress.errors import ArtifactError, UnsupportedError
from exporters.genai.graph import CONTRIB, EMBEDDING, LM_HEAD, Graph

NODE = "/lm_head/MatMulNBits"
CODES, SCALES = "lm_head.codes", "lm_head.scales"
BLOCKS = (128, 64, 32)  # columns; the first that divides a row
MIDDLE = 128  # the zero point of MatMulNBits of 8 bits that holds none
STEPS = 127
_ROWS = 4096  # a slice of rows is in memory as float32 at a time


def narrow(graph: Graph) -> None:
    """Replace the product with the output matrix by one with its codes; the matrix goes where nothing else reads it.

    Comes after `graph.store_lm_head`. UnsupportedError where rows are not whole blocks.
    """
    product = next(n for n in graph.nodes if n.op_type == "FusedMatMul" and n.name == "/lm_head/MatMul")
    weight_VH = graph.array(matrix(product.input[1]))
    num_rows, width = weight_VH.shape
    size = block(width)
    if size is None:
        raise UnsupportedError(f"--head int8: {width} columns are not whole blocks of {BLOCKS[-1]}; pass --head float")
    codes = np.empty((num_rows, width // size, size), np.uint8)
    scales = np.empty((num_rows, width // size), np.float32)
    for rows in _slices(num_rows):
        codes[rows], scales[rows] = quantize(weight_VH[rows].astype(np.float32), size)
    graph.set(CODES, codes)
    graph.set(SCALES, scales.reshape(-1))
    index = list(graph.nodes).index(product)
    graph.nodes.remove(product)
    made = helper.make_node(
        "MatMulNBits", [product.input[0], CODES, SCALES], list(product.output), name=NODE, domain=CONTRIB,
        K=width, N=num_rows, bits=8, block_size=size, accuracy_level=4,
    )  # fmt: skip
    graph.insert(index, made)
    for cast in [n for n in graph.nodes if n.op_type == "Cast" and n.output[0] == product.input[1]]:
        graph.nodes.remove(cast)
    graph.drop_unused()


def block(width: int) -> int | None:
    """Columns of a block of rows so wide; None where none divides them."""
    return next((size for size in BLOCKS if width % size == 0), None)


def matrix(name: str) -> str:
    """The stored matrix of a widened one."""
    return name.removesuffix("/float32")


def quantize(w_RH: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 `[R, G, size]` and scales float32 `[R, G]`: `w ~= (code - 128) * scale`, the largest at 127."""
    w_RGB = w_RH.reshape(len(w_RH), -1, size)
    scale_RG = np.abs(w_RGB).max(axis=2) / np.float32(STEPS)
    inverse_RG = np.divide(1, scale_RG, out=np.zeros_like(scale_RG), where=scale_RG > 0)
    codes = np.rint(w_RGB * inverse_RG[:, :, None]).clip(-STEPS, STEPS) + MIDDLE
    return codes.astype(np.uint8), scale_RG


def compare(graph: Graph, weight_VH: np.ndarray) -> None:
    """ArtifactError unless every value of the graph's output matrix is within half a step of the artifact's."""
    node = next((n for n in graph.nodes if n.name == NODE), None)
    if node is None or {EMBEDDING, LM_HEAD} & set(node.input):
        raise ArtifactError(f"{graph.folder}: the output matrix is not in 8 bits; export it again")
    codes = graph.array(node.input[1]).astype(np.float32) - MIDDLE
    scales = graph.array(node.input[2]).reshape(codes.shape[:2])
    for rows in _slices(len(codes)):
        found = (codes[rows] * scales[rows][:, :, None]).reshape(codes[rows].shape[0], -1)
        allowed = np.repeat(scales[rows], codes.shape[2], axis=1) * np.float32(0.5 + 1e-4)
        off = np.abs(found - weight_VH[rows].astype(np.float32)) > allowed
        if off.any():
            row, column = np.argwhere(off)[0]
            raise ArtifactError(
                f"{graph.folder}: row {rows.start + row}, column {column} of the output matrix is more than half a "
                "step from the artifact's; export it again"
            )


def _slices(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, num_rows)) for start in range(0, num_rows, _ROWS))
