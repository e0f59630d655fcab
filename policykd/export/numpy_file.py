"""Writes the `.npz` that `numpy_policy.py` reads: weights, and the list of layers as JSON."""

import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from policykd.agents.networks import Net
from policykd.export import numpy_policy
from policykd.export.layers import Layer, layers_of

_DESCRIBED = [field.name for field in fields(Layer) if field.name not in ("weight", "bias")]


def to_npz(net: Net, *, actions: Sequence[str] = ()) -> bytes:
    """Returns the content of an `.npz` for `numpy_policy.load`; the same bytes for the same weights.

    Args:
        net: the network, such as a student's `folded_net()`.
        actions: meaning of each action, for the reader.

    Raises:
        ValueError: a module of the user's, whose layers are unknown.
    """
    layers = layers_of(net)
    about = {
        "format": numpy_policy.FORMAT,
        "obs_shape": list(net.obs_shape),
        "num_actions": net.num_actions,
        "actions": list(actions),
        "layers": [{name: getattr(layer, name) for name in _DESCRIBED} for layer in layers],
    }
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for layer in layers:
        arrays |= layer.arrays
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def numpy_runtime() -> bytes:
    """Returns the source of `numpy_policy.py`, which is shipped with the `.npz`."""
    return Path(numpy_policy.__file__).read_bytes()
