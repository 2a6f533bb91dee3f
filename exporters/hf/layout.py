"""The codes that format `hf` takes: what vLLM's AWQ and compressed-tensors readers do, in groups that Marlin has.

What vLLM computes on which card is checked in `vllm_rules`.
"""

from exporters.reader import Layout

LAYOUT = Layout(
    num_bits=(4,),
    group_sizes=(128, 64, 32, -1),
    w8_group_sizes=None,
    w8a8=("a8", "a8-asym", "a8-static", "a8-asym-static"),
)
