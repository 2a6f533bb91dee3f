"""The codes that format `onnx-trt` takes. TensorRT's INT8 has one scale a row (its blocks are INT4's and floats') and,
for inputs, one range for all tokens; neither has zero points.
"""

from exporters.reader import Layout

LAYOUT = Layout(num_bits=(4,), symmetric=True, w8_group_sizes=(-1,), w8a8=("a8-static",))
