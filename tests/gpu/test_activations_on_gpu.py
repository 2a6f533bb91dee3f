"""Integer products on a GPU: exact for full-range codes, and the same output as on the CPU."""

import pytest
import torch

from compress.activations import integer_product, linear, quantize_inputs
from compress.plan import ActivationScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: integer products were not run on a GPU"),
]


@pytest.mark.parametrize("num_tokens", [1, 17, 300])
@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (5, 7), (512, 5000), (4096, 4096)])
def test_products_are_exact(num_tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    q_TI, w_OI = (
        torch.randint(-128, 128, (n, columns), generator=generator, dtype=torch.int8) for n in (num_tokens, rows)
    )
    found = integer_product(q_TI.cuda(), w_OI.cuda()).cpu()
    assert found.dtype == torch.int32 and torch.equal(found, integer_product(q_TI, w_OI))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_linear_is_that_of_the_cpu(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(40, 256, generator=generator)
    weight = QuantizedWeight(
        codes_OI=torch.randint(0, 256, (64, 256), dtype=torch.uint8, generator=generator),
        scale_OG=torch.rand(64, 1, generator=generator) + 0.5,
        zero_point_OG=torch.full((64, 1), 128, dtype=torch.uint8),
        scheme=Scheme(num_bits=8, group_size=-1, symmetric=True),
    )
    scheme = ActivationScheme(symmetric=symmetric)
    here, there = (linear(x, weight, None, quantize_inputs(x, scheme)).cpu() for x in (x_TI, x_TI.cuda()))
    # a tie may round the other way on the other device, which moves one code of 255
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))
