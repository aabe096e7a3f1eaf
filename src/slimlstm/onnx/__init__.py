"""Read, compress and write ONNX graphs."""
