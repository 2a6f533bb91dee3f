"""Our ONNX decoder graph for TensorRT, written node by node: small files, one idea each."""
