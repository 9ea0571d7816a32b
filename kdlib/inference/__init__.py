"""A trained student at work: its folder, the libraries that run it, and the mask of a new scan."""

FORMATS = ("onnx", "openvino", "openvino-int8", "bundle")  # that a student can be exported to
