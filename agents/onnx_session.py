"""ONNX Runtime sessions, with one set of options for the whole package; needs onnxruntime alone, not torch."""

from typing import Any


def open_session(content: bytes, num_threads: int) -> Any:
    """Returns ONNX Runtime's session of a graph that `read_onnx_graph` accepted, or that policykd made, on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Spinning threads would take the cores from the emulators between two calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    # Without this the runtime reads content that begins with ORTM in another format than the one that was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def backend() -> str:
    """Returns the runtime's name and version, for the record: another one's outputs differ in the last bits."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"
