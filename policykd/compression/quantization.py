"""Files that a compressed student is deployed as: float32 or int8 ONNX, and the stored form of a sparse network."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from policykd.agents.student import Student, packed_weights
from policykd.compression.fine_tuning import FineTuning
from policykd.export.int8 import quantize_static, quantize_weights
from policykd.export.onnx import to_onnx
from policykd.io.files import write_atomically

Precision = Literal["float32", "int8", "int8-weights"]
"""float32; int8 weights and activations; int8 weights, computed in float32"""

CALIBRATION_STATES = 2000
"""training states that the ranges of int8 activations are taken from"""


def export_student(student: Student, folder: Path, precision: Precision, tuning: FineTuning) -> Path:
    """Writes a student as `policy.onnx` or, post-training quantized, as `policy.int8.onnx`, and returns the path.

    Raises:
        ValueError: the packages onnx and onnxruntime are not installed.
    """
    content = to_onnx(student.folded_net())
    if precision == "float32":
        path = folder / "policy.onnx"
    else:
        path = folder / "policy.int8.onnx"
        quantize = quantize_static if precision == "int8" else quantize_weights
        content = quantize(content, tuning.calibration_states(CALIBRATION_STATES).numpy())
    write_atomically(path, content)
    return path


def stored_size(student: Student, folder: Path, precision: Precision, *, is_sparse: bool) -> int:
    """Returns the size in bytes of the file that a student would be shipped as.

    A dense float32 student is its safetensors file. Sparse networks are written in a compressed form first: int8 ones
    deflated, float32 ones as `sparse.npz`.
    """
    if precision == "float32":
        content = pack_sparse(student) if is_sparse else packed_weights(student)
        name = "sparse.npz"
    else:
        content = (folder / "policy.int8.onnx").read_bytes()
        content = zlib.compress(content, 9) if is_sparse else content
        name = "policy.int8.onnx.zlib"
    if is_sparse:
        write_atomically(folder / name, content)
    return len(content)


def pack_sparse(student: Student) -> bytes:
    """Returns a sparse network as a compressed `.npz`: a bit per weight, then the weights that are not zero.

    `mask` holds the packed bits of all tensors in the order of their names, `values` the float32 numbers whose bits are
    set. The same weights give the same bytes.
    """
    flat = np.concatenate([tensor.detach().numpy().ravel() for _, tensor in sorted(student.state_dict().items())])
    mask = flat != 0.0
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in {"mask": np.packbits(mask), "values": flat[mask]}.items():
            member = io.BytesIO()
            np.save(member, array)
            # A ZipInfo of its own has no time stamp.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return content.getvalue()
