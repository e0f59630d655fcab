"""A network as one `.npz` for `policykd/export/numpy_policy.py`: weights, and the list of layers as JSON."""

import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from policykd.agents.networks import MLP, FrameNet
from policykd.export import numpy_policy
from policykd.export.layers import Layer, layers_of

_SAID = [field.name for field in fields(Layer) if field.name not in ("weight", "bias")]


def to_npz(net: FrameNet | MLP, *, actions: Sequence[str] = ()) -> bytes:
    """Returns the content of an `.npz` that `numpy_policy.load` reads; the same bytes for the same weights.

    Args:
        net: whose weights; a student's `folded_net()`.
        actions: what they are called.

    Raises:
        ValueError: a network whose layers are not known.
    """
    layers = layers_of(net)
    arrays = {f"{layer.name}.{kind}": getattr(layer, kind) for layer in layers for kind in ("weight", "bias")}
    about = {
        "format": numpy_policy.FORMAT,
        "obs_shape": list(net.obs_shape),
        "num_actions": net.num_actions,
        "actions": list(actions),
        "layers": [{key: getattr(layer, key) for key in _SAID} for layer in layers],
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(buffer, about=text, **{name: t.numpy() for name, t in arrays.items() if t is not None})
    return buffer.getvalue()


def runtime() -> bytes:
    """Returns the module that plays it, to be copied beside it."""
    return Path(numpy_policy.__file__).read_bytes()
