"""Plays a policy with NumPy alone. This file and the policy's `.npz` are all that is needed; copy both.

    from numpy_policy import load

    policy = load("student.npz")
    scores = policy(obs)      # uint8 (4, 84, 84), newest frame last: float32 (num_actions,); or a batch of them
    action = policy.act(obs)  # the best one's number, or one drawn from the policy with deterministic=False, rng=...

Nothing in the `.npz` is executed: it holds numbers and a list of layers. A call changes nothing in the policy, so that
threads may share it. Suffixes name dimensions: N batch, H W C an image, G groups, K what a filter sees, O outputs.
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
MAX_BYTES = 64 << 20
"""of all arrays together; a hundred bytes of a zip may claim any number"""
MAX_NUMBERS, MAX_LAYERS = 1 << 24, 200
"""of what a layer works on for one observation; a description may claim any shape"""

Step = Callable[..., np.ndarray]


class Policy:
    """Scores actions; made by `load`."""

    def __init__(self, about: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        """Takes the description of the layers and their weights by name; `load` says what is wrong with them."""
        self.about = about
        self.obs_shape: tuple[int, ...] = tuple(about["obs_shape"])
        self.num_actions: int = about["num_actions"]
        if not all(type(n) is int and n > 0 for n in self.obs_shape) or math.prod(self.obs_shape) > MAX_NUMBERS // 16:
            raise ValueError("observations of a shape that no policy has")
        self.dtype = np.dtype(np.uint8 if len(self.obs_shape) == 3 else np.float32)
        layers = about["layers"]
        if len(layers) > MAX_LAYERS or not all(
            0 <= layer[key] <= 84 for layer in layers for key in ("kernel", "stride", "padding", "groups")
        ):
            raise ValueError("a layer of no size that a policy has")
        uses = [name for layer in layers for name in layer["takes"]]
        values = {"obs": np.zeros((1, *self.obs_shape), self.dtype)}
        self._steps: list[tuple[Step, tuple[str, ...], str]] = []
        for layer in layers:  # each is built for the shapes that a first observation has there
            taken = [values[name] for name in layer["takes"]]
            alone = all(uses.count(name) == 1 and name != "obs" for name in layer["takes"])
            flat = next((made["takes"][0] for made in layers if made["gives"] == layer["takes"][0]), "")
            before = values[flat].shape[1:] if layer["operator"] == "dense" and flat else ()
            step = _built(layer, weights, taken, in_place=alone, image=before if len(before) == 3 else ())
            _check_size(layer, weights, taken)
            values[layer["gives"]] = step(*taken)
            self._steps.append((step, tuple(layer["takes"]), layer["gives"]))
        if values["scores"].shape != (1, self.num_actions):
            raise ValueError(f"scores of {values['scores'].shape}, expected {(1, self.num_actions)}")

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Returns scores, float32 `(num_actions,)` of one observation, `(batch, num_actions)` of a batch.

        Raises:
            ValueError: observations of another shape, kind or layout, or not finite.
        """
        self._check(obs)
        is_one = obs.shape == self.obs_shape
        rows = np.ascontiguousarray(obs[None] if is_one else obs, self.dtype)
        if not len(rows):
            return np.zeros((0, self.num_actions), np.float32)
        values = {"obs": rows}
        for step, takes, gives in self._steps:
            values[gives] = step(*[values[name] for name in takes])
        scores = values["scores"]
        return scores[0] if is_one else scores

    def act(self, obs: np.ndarray, *, deterministic: bool = True, rng: np.random.Generator | None = None) -> Any:
        """Returns the action of one observation, an int, or those of a batch, int64 `(batch,)`.

        Args:
            obs: as in a call.
            deterministic: the best action, the first of equals; else one drawn from softmax(scores).
            rng: draws the actions.

        Raises:
            ValueError: as in a call; actions to be drawn and nothing that draws.
        """
        scores = self(obs)
        if not deterministic:
            if rng is None:
                raise ValueError("drawn actions need a source of chance: rng=numpy.random.default_rng(seed)")
            scores = scores + rng.gumbel(size=scores.shape)
        return int(scores.argmax()) if scores.ndim == 1 else scores.argmax(axis=1)

    def _check(self, obs: np.ndarray) -> None:
        found = f"{obs.dtype} {obs.shape}" if isinstance(obs, np.ndarray) else type(obs).__name__
        expected = f"expected {self.dtype} {self.obs_shape} or a batch of them"
        if len(self.obs_shape) == 3:
            expected += ": grey frames from 0 to 255, channels first, newest last"
            right_kind = isinstance(obs, np.ndarray) and obs.dtype == np.uint8
        else:
            right_kind = isinstance(obs, np.ndarray) and obs.dtype.kind == "f"
        if not right_kind or self.obs_shape not in (obs.shape, obs.shape[1:]):
            raise ValueError(f"observations are {found}, {expected}")
        if obs.dtype.kind == "f" and not np.isfinite(obs).all():
            raise ValueError(f"observations are NaN or infinite, {expected}, all finite")


def load(path: str | Path) -> Policy:
    """Returns the policy of an `.npz` that policykd exported.

    Raises:
        ValueError: damaged, foreign or unsafe; one line that names the file.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as members:
            if (size := sum(member.file_size for member in members.infolist())) > MAX_BYTES:
                raise ValueError(f"{size:,} bytes, a policy has at most {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r:.20}, this numpy_policy.py reads {FORMAT}")
            weights = {name: arrays[name] for name in arrays.files if name != "about"}
        if not all(w.dtype == np.float32 and np.isfinite(w).all() for w in weights.values()):
            raise ValueError("weights that are not finite float32 numbers")
        return Policy(about, weights)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or foreign file leads to
        reason = " ".join(f"{error or type(error).__name__}".split())[:150]
        raise ValueError(f"{path}: not an intact policy of policykd ({reason}); export it again") from error


def _check_size(layer: dict[str, Any], weights: dict[str, np.ndarray], taken: list[np.ndarray]) -> None:
    """Raises ValueError where one observation would take more memory in a layer than any policy's does."""
    shape = taken[0].shape[1:]
    if layer["operator"] in ("conv", "average_pool", "max_pool"):
        channels, *sides = shape if taken[0].dtype == np.uint8 else (shape[2], *shape[:2])
        weight = weights.get(f"{layer['name']}.weight") if layer["operator"] == "conv" else None
        num_outputs, kernel = (channels, layer["kernel"]) if weight is None else (len(weight), weight.shape[2])
        places = math.prod(side + 2 * layer["padding"] for side in sides) // max(1, layer["stride"]) ** 2
        if places * max(num_outputs, kernel * kernel * channels) > MAX_NUMBERS:
            raise ValueError("a layer of a size that no policy has")
    if len({x.shape for x in taken}) > 1:
        raise ValueError("a sum of different shapes")


def _built(
    layer: dict[str, Any],
    weights: dict[str, np.ndarray],
    taken: list[np.ndarray],
    *,
    in_place: bool,
    image: tuple[int, ...],
) -> Step:
    """Returns a layer as a function of arrays `(N, H, W, C)` or `(N, K)`; only frames themselves are `(N, C, H, W)`.

    Args:
        layer: its description.
        weights: by name.
        taken: what it gets from the first observation.
        in_place: whether nobody else needs what it takes.
        image: `(H, W, C)` of what was flattened into a dense layer's input, whose weights count (C, H, W).
    """
    operator = layer["operator"]
    if operator in ("conv", "average_pool", "max_pool"):
        is_frames = taken[0].dtype == np.uint8
        if operator == "conv":
            weight, bias = weights[f"{layer['name']}.weight"], weights.get(f"{layer['name']}.bias")
            return _conv(layer, weight, np.float32(0.0) if bias is None else bias, taken[0], is_frames)
        return _pool(layer, is_frames)
    if operator == "dense":
        weight, bias = weights[f"{layer['name']}.weight"], weights.get(f"{layer['name']}.bias")
        if image:
            height, width, channels = image
            weight = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        weight_KO = np.ascontiguousarray(weight.T)
        return (lambda x: x @ weight_KO) if bias is None else (lambda x: x @ weight_KO + bias)
    return _pointwise(operator, np.float32(layer["alpha"]), in_place)


def _pointwise(operator: str, alpha: np.float32, in_place: bool) -> Step:
    zero = np.float32(0.0)
    steps: dict[str, Step] = {
        "relu": lambda x: np.maximum(x, zero, out=x if in_place else None),
        "elu": lambda x: np.where(x > zero, x, alpha * np.expm1(np.minimum(x, zero))),
        "leaky_relu": lambda x: np.where(x > zero, x, alpha * x),
        "tanh": np.tanh,
        "flatten": lambda x: x.reshape(len(x), -1),
        "add": lambda x, y: x + y,
    }
    return steps[operator]


def _pool(layer: dict[str, Any], is_frames: bool) -> Step:
    kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
    is_max = layer["operator"] == "max_pool"

    def pool(x: np.ndarray) -> np.ndarray:
        x = _channels_last(x) if is_frames else x
        x = _padded(x, padding, -np.inf if is_max else 0.0)
        height, width = (1 + (size - kernel) // stride for size in x.shape[1:3])
        rows = [slice(i, i + stride * (height - 1) + 1, stride) for i in range(kernel)]
        columns = [slice(j, j + stride * (width - 1) + 1, stride) for j in range(kernel)]
        parts = [x[:, row, column] for row in rows for column in columns]
        pooled = parts[0].astype(np.float32)
        for part in parts[1:]:
            (np.maximum if is_max else np.add)(pooled, part, out=pooled)
        return pooled if is_max else pooled / np.float32(kernel * kernel)

    return pool


def _conv(layer: dict[str, Any], weight: np.ndarray, bias: Any, x: np.ndarray, is_frames: bool) -> Step:
    kernel, stride, padding, groups = weight.shape[2], layer["stride"], layer["padding"], layer["groups"]
    width = x.shape[3] if is_frames else x.shape[2]
    if kernel % stride == 0 and stride > 1 and groups == 1 and padding == 0:
        words = is_frames and stride % 4 == 0 and width % 4 == 0
        return _block_conv(weight, bias, kernel, stride, is_frames, words)
    num_outputs = len(weight)
    inside_KGO = weight.transpose(2, 3, 1, 0).reshape(-1, groups, num_outputs // groups)  # row by row, channels last
    weight_GKO = np.ascontiguousarray(inside_KGO.swapaxes(0, 1))

    def conv(x: np.ndarray) -> np.ndarray:
        x = _padded(_channels_last(x).astype(np.float32) if is_frames else x, padding, 0.0)
        patches = _patches(x, kernel, stride)  # (N, H, W, kernel, kernel, C)
        size = patches.shape[:3]
        if groups == 1:
            return np.asarray(
                patches.reshape(math.prod(size), -1).dot(weight_GKO[0]).reshape(*size, num_outputs) + bias
            )
        parts = patches.reshape(*size, kernel * kernel, groups, -1).transpose(4, 0, 1, 2, 3, 5)
        out_GNO = parts.reshape(groups, math.prod(size), -1) @ weight_GKO
        out: np.ndarray = out_GNO.transpose(1, 0, 2).reshape(*size, num_outputs) + bias
        return out

    return conv


def _block_conv(weight: np.ndarray, bias: Any, kernel: int, stride: int, is_frames: bool, words: bool) -> Step:
    """Returns a convolution whose kernel is a few strides wide as one product of blocks, each seen once, and sums.

    Patches overlap: as a matrix they are four times as many numbers as there are pixels. Blocks of `stride` by `stride`
    pixels do not; each is multiplied with all the parts of the filters that may lie on it.
    """
    num_outputs, channels = weight.shape[:2]
    across = kernel // stride  # blocks under a filter
    parts = weight.reshape(num_outputs, channels, across, stride, across, stride)
    order = (1, 3, 5, 2, 4, 0) if is_frames else (3, 5, 1, 2, 4, 0)
    weight_KO = np.ascontiguousarray(parts.transpose(order).reshape(channels * stride * stride, -1))
    shifts = [(i, j) for i in range(across) for j in range(across)]

    def conv(x: np.ndarray) -> np.ndarray:
        if is_frames:  # bytes change places four at a time
            rows = x.view(np.uint32) if words else x
            step = stride // 4 if words else stride
            n, c, h, w = rows.shape
            h, w = h // stride, w // step
            rows = rows[:, :, : h * stride, : w * step].reshape(n, c, h, stride, w, step).transpose(0, 2, 4, 1, 3, 5)
            blocks = np.ascontiguousarray(rows).view(np.uint8).reshape(n * h * w, -1).astype(np.float32)
        else:
            n, h, w, c = x.shape
            h, w = h // stride, w // stride
            rows = x[:, : h * stride, : w * stride].reshape(n, h, stride, w, stride, c).transpose(0, 1, 3, 2, 4, 5)
            blocks = rows.reshape(n * h * w, -1)
        products = blocks.dot(weight_KO).reshape(n, h, w, len(shifts), num_outputs)
        high, wide = h - across + 1, w - across + 1
        out: np.ndarray = products[:, :high, :wide, 0] + bias
        for k, (i, j) in enumerate(shifts[1:], start=1):
            out += products[:, i : i + high, j : j + wide, k]
        return out

    return conv


def _channels_last(frames: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


def _padded(x: np.ndarray, padding: int, value: float) -> np.ndarray:
    if not padding:
        return x
    n, h, w, c = x.shape
    padded = np.full((n, h + 2 * padding, w + 2 * padding, c), value, np.float32)
    padded[:, padding : padding + h, padding : padding + w] = x
    return padded


def _patches(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Returns what each place of a filter sees, a view `(N, H, W, kernel, kernel, C)`."""
    x = np.ascontiguousarray(x)
    n, h, w, c = x.shape
    by_n, by_h, by_w, by_c = x.strides
    shape = (n, 1 + (h - kernel) // stride, 1 + (w - kernel) // stride, kernel, kernel, c)
    return as_strided(x, shape, (by_n, stride * by_h, stride * by_w, by_h, by_w, by_c), writeable=False)
