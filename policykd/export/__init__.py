"""Policies as files that run without policykd: ONNX, int8, NumPy, C99 and SB3, each validated on real states."""
