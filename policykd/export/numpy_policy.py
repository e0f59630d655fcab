"""Runs a policy with NumPy alone. Copy this file and the policy's `.npz`; nothing else is needed.

    from numpy_policy import load

    policy = load("student.npz")
    logits = policy(obs)      # obs: uint8 (4, 84, 84), newest frame last, or a batch of them; float32 (num_actions,)
    action = policy.act(obs)  # the best action; deterministic=False, rng=... samples one from the policy

The `.npz` holds numbers and a list of layers; loading it executes nothing. A call does not change the policy, so
threads may share it. Suffixes name dimensions: N batch, H W C an image, G groups, K inputs of a filter, O outputs.
"""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

FORMAT = 1
# A zip of a hundred bytes may claim any size, and a description any shape: these bounds are checked before allocating.
MAX_BYTES = 64 << 20
MAX_NUMBERS = 1 << 24  # that one layer works on for one observation
MAX_LAYERS = 200

Step = Callable[..., np.ndarray]
Description = dict[str, Any]  # JSON of a layer, or of the whole policy: `load` reports whatever is wrong in it


class Policy:
    """A map from observations to logits or Q-values; made by `load`."""

    def __init__(self, about: Description, weights: dict[str, np.ndarray]) -> None:
        """Builds the layers of a description; `load` reports what is wrong with it."""
        self.about = about
        self.obs_shape: tuple[int, ...] = tuple(about["obs_shape"])
        self.num_actions: int = about["num_actions"]
        if not all(type(n) is int and n > 0 for n in self.obs_shape) or math.prod(self.obs_shape) > MAX_NUMBERS // 16:
            raise ValueError(f"observations of shape {self.obs_shape}")
        self.dtype = np.dtype(np.uint8 if len(self.obs_shape) == 3 else np.float32)
        layers = about["layers"]
        if len(layers) > MAX_LAYERS:
            raise ValueError("too many layers")
        # A blank observation passes through every layer as it is built, which shows the next layer its input's shape.
        values = {"obs": self._to_floats(np.zeros((1, *self.obs_shape), self.dtype))}
        image_shapes: dict[str, tuple[int, ...]] = {}  # (H, W, C) of what a `flatten` gives
        self._steps: list[tuple[Step, tuple[str, ...], str]] = []
        for layer in layers:
            inputs = [values[name] for name in layer["takes"]]
            _check_size(layer, weights, inputs)
            source = layer["takes"][0]
            if layer["operator"] == "flatten":
                image_shapes[layer["gives"]] = inputs[0].shape[1:]
            step = _make_step(layer, weights, image_shapes.get(source, ()))
            values[layer["gives"]] = step(*inputs)
            self._steps.append((step, tuple(layer["takes"]), layer["gives"]))
        if values["scores"].shape != (1, self.num_actions):
            raise ValueError(f"outputs of shape {values['scores'].shape}, expected {(1, self.num_actions)}")

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Returns logits or Q-values, float32: `(num_actions,)` of one observation, `(batch, num_actions)` of a batch.

        Raises:
            ValueError: observations of another shape, dtype or layout, or not finite.
        """
        self._check(obs)
        is_single = obs.shape == self.obs_shape
        if not len(obs):
            return np.zeros((0, self.num_actions), np.float32)
        # Values live in a local dict, so that several threads can call the same policy.
        values = {"obs": self._to_floats(obs[None] if is_single else obs)}
        for step, takes, gives in self._steps:
            values[gives] = step(*[values[name] for name in takes])
        return values["scores"][0] if is_single else values["scores"]

    def act(self, obs: np.ndarray, *, deterministic: bool = True, rng: np.random.Generator | None = None) -> Any:
        """Returns the action of one observation, an int, or those of a batch, int64 `(batch,)`.

        Args:
            obs: as in a call.
            deterministic: take the best action, the first of equals; otherwise sample from softmax(logits).
            rng: generator for sampling.

        Raises:
            ValueError: as in a call; sampling without `rng`.
        """
        logits = self(obs)
        if not deterministic:
            if rng is None:
                raise ValueError("sampling needs a generator: rng=numpy.random.default_rng(seed)")
            logits = logits + rng.gumbel(size=logits.shape)  # the maximum is then distributed as softmax(logits)
        return int(logits.argmax()) if logits.ndim == 1 else logits.argmax(axis=1)

    def _to_floats(self, obs: np.ndarray) -> np.ndarray:
        """Returns a batch as float32, frames as `(N, H, W, C)`; bytes are moved before they grow to floats."""
        if len(self.obs_shape) == 3:
            obs = np.ascontiguousarray(obs.transpose(0, 2, 3, 1))
        return obs.astype(np.float32)

    def _check(self, obs: np.ndarray) -> None:
        expected = f"expected {self.dtype} {self.obs_shape} or a batch of them"
        if len(self.obs_shape) == 3:
            expected += ": grey frames from 0 to 255, channels first, newest last"
        if not isinstance(obs, np.ndarray):
            raise ValueError(f"observations are {type(obs).__name__}, {expected}")
        has_right_dtype = obs.dtype == np.uint8 if len(self.obs_shape) == 3 else obs.dtype.kind == "f"
        if not has_right_dtype or self.obs_shape not in (obs.shape, obs.shape[1:]):
            raise ValueError(f"observations are {obs.dtype} {obs.shape}, {expected}")
        if obs.dtype.kind == "f" and not np.isfinite(obs).all():
            raise ValueError(f"observations are NaN or infinite, {expected}, all finite")


def load(path: str | Path) -> Policy:
    """Returns the policy in an `.npz` that policykd exported.

    Raises:
        ValueError: damaged, foreign or unsafe; one line that names the file.
        OSError: not readable.
    """
    try:
        # np.load would decompress a bomb before anybody can look at it; the directory of the zip states the sizes.
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, the maximum is {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r:.20}, this numpy_policy.py reads {FORMAT}")
            weights = {name: arrays[name] for name in arrays.files if name != "about"}
        # A NaN among the weights would become action 0 in every state.
        if not all(w.dtype == np.float32 and np.isfinite(w).all() for w in weights.values()):
            raise ValueError("weights that are not finite float32 numbers")
        return Policy(about, weights)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = " ".join(f"{error or type(error).__name__}".split())[:150]
        raise ValueError(f"{path}: not a valid policy of policykd ({reason}); export it again") from error


def _check_size(layer: Description, weights: dict[str, np.ndarray], inputs: list[np.ndarray]) -> None:
    """Raises ValueError for a layer that would take more memory for one observation than any policy does."""
    if not all(0 <= layer[key] <= 84 for key in ("kernel", "stride", "padding", "groups")):
        raise ValueError("a layer of invalid geometry")
    if len({x.shape for x in inputs}) > 1:
        raise ValueError("a sum of different shapes")
    if layer["operator"] in ("conv", "average_pool", "max_pool"):
        *sides, channels = inputs[0].shape[1:]
        num_outputs = channels
        kernel = layer["kernel"]
        if layer["operator"] == "conv":
            num_outputs, _, kernel, _ = weights[f"{layer['name']}.weight"].shape
        places = math.prod(side + 2 * layer["padding"] for side in sides) // max(1, layer["stride"]) ** 2
        if places * max(num_outputs, kernel * kernel * channels) > MAX_NUMBERS:
            raise ValueError("a layer that is too large")


def _make_step(layer: Description, weights: dict[str, np.ndarray], image_shape: tuple[int, ...]) -> Step:
    """Returns a layer as a function of arrays `(N, H, W, C)` or `(N, K)`.

    `image_shape` is the `(H, W, C)` before `flatten` of a dense layer, whose weights are in the order (C, H, W).
    """
    operator = layer["operator"]
    weight = weights.get(f"{layer['name']}.weight")
    bias: Any = weights.get(f"{layer['name']}.bias", np.float32(0.0))
    if operator in ("average_pool", "max_pool"):
        return _pool(layer)
    if operator == "conv":
        assert weight is not None
        return _conv(layer, weight, bias)
    if operator == "dense":
        assert weight is not None
        # The rows of images are (H, W, C) here; reordering the weights once saves a transposition per call.
        if len(image_shape) == 3:
            height, width, channels = image_shape
            weight = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        weight_KO = np.ascontiguousarray(weight.T)
        return lambda x: x @ weight_KO + bias
    zero = np.float32(0.0)
    alpha = np.float32(layer["alpha"])
    steps: dict[str, Step] = {
        "relu": lambda x: np.maximum(x, zero),
        "elu": lambda x: np.where(x > zero, x, alpha * np.expm1(np.minimum(x, zero))),
        "leaky_relu": lambda x: np.where(x > zero, x, alpha * x),
        "tanh": np.tanh,
        "flatten": lambda x: x.reshape(len(x), -1),
        "add": lambda x, y: x + y,
    }
    return steps[operator]


def _pool(layer: Description) -> Step:
    kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
    is_max = layer["operator"] == "max_pool"

    def pool(x: np.ndarray) -> np.ndarray:
        patches = _patches(x, kernel, stride, padding, -np.inf if is_max else 0.0)
        # A sum over few strided views is faster than a reduction over the two axes of the window.
        views = [patches[:, :, :, i, j] for i in range(kernel) for j in range(kernel)]
        pooled = views[0].copy()
        for view in views[1:]:
            (np.maximum if is_max else np.add)(pooled, view, out=pooled)
        return pooled if is_max else pooled / np.float32(kernel * kernel)

    return pool


def _conv(layer: Description, weight: np.ndarray, bias: Any) -> Step:
    """Returns a convolution as one matrix product per group, over the patches under the filters."""
    kernel, stride, padding, groups = weight.shape[2], layer["stride"], layer["padding"], layer["groups"]
    num_outputs = len(weight)
    weight_KGO = weight.transpose(2, 3, 1, 0).reshape(-1, groups, num_outputs // groups)
    weight_GKO = np.ascontiguousarray(weight_KGO.swapaxes(0, 1))

    def conv(x: np.ndarray) -> np.ndarray:
        patches = _patches(x, kernel, stride, padding, 0.0)
        size = patches.shape[:3]
        if groups == 1:
            flat = patches.reshape(math.prod(size), -1).dot(weight_GKO[0])
        else:  # each group of filters sees its own channels
            parts = patches.reshape(math.prod(size), kernel * kernel, groups, -1).transpose(2, 0, 1, 3)
            flat = (parts.reshape(groups, math.prod(size), -1) @ weight_GKO).transpose(1, 0, 2)
        return np.asarray(flat.reshape(*size, num_outputs) + bias)

    return conv


def _patches(x: np.ndarray, kernel: int, stride: int, padding: int, fill: float) -> np.ndarray:
    """Returns what lies under a window at each place, a view `(N, H, W, kernel, kernel, C)`."""
    n, h, w, c = x.shape
    # np.pad and sliding_window_view would be shorter, but a policy's call would take 1.1 to 1.4 times as long: the
    # shortest calls for Pong's teacher and students, both ways in turns in one process.
    if padding:
        padded = np.full((n, h + 2 * padding, w + 2 * padding, c), fill, np.float32)
        padded[:, padding : padding + h, padding : padding + w] = x
        x = padded
    n, h, w, c = x.shape
    x = np.ascontiguousarray(x)
    by_n, by_h, by_w, by_c = x.strides
    shape = (n, 1 + (h - kernel) // stride, 1 + (w - kernel) // stride, kernel, kernel, c)
    return as_strided(x, shape, (by_n, stride * by_h, stride * by_w, by_h, by_w, by_c), writeable=False)
