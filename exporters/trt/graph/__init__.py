"""Our ONNX decoder graph for TensorRT, written node by node: small files, one idea each."""

from compress.errors import ConfigError

try:
    import onnx  # noqa: F401
except ImportError as e:
    raise ConfigError('onnx-trt needs the package onnx; pip install "compress-toolkit[onnx]"') from e
