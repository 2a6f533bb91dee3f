"""Finished blocks on disk: read back as they were, and not believed when anything about them is off."""

from pathlib import Path

import torch

from compress.block import BlockResult
from compress.formats import compressed_tensors
from compress.journal import Journal
from compress.plan import ActivationScheme, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme

PREFIX = "model.layers.3."
W8 = Scheme(num_bits=8, group_size=-1, symmetric=True)
PLAN = LayerPlan(
    {
        f"{PREFIX}up": LayerScheme(weight=W8, input=ActivationScheme(dynamic=False, symmetric=False)),
        f"{PREFIX}down": LayerScheme(weight=W8),
    }
)


def block() -> BlockResult:
    generator = torch.Generator().manual_seed(0)

    def weight() -> QuantizedWeight:
        return QuantizedWeight(
            codes_OI=torch.randint(0, 256, (8, 16), dtype=torch.uint8, generator=generator),
            scale_OG=torch.rand(8, 1, generator=generator).bfloat16() + 0.5,
            zero_point_OG=torch.full((8, 1), 128, dtype=torch.uint8),
            scheme=W8,
        )

    static = StaticInput(scale=torch.tensor([0.25]), zero_point=torch.tensor([7], dtype=torch.uint8))
    return BlockResult(
        quantized={"up": weight(), "down": weight()},
        dense={"norm.weight": torch.ones(4, dtype=torch.bfloat16), "up.bias": torch.zeros(8)},
        inputs={"up": static},
        report={"layers": [1, 2]},
    )


def journal(folder: Path, run: str = "run") -> Journal:
    return Journal(folder, run, compressed_tensors, PLAN)


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    journal(tmp_path).save(3, PREFIX, block())
    found, meant = journal(tmp_path).load(3), block()
    assert found is not None and found.report == meant.report
    assert found.quantized.keys() == meant.quantized.keys() and found.dense.keys() == meant.dense.keys()
    for name, q in meant.quantized.items():
        assert torch.equal(found.quantized[name].codes_OI, q.codes_OI)
        assert torch.equal(found.quantized[name].scale_OG, q.scale_OG)
    assert all(torch.equal(found.dense[name], value) for name, value in meant.dense.items())
    assert list(found.inputs) == ["up"]
    assert torch.equal(found.inputs["up"].scale, torch.tensor([0.25])) and int(found.inputs["up"].zero_point) == 7


def test_what_cannot_be_believed_is_not_there(tmp_path: Path) -> None:
    one = journal(tmp_path)
    assert one.load(3) is None
    one.save(3, PREFIX, block())
    assert one.load(4) is None and journal(tmp_path, "another run").load(3) is None
    one.record_path(3).rename(one.record_path(4))
    one.tensors_path(3).rename(one.tensors_path(4))
    assert one.load(4) is None, "a block under another's number"
    one.save(3, PREFIX, block())
    data = one.tensors_path(3).read_bytes()
    one.tensors_path(3).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert one.load(3) is None, "one bit of a tensor"
    one.tensors_path(3).write_bytes(data)
    assert one.load(3) is not None
    text = one.record_path(3).read_text()
    one.record_path(3).write_text(text.replace('"layers": [\n    1', '"layers": [\n    9'))
    assert one.record_path(3).read_text() == text or one.load(3) is None, "one number of the record"
    one.record_path(3).write_text(text[: len(text) // 2])
    assert one.load(3) is None, "half a record"
