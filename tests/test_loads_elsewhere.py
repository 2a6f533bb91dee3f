"""Other people's code reads what we write.

compressed-tensors comes with the development environment. AutoAWQ and gptqmodel need an environment of their own (see
the README); without them their tests are skipped, loudly.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.formats import awq_gemm, stored
from compress.model import StreamedModel
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.scheme import Scheme
from compress.workspace import resolve

SCHEME = Scheme(group_size=32)


@pytest.fixture
def artifact(build_model: Any, calib_text: Path, tmp_path: Path) -> Path:
    model = build_model("Llama", hidden_size=128, intermediate_size=256, head_dim=32)
    request = AwqRequest(
        source=resolve(str(model)), out=tmp_path / "awq", scheme=SCHEME, calib=str(calib_text), samples=4, seq_len=64
    )
    return quantize_awq(request).out


def test_compressed_tensors_unpacks_our_integers(artifact: Path) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    folder = stored(Checkpoint.open(artifact))
    assert len(folder.layers) == 14
    for layer in folder.layers:
        parts, ours = folder.parts(layer), folder.weight(layer)
        codes, zeros = converters.AutoAWQConverter.unpack_awq(parts["qweight"], parts["qzeros"], 4)
        codes, zeros = converters.AutoAWQConverter.reverse_awq_order(codes, zeros, 4)
        assert torch.equal((codes & 15).t().to(torch.uint8), ours.codes_OI)
        assert torch.equal((zeros & 15).t().to(torch.uint8), ours.zero_point_OG)


def test_autoawq_packs_the_same_bits(artifact: Path) -> None:
    gemm = pytest.importorskip("awq.modules.linear.gemm", reason="AUTOAWQ ABSENT: this check did not run")
    folder = stored(Checkpoint.open(artifact))
    for layer in folder.layers[:4]:
        parts, ours = folder.parts(layer), folder.weight(layer)
        linear = torch.nn.Linear(ours.codes_OI.shape[1], ours.codes_OI.shape[0], bias=False)
        linear.weight.data = ours.dequantize(torch.float32).half()
        theirs = gemm.WQLinear_GEMM.from_linear(
            linear.half(), 4, 32, scales=ours.scale_OG.t().contiguous(), zeros=ours.zero_point_OG.t().contiguous().int()
        )
        for suffix in awq_gemm.LEAVES:
            assert torch.equal(getattr(theirs, suffix), parts[suffix]), (layer, suffix)


def test_transformers_computes_our_logits(artifact: Path) -> None:
    """Through gptqmodel's CPU kernel, which is what transformers 5 loads AWQ folders with."""
    pytest.importorskip("gptqmodel", reason="GPTQMODEL ABSENT: this check did not run")
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel.open(artifact)
    with torch.no_grad():
        hidden = streamed.embed(ids)
        for i in range(streamed.num_blocks):
            streamed.load_block(i)
            hidden = streamed.run_block(i, hidden)
        ours = streamed.head(hidden)
        model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float16, device_map="cpu").eval()
        theirs = model(ids).logits.float()
    quantized = [m for m in model.modules() if "awq" in type(m).__name__.lower() or "Quant" in type(m).__name__]
    assert len(quantized) >= 14, "transformers did not load the layers as quantized"
    # float16 arithmetic against float32
    assert float((theirs - ours).abs().max()) < 0.02 * float(ours.abs().max())


def test_transformers_weights_are_ours_when_dequantized(artifact: Path) -> None:
    """Our own reader against the plain formula, tensor by tensor (needs no other package)."""
    checkpoint = Checkpoint.open(artifact)
    folder = stored(checkpoint)
    layer = folder.layers[0]
    dense = folder.dense(layer)
    words = checkpoint.tensor(f"{layer}.qweight")
    scale = checkpoint.tensor(f"{layer}.scales").float()
    zeros = checkpoint.tensor(f"{layer}.qzeros")
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    for k, n in ((0, 0), (5, 3), (37, 17), (127, 127)):
        shift = 4 * order[n % 8]
        code = (int(words[k, n // 8]) >> shift) & 15
        zero = (int(zeros[k // 32, n // 8]) >> shift) & 15
        assert float(dense[n, k]) == pytest.approx((code - zero) * float(scale[k // 32, n]))
