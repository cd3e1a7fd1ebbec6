"""From learned quantizers to an ONNX file, and what runtimes make of it."""
