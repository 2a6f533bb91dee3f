"""The codes that format `onnx-trt` takes."""

from exporters.reader import Layout

LAYOUT = Layout(num_bits=(4,), symmetric=True)
