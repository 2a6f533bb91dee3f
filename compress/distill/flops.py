"""Operations of a training step, and what a GPU could do: model FLOPs utilisation (MFU).

Counted are the products with weights, two operations each: 2 N forward and 4 N backward for the student (2 N if its
matrices are frozen, as under LoRA), 2 N for a teacher that is run, N being the parameters of matrices that a token is
multiplied with (all but the input embedding). Attention's own products, recomputation and the losses' second pass are
not counted, so the figure is on the low side of other definitions.
"""

from __future__ import annotations

from torch import nn

# Dense 16-bit matrix products with float32 sums, TFLOP/s, from NVIDIA's datasheets; the first name that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "H20": 148.0, "B200": 2250.0, "GH200": 989.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Operations a second of a GPU by its name, None for one that is not in the table."""
    found = next((value for name, value in PEAK_TFLOPS.items() if name in device_name), None)
    return None if found is None else found * 1e12


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that every token is multiplied with: matrices, without an input embedding that is only looked up."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embedding.weight
    total = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    return int(total if tied else total - embedding.weight.numel())


def per_token(student: nn.Module, teacher: nn.Module | None, *, frozen: bool = False) -> float:
    """Operations for one token of training. teacher: None where it is not run. frozen: matrices take no gradient."""
    mine = (4 if frozen else 6) * matrix_parameters(student)
    return float(mine + (0 if teacher is None else 2 * matrix_parameters(teacher)))
