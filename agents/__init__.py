"""The `Policy` protocol, teachers from SB3 archives, the Hub and ONNX files, students and their files."""
