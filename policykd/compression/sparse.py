"""A sparse network in a file: a bit for every weight that is not zero, then those weights, deflated in an `.npz`.

    mask.npy     uint8, the bits of all tensors one behind the other in the order of a new student's state dict
    values.npy   float32, the numbers behind the bits that are set
    shape.npy    uint8, the student's shape as JSON

NumPy alone reads it, and what is read is bit for bit what was written.
"""

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from policykd.agents.student import Shape, Student
from policykd.io.files import BadFile
from policykd.io.typed import parse_json
from policykd.storage.shards import UNREADABLE, declared_arrays

_MEMBERS = ("mask", "values", "shape")


def pack_sparse(student: Student) -> bytes:
    """Returns the content of a sparse network's file, always the same bytes for the same weights."""
    weights = student.state_dict()
    with torch.device("meta"):  # its order: a parametrisation that was removed leaves weights behind their biases
        names = list(Student(student.shape).state_dict())
    flat = torch.cat([weights[name].detach().cpu().float().flatten() for name in names]).numpy()
    mask = flat != 0.0
    arrays = {
        "mask": np.packbits(mask),
        "values": flat[mask],
        "shape": np.frombuffer(json.dumps(asdict(student.shape)).encode(), np.uint8),
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in _MEMBERS:
            member = io.BytesIO()
            np.lib.format.write_array(member, arrays[name], allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return content.getvalue()


def load_sparse(path: Path) -> Student:
    """Returns the student in a sparse network's file, ready to play.

    Raises:
        BadFile: not such a file, or a damaged one.
    """
    try:
        return _unpacked(path.read_bytes())
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}; make it again") from error
    except (*UNREADABLE, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise BadFile(f"{path}: not a sparse network ({str(error).partition(chr(10))[0]}); make it again") from error


def _unpacked(content: bytes) -> Student:
    declared = declared_arrays(content)
    if set(declared) != set(_MEMBERS) or declared["shape"][1] > (1 << 16,):
        raise ValueError(f"it holds {', '.join(declared)}, expected {', '.join(_MEMBERS)}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        shape = parse_json(Shape, arrays["shape"].tobytes(), "shape")
        with torch.device("meta"):  # no memory is taken for a claim
            num = sum(t.numel() for t in Student(shape).state_dict().values())
        if declared["mask"] != ("uint8", (-(-num // 8),)) or declared["values"][0] != "float32":
            raise ValueError(f"its mask is {declared['mask']}, {num:,} weights need {-(-num // 8):,} bytes")
        mask = np.unpackbits(arrays["mask"], count=num).astype(bool)
        if declared["values"][1] != (int(mask.sum()),):
            raise ValueError(f"{declared['values'][1]} values for {int(mask.sum()):,} bits")
        student = Student(shape)
        state = student.state_dict()
        flat = np.zeros(num, np.float32)
        flat[mask] = arrays["values"]
    parts = torch.from_numpy(flat).split([t.numel() for t in state.values()])
    student.load_state_dict({name: part.view(t.shape) for (name, t), part in zip(state.items(), parts, strict=True)})
    return student.eval()
