"""Files that a student is shipped as: ONNX in float32 or int8, and the compressed form of a sparse network."""

import io
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from policykd.agents.student import Student, packed_weights
from policykd.compression.fine_tuning import FineTuning
from policykd.export.int8 import quantize_static, quantize_weights
from policykd.export.onnx import to_onnx
from policykd.io.files import write_atomically

Quantization = Literal["int8", "int8-static"]
"""int8 weights, computed in float32, as `policykd export` writes them; int8 weights and activations, statically"""

CALIBRATION_STATES = 2000
"""training states that the ranges of int8 activations are taken from"""


def export_student(student: Student, folder: Path, quantization: Quantization | None, tuning: FineTuning) -> Path:
    """Writes a student as `policy.onnx` or, post-training quantized, as `policy.int8.onnx`, and returns the path.

    Raises:
        ValueError: the packages onnx and onnxruntime are not installed.
    """
    # The temperature is folded into the last layer, so that the file gives logits.
    path = folder / ("policy.int8.onnx" if quantization else "policy.onnx")
    content = to_onnx(student.folded_net())
    if quantization:
        to_int8 = quantize_weights if quantization == "int8" else quantize_static
        content = to_int8(content, tuning.calibration_states(CALIBRATION_STATES).numpy())
    write_atomically(path, content)
    return path


def shipped_bytes(student: Student, exported: Path, *, is_quantized: bool, is_sparse: bool) -> int:
    """Returns the size of the file that a student would be shipped as: safetensors, or ONNX if it is quantized.

    Sparse networks are compressed first, into a file next to the exported one, or their zeros would not count.
    """
    content = exported.read_bytes() if is_quantized else packed_weights(student)
    if is_sparse:
        content = zlib.compress(content, 9) if is_quantized else pack_sparse(student)
        write_atomically(exported.with_name(f"{exported.name}.zlib" if is_quantized else "sparse.npz"), content)
    return len(content)


def pack_sparse(student: Student) -> bytes:
    """Returns a sparse network as a compressed `.npz`: a bit per weight, then the weights that are not zero.

    `mask` holds the packed bits of all tensors in the order of their names, `values` the float32 numbers whose bits are
    set. The same weights give the same bytes.
    """
    # By name: a removed parametrization leaves its weight at another place of the state dict.
    flat = np.concatenate([tensor.detach().numpy().ravel() for _, tensor in sorted(student.state_dict().items())])
    mask = flat != 0.0
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=np.packbits(mask), values=flat[mask])
    return buffer.getvalue()
