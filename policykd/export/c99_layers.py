"""Layers of a network as C functions, one each.

Values lie channels last in memory: the innermost loop then runs over filters, which compilers vectorise. Frames lie
channels first, as the emulator stacks them, and are converted to floats one strip of rows at a time.
Suffixes name dimensions: G groups, O outputs of a group, K inputs of a filter.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from policykd.export.layers import Layer

LANES = 16
"""outputs that are summed in parallel: one vector register of AVX-512, two of AVX2, four of SSE or NEON"""
_PLACES = range(5, 9)
"""places of a filter computed at once: below 5, gcc 12 unrolls the loop over outputs instead of vectorising it and
takes 15 times as long (docs/log.md, 2026-11-27)"""


@dataclass(frozen=True)
class Value:
    """A layer's output in memory."""

    shape: tuple[int, ...]
    """(channels, height, width) or (features,)"""
    name: str
    """name of the array in C"""
    channels_first: bool = False
    image: tuple[int, ...] = ()
    """shape before flattening, of features that lie channels last"""

    @property
    def size(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One line of the main function: a layer's function with its arguments."""

    function: str
    takes: tuple[str, ...]
    gives: str
    size: int
    """numbers in the output"""


@dataclass
class Source:
    """Parts of the C file so far."""

    prefix: str
    arrays: list[str] = field(default_factory=list)
    """weights"""
    functions: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    """outputs by the names in `Layer.takes` and `Layer.gives`"""

    def add_function(self, layer: Layer, gives: str, shape: tuple[int, ...], body: str) -> None:
        """Adds a function that computes one value from others, its call, and the value."""
        # Only the observation itself may be bytes; every other value is an array of floats.
        name = f"{self.prefix}_layer{len(self.functions)}"
        inputs = [self.values[value] for value in layer.takes]
        kinds = ["uint8_t" if value.name == "obs" and len(value.shape) == 3 else "float" for value in inputs]
        parameters = ", ".join(f"const {kind} *in{i}" for i, kind in enumerate(kinds))
        title = f"/* {layer.operator} {layer.name} */"
        self.functions.append(f"{title}\nstatic void {name}({parameters}, float *restrict out)\n{{\n{body}\n}}")
        output = Value(shape, "scores" if gives == "scores" else f"value{len(self.calls)}")
        self.calls.append(Call(name, tuple(value.name for value in inputs), output.name, output.size))
        self.values[gives] = output

    def add_constant(self, name: str, numbers: np.ndarray) -> str:
        """Adds an array of weights and returns its name in C.

        Hexadecimal floats read back exactly in every compiler.
        """
        full_name = f"{self.prefix}_{re.sub(r'[^A-Za-z0-9]', '_', name)}"
        words = [re.sub(r"\.?0*p", "p", float(number).hex()) + "f" for number in numbers.ravel()]
        lines = ",\n".join(",".join(words[i : i + 8]) for i in range(0, len(words), 8))
        self.arrays.append(f"static const float {full_name}[{len(words)}] = {{\n{lines}}};")
        return full_name


@dataclass(frozen=True)
class _Walk:
    """How a bank of filters walks over its input: rows, columns, and runs of neighbours in memory."""

    image: tuple[int, int]
    """height and width of the output, its places"""
    rows: tuple[int, int]
    """count, and distance in memory"""
    columns: tuple[int, int]
    """count, and distance in memory"""
    run: int
    """numbers next to each other in memory"""
    step: int = 0
    """distance from one place to the next"""
    down: int = 0
    """distance from one row of places to the next"""
    group: int = 0
    """distance between the inputs of two groups of filters"""


def _add_filters(
    source: Source, layer: Layer, gives: str, with_relu: bool, weights_GOK: np.ndarray, walk: _Walk
) -> None:
    """Adds sums of products at every place, with bias and perhaps ReLU; a dense layer has one place."""
    groups, group_size, num_products = weights_GOK.shape
    num_outputs = groups * group_size
    high, wide = walk.image
    # Rows of places are cut into equal parts with as few places computed twice as possible; the last part overlaps.
    places = min(wide, min(_PLACES, key=lambda p: (math.ceil(wide / p) * p, p)))
    each = range(places)

    # Outputs go in blocks of whole vector registers; the last block is padded with zeros, which are not written out.
    max_lanes = LANES if wide > 1 else 4 * LANES
    blocks = math.ceil(group_size / max_lanes)
    lanes = max(LANES, 4 * math.ceil(group_size / blocks / 4))
    padded_GOK = np.zeros((groups, blocks * lanes, num_products), np.float32)
    padded_GOK[:, :group_size] = weights_GOK
    bias_GO = np.zeros((groups, blocks * lanes), np.float32)
    if layer.bias is not None:
        bias_GO[:, :group_size] = layer.bias.numpy().reshape(groups, group_size)
    # Within a block, the weights of all lanes for one input lie next to each other.
    blocks_GKO = padded_GOK.reshape(groups, blocks, lanes, num_products).swapaxes(2, 3)
    weights = source.add_constant(f"{layer.name}_weight", blocks_GKO)
    bias = source.add_constant(f"{layer.name}_bias", bias_GO)

    taken = source.values[layer.takes[0]]
    is_frames = taken.name == "obs" and walk.down > 0
    top = "strip" if is_frames else f"in0 + y * {walk.down}"
    limit = "" if blocks * lanes == group_size else f" && b * {lanes} + o < {group_size}"
    result = "s{p}[o] > 0.0f ? s{p}[o] : 0.0f" if with_relu else "s{p}[o]"
    body = f"""\
  for (int y = 0; y < {high}; y++) {{{_strip(taken, layer) if is_frames else ""}
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
        float *to = out + (y * {wide} + at) * {num_outputs} + g * {group_size} + b * {lanes};
        for (int o = 0; o < {lanes}{limit}; o++) {{
          {" ".join(f"to[{p * num_outputs} + o] = {result.format(p=p)};" for p in each)}
        }}
      }}
  }}"""
    shape = (num_outputs, high, wide) if layer.operator == "conv" else (num_outputs,)
    source.add_function(layer, gives, shape, body)


def _strip(frames: Value, layer: Layer) -> str:
    """Returns C that converts the rows under a filter to floats, of frames that lie channels first."""
    assert layer.weight is not None
    channels, height, width = frames.shape
    size = layer.weight.shape[2] * width
    return f"""
    float strip[{channels * size}];
    for (int c = 0; c < {channels}; c++)
      for (int i = 0; i < {size}; i++)
        strip[c * {size} + i] = in0[(c * {height} + y * {layer.stride}) * {width} + i];"""


def _add_conv(source: Source, layer: Layer, gives: str, with_relu: bool) -> None:
    if layer.padding:
        layer = _add_padding(source, layer)
    assert layer.weight is not None
    weight = layer.weight.numpy()
    taken = source.values[layer.takes[0]]
    channels, height, width = taken.shape
    group_channels, kernel = weight.shape[1:3]
    stride = layer.stride
    image = 1 + (height - kernel) // stride, 1 + (width - kernel) // stride
    # The order of the weights follows the order in which the filter reads its inputs from memory.
    if taken.channels_first:
        # Of frames, one strip of rows is in memory at a time.
        plane = width * (kernel if taken.name == "obs" else height)
        rows, columns = (group_channels, plane), (kernel, width)
        walk = _Walk(image, rows, columns, kernel, stride, stride * width, group_channels * plane)
    else:
        assert layer.groups == 1, "only the first convolution may be depthwise"
        weight = weight.transpose(0, 2, 3, 1)
        row = width * channels
        walk = _Walk(image, (kernel, row), (1, 0), kernel * channels, stride * channels, stride * row)
    weights_GOK = weight.reshape(layer.groups, len(weight) // layer.groups, -1)
    _add_filters(source, layer, gives, with_relu, weights_GOK, walk)


def _add_dense(source: Source, layer: Layer, gives: str, with_relu: bool) -> None:
    assert layer.weight is not None
    taken = source.values[layer.takes[0]]
    weight = layer.weight.numpy()
    # The weights are in the order (channels, height, width), the memory has channels last.
    if taken.image:
        weight = weight.reshape(-1, *taken.image).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    _add_filters(source, layer, gives, with_relu, weight[None], _Walk((1, 1), (1, 0), (1, 0), taken.size))


def _add_padding(source: Source, layer: Layer) -> Layer:
    """Adds a copy with a margin of zeros, and returns the layer without padding that takes it."""
    taken = source.values[layer.takes[0]]
    margin = layer.padding
    channels, height, width = taken.shape
    assert not taken.channels_first, "the first convolution has no padding"
    high, wide = height + 2 * margin, width + 2 * margin
    body = f"""\
  for (int i = 0; i < {high * wide * channels}; i++) out[i] = 0.0f;
  for (int y = 0; y < {height}; y++)
    for (int i = 0; i < {width * channels}; i++)
      out[((y + {margin}) * {wide} + {margin}) * {channels} + i] = in0[y * {width * channels} + i];"""
    # Two layers that pad the same value share one copy.
    name = f"{layer.takes[0]} padded"
    if name not in source.values:
        source.add_function(replace(layer, name="margin"), name, (channels, high, wide), body)
    return replace(layer, takes=(name,), padding=0)


def _add_pool(source: Source, layer: Layer, gives: str, with_relu: bool) -> None:
    taken = source.values[layer.takes[0]]
    kernel, stride, margin = layer.kernel, layer.stride, layer.padding
    channels, height, width = taken.shape
    high, wide = (1 + (size + 2 * margin - kernel) // stride for size in (height, width))
    if layer.operator == "average_pool":
        assert taken.channels_first
        assert not margin
        loops = [("c", channels), ("y", high), ("x", wide)]
        add = f"sum += in0[((c * {height} + v) * {width} + u)];"
        start, end = "0.0f", f"sum * {float.hex(1.0 / kernel**2)}f"
        output_index = f"((c * {high} + y) * {wide} + x)"
    else:
        assert not taken.channels_first
        loops = [("y", high), ("x", wide), ("c", channels)]
        value = f"in0[((v * {width} + u) * {channels} + c)]"
        # Padding does not count, as if it were minus infinity.
        add = f"if (v >= 0 && v < {height} && u >= 0 && u < {width}) sum = {value} > sum ? {value} : sum;"
        start, end = "-HUGE_VALF", "sum"
        output_index = f"((y * {wide} + x) * {channels} + c)"
    body = "\n".join(f"{'  ' * (i + 1)}for (int {v} = 0; {v} < {n}; {v}++)" for i, (v, n) in enumerate(loops))
    body += f""" {{
        float sum = {start};
        for (int j = 0; j < {kernel}; j++)
          for (int i = 0; i < {kernel}; i++) {{
            const int v = y * {stride} + j - {margin}, u = x * {stride} + i - {margin};
            {add}
          }}
        out[{output_index}] = {end};
      }}"""
    source.add_function(layer, gives, (channels, high, wide), body)
    source.values[gives] = replace(source.values[gives], channels_first=taken.channels_first)


def _add_pointwise(source: Source, layer: Layer, gives: str, with_relu: bool) -> None:
    taken = source.values[layer.takes[0]]
    alpha = float.hex(float(np.float32(layer.alpha))) + "f"
    formula = {
        "relu": "in0[i] > 0.0f ? in0[i] : 0.0f",
        "elu": f"in0[i] > 0.0f ? in0[i] : {alpha} * expm1f(in0[i])",
        "leaky_relu": f"in0[i] > 0.0f ? in0[i] : {alpha} * in0[i]",
        "tanh": "tanhf(in0[i])",
        "add": "in0[i] + in1[i]",
    }[layer.operator]
    body = f"  for (int i = 0; i < {taken.size}; i++) out[i] = {formula};"
    source.add_function(layer, gives, taken.shape, body)


def _add_flatten(source: Source, layer: Layer, gives: str, with_relu: bool) -> None:
    """Gives the same memory another shape; no code is added."""
    taken = source.values[layer.takes[0]]
    image = () if taken.channels_first else taken.shape
    source.values[gives] = replace(taken, shape=(taken.size,), image=image, channels_first=False)


ADD_LAYER: dict[str, Callable[[Source, Layer, str, bool], None]] = {
    "conv": _add_conv,
    "dense": _add_dense,
    "average_pool": _add_pool,
    "max_pool": _add_pool,
    "flatten": _add_flatten,
    **dict.fromkeys(("relu", "elu", "leaky_relu", "tanh", "add"), _add_pointwise),
}
"""operator -> function that adds such a layer, under a name, with or without a following ReLU"""
