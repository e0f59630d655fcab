"""The layers of a network in C, one function each.

What a value holds lies channels last, so that the innermost loop goes over filters and a compiler makes vectors of it;
frames lie channels first, as the emulator's stacks do, and are turned into floats a strip of rows at a time.
Suffixes name dimensions: G groups, O outputs of a group, K what a filter sees.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from policykd.export.layers import Layer

LANES = 16
"""outputs that are summed side by side: a vector register of AVX-512, two of AVX2, four of SSE or NEON"""
_PLACES = range(5, 9)
"""of a filter that are computed at once: with fewer, gcc 12 unrolls the loop over outputs and makes no vectors of it,
which takes 15 times as long"""


@dataclass(frozen=True)
class Value:
    """Where what a layer gives lies."""

    shape: tuple[int, ...]
    """(channels, height, width) or (features,)"""
    name: str
    channels_first: bool = False
    image: tuple[int, ...] = ()
    """of flattened features that lie channels last: the shape that they had"""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One line of the program."""

    function: str
    takes: tuple[str, ...]
    gives: str
    size: int


@dataclass
class Source:
    """The text so far."""

    prefix: str
    """of every name"""
    arrays: list[str] = field(default_factory=list)
    """of weights"""
    functions: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    num_floats_inside: int = 0
    """on the stack of the function that needs most"""


def _function(source: Source, layer: Layer, gives: str, shape: tuple[int, ...], body: str) -> None:
    """Adds a function that computes one value from others, its call, and the value."""
    name = f"{source.prefix}_layer{len(source.functions)}"
    taken = [source.values[value] for value in layer.takes]
    kinds = ["uint8_t" if value.name == "obs" and len(value.shape) == 3 else "float" for value in taken]
    inputs = ", ".join(f"const {kind} *in{i}" for i, kind in enumerate(kinds))
    title = f"/* {layer.operator} {layer.name} */"
    source.functions.append(f"{title}\nstatic void {name}({inputs}, float *restrict out)\n{{\n{body}\n}}")
    made = Value(shape, "scores" if gives == "scores" else f"value{len(source.calls)}")
    source.calls.append(Call(name, tuple(value.name for value in taken), made.name, made.size))
    source.values[gives] = made


def _constant(source: Source, name: str, numbers: np.ndarray) -> str:
    """Adds an array of weights, in hexadecimal, which reads back exactly, and returns its name."""
    full = f"{source.prefix}_{re.sub(r'[^A-Za-z0-9]', '_', name)}"
    words = [re.sub(r"\.?0*p", "p", float(number).hex()) + "f" for number in numbers.ravel()]
    lines = ",\n".join(",".join(words[i : i + 8]) for i in range(0, len(words), 8))
    source.arrays.append(f"static const float {full}[{len(words)}] = {{\n{lines}}};")
    return full


def _lanes(num_outputs: int, most: int) -> tuple[int, int]:
    """Returns into how many blocks outputs go, and how many a block has; what is too many is filled up with zeros."""
    blocks = math.ceil(num_outputs / most)
    return blocks, max(LANES, 4 * math.ceil(num_outputs / blocks / 4))


@dataclass(frozen=True)
class _Walk:
    """How a filter walks over what it takes: rows, columns, and runs of neighbours in memory."""

    rows: tuple[int, int]
    """how many, and how far apart"""
    columns: tuple[int, int]
    run: int
    step: int = 0
    """from one place to the next"""
    down: int = 0
    """from one row of places to the next"""
    group: int = 0
    """from what one group of filters sees to what the next one does"""


def _filters(
    source: Source, layer: Layer, gives: str, relu: bool, weights_GOK: np.ndarray, image: tuple[int, int], walk: _Walk
) -> None:
    """Adds sums of products at `image` places, bias and perhaps ReLU; a dense layer has one place."""
    groups, of_group, num_products = weights_GOK.shape
    high, wide = image
    places = min(wide, min(_PLACES, key=lambda p: (math.ceil(wide / p) * p, p)))
    blocks, lanes = _lanes(of_group, LANES if wide > 1 else 4 * LANES)
    padded_GOK = np.zeros((groups, blocks * lanes, num_products), np.float32)
    padded_GOK[:, :of_group] = weights_GOK
    bias_GO = np.zeros((groups, blocks * lanes), np.float32)
    if layer.bias is not None:
        bias_GO[:, :of_group] = layer.bias.numpy().reshape(groups, of_group)
    blocks_GKO = padded_GOK.reshape(groups, blocks, lanes, num_products).swapaxes(2, 3)
    weights = _constant(source, f"{layer.name}_weight", blocks_GKO)
    bias = _constant(source, f"{layer.name}_bias", bias_GO)
    num_outputs, each = groups * of_group, range(places)
    is_frames = source.values[layer.takes[0]].name == "obs" and walk.down > 0
    top = "strip" if is_frames else f"in0 + y * {walk.down}"
    limit = "" if blocks * lanes == of_group else f" && b * {lanes} + o < {of_group}"
    result = "s{p}[o] > 0.0f ? s{p}[o] : 0.0f" if relu else "s{p}[o]"
    body = f"""\
  for (int y = 0; y < {high}; y++) {{{_strip(source.values[layer.takes[0]], layer) if is_frames else ""}
    for (int block = 0; block < {groups * blocks}; block++)
      for (int from = 0; from < {wide}; from += {places}) {{
        const int at = from < {wide - places} ? from : {wide - places}, b = block % {blocks}, g = block / {blocks};
        const float *w = {weights} + block * {num_products * lanes};
        float {", ".join(f"s{p}[{lanes}]" for p in each)};
        for (int o = 0; o < {lanes}; o++) {" = ".join(f"s{p}[o]" for p in each)} = {bias}[block * {lanes} + o];
        for (int i = 0; i < {walk.rows[0]}; i++)
          for (int j = 0; j < {walk.columns[0]}; j++) {{
            const float *x = {top} + g * {walk.group} + i * {walk.rows[1]} + j * {walk.columns[1]} + at * {walk.step};
            for (int k = 0; k < {walk.run}; k++, w += {lanes}) {{
              const float {", ".join(f"x{p} = x[k + {p * walk.step}]" for p in each)};
              for (int o = 0; o < {lanes}; o++) {{
                const float u = w[o];
                {" ".join(f"s{p}[o] += x{p} * u;" for p in each)}
              }}
            }}
          }}
        float *to = out + (y * {wide} + at) * {num_outputs} + g * {of_group} + b * {lanes};
        for (int o = 0; o < {lanes}{limit}; o++) {{
          {" ".join(f"to[{p * num_outputs} + o] = {result.format(p=p)};" for p in each)}
        }}
      }}
  }}"""
    shape = (num_outputs, high, wide) if layer.operator == "conv" else (num_outputs,)
    _function(source, layer, gives, shape, body)


def _strip(frames: Value, layer: Layer) -> str:
    """Returns C that turns the rows under a filter into floats, for frames that lie channels first."""
    assert layer.weight is not None
    channels, height, width = frames.shape
    size = layer.weight.shape[2] * width
    return f"""
    float strip[{channels * size}];
    for (int c = 0; c < {channels}; c++)
      for (int i = 0; i < {size}; i++)
        strip[c * {size} + i] = in0[(c * {height} + y * {layer.stride}) * {width} + i];"""


def _conv(source: Source, layer: Layer, gives: str, relu: bool) -> None:
    if layer.padding:
        layer = _padded(source, layer)
    assert layer.weight is not None
    taken, weight, groups = source.values[layer.takes[0]], layer.weight.numpy(), layer.groups
    channels, height, width = taken.shape
    kernel, stride, inside = weight.shape[2], layer.stride, channels // groups
    image = 1 + (height - kernel) // stride, 1 + (width - kernel) // stride
    if taken.channels_first:
        apart = width * (kernel if taken.name == "obs" else height)
        walk = _Walk((inside, apart), (kernel, width), kernel, stride, stride * width, inside * apart)
    elif groups == 1:
        walk = _Walk(
            (kernel, width * channels), (1, 0), kernel * channels, stride * channels, stride * width * channels
        )
    else:
        across = width * channels
        walk = _Walk((kernel, across), (kernel, channels), inside, stride * channels, stride * across, inside)
    order = (0, 1, 2, 3) if taken.channels_first else (0, 2, 3, 1)
    weights_GOK = weight.transpose(order).reshape(groups, len(weight) // groups, -1)
    _filters(source, layer, gives, relu, weights_GOK, image, walk)


def _dense(source: Source, layer: Layer, gives: str, relu: bool) -> None:
    assert layer.weight is not None
    taken, weight = source.values[layer.takes[0]], layer.weight.numpy()
    if taken.image:  # the weights count (channels, height, width), the memory has channels last
        weight = weight.reshape(-1, *taken.image).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    _filters(source, layer, gives, relu, weight[None], (1, 1), _Walk((1, 0), (1, 0), taken.size))


def _padded(source: Source, layer: Layer) -> Layer:
    """Adds a copy with a margin of zeros, and returns the layer without padding that takes it."""
    taken, margin = source.values[layer.takes[0]], layer.padding
    channels, height, width = taken.shape
    assert not taken.channels_first, "the first convolution has no padding"
    high, wide = height + 2 * margin, width + 2 * margin
    body = f"""\
  for (int i = 0; i < {high * wide * channels}; i++) out[i] = 0.0f;
  for (int y = 0; y < {height}; y++)
    for (int i = 0; i < {width * channels}; i++)
      out[((y + {margin}) * {wide} + {margin}) * {channels} + i] = in0[y * {width * channels} + i];"""
    name = f"{layer.takes[0]} padded"
    if name not in source.values:
        _function(source, replace(layer, name="margin"), name, (channels, high, wide), body)
    return replace(layer, takes=(name,), padding=0)


def _pool(source: Source, layer: Layer, gives: str, relu: bool) -> None:
    taken, kernel, stride, margin = source.values[layer.takes[0]], layer.kernel, layer.stride, layer.padding
    channels, height, width = taken.shape
    high, wide = (1 + (size + 2 * margin - kernel) // stride for size in (height, width))
    along = f"((c * {height} + v) * {width} + u)" if taken.channels_first else f"((v * {width} + u) * {channels} + c)"
    into = f"((c * {high} + y) * {wide} + x)" if taken.channels_first else f"((y * {wide} + x) * {channels} + c)"
    is_max = layer.operator == "max_pool"
    inside = f"if (v >= 0 && v < {height} && u >= 0 && u < {width}) " if margin else ""
    add = f"sum = in0[{along}] > sum ? in0[{along}] : sum;" if is_max else f"sum += in0[{along}];"
    start, end = ("-HUGE_VALF", "sum") if is_max else ("0.0f", f"sum * {float.hex(1.0 / kernel**2)}f")
    loops = (
        [("c", channels), ("y", high), ("x", wide)]
        if taken.channels_first
        else [("y", high), ("x", wide), ("c", channels)]
    )
    body = "\n".join(f"{'  ' * (i + 1)}for (int {v} = 0; {v} < {n}; {v}++)" for i, (v, n) in enumerate(loops))
    body += f""" {{
        float sum = {start};
        for (int j = 0; j < {kernel}; j++)
          for (int i = 0; i < {kernel}; i++) {{
            const int v = y * {stride} + j - {margin}, u = x * {stride} + i - {margin};
            {inside}{add}
          }}
        out[{into}] = {end};
      }}"""
    _function(source, layer, gives, (channels, high, wide), body)
    if taken.channels_first:
        source.values[gives] = replace(source.values[gives], channels_first=True)


def _pointwise(source: Source, layer: Layer, gives: str, relu: bool) -> None:
    taken, alpha = source.values[layer.takes[0]], float.hex(float(np.float32(layer.alpha))) + "f"
    formula = {
        "relu": "in0[i] > 0.0f ? in0[i] : 0.0f",
        "elu": f"in0[i] > 0.0f ? in0[i] : {alpha} * expm1f(in0[i])",
        "leaky_relu": f"in0[i] > 0.0f ? in0[i] : {alpha} * in0[i]",
        "tanh": "tanhf(in0[i])",
        "add": "in0[i] + in1[i]",
    }[layer.operator]
    body = f"  for (int i = 0; i < {taken.size}; i++) out[i] = {formula};"
    _function(source, layer, gives, taken.shape, body)


def _flatten(source: Source, layer: Layer, gives: str, relu: bool) -> None:
    taken = source.values[layer.takes[0]]
    order = () if taken.channels_first else taken.shape
    source.values[gives] = replace(taken, shape=(taken.size,), image=order, channels_first=False)


EMIT: dict[str, Callable[[Source, Layer, str, bool], None]] = {
    "conv": _conv,
    "dense": _dense,
    "average_pool": _pool,
    "max_pool": _pool,
    "flatten": _flatten,
    **dict.fromkeys(("relu", "elu", "leaky_relu", "tanh", "add"), _pointwise),
}
