"""Reads an ONNX file and refuses all but the graph of a small policy, before any runtime sees it.

An ONNX file is a program. ONNX Runtime checks that it is well formed, not that it is harmless: it opens files that it
names, and a hundred bytes may ask for a terabyte. Here the file is read once, its operators come from a list, and the
size of everything that it computes is known beforehand.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from policykd.io.files import BadFile

if TYPE_CHECKING:
    import onnx

MAX_BYTES = 64 << 20
MAX_BYTES_BESIDES_WEIGHTS = 1 << 20
"""protobuf takes 50 times as much memory for small messages as they take in the file"""
MAX_NUMBERS = 1 << 24
"""computed on the way from one observation to its scores; SB3's NatureCNN takes 50,000"""
OUTPUT_NAMES = ("scores", "logits", "q_values")

# Nothing here makes more numbers than its inputs' shapes say: no ConstantOfShape, Expand, Tile, Range, Pad or Resize.
_OPERATORS = (
    "Abs Add AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant Conv DequantizeLinear Div Dropout"
    " Elu Equal Erf Exp Flatten Floor Gather Gelu Gemm GlobalAveragePool GlobalMaxPool Greater HardSigmoid HardSwish"
    " Identity InstanceNormalization LayerNormalization LeakyRelu Less Log LogSoftmax MatMul MatMulInteger Max MaxPool"
    " Mean Min Mish Mul Neg Not PRelu Pow QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL2 ReduceMax"
    " ReduceMean ReduceMin ReduceSum Relu Reshape Selu Shape Sigmoid Sign Slice Softmax Softplus Softsign Split Sqrt"
    " Squeeze Sub Sum Tanh Transpose Unsqueeze Where"
)
OPERATORS = frozenset(_OPERATORS.split())

# Where protobuf messages lie in each other (onnx.proto), and which fields hold weights: float_data and raw_data.
_NESTED = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor"},
    "tensor": {},
}
_WEIGHTS = {("tensor", 4), ("tensor", 9)}


@dataclass(frozen=True)
class OnnxGraph:
    """What a policy's graph takes and gives."""

    content: bytes
    """the file, read once"""
    sha256: str
    input_name: str
    output_name: str
    obs_shape: tuple[int, ...]
    """of one observation, channels first"""
    num_actions: int
    num_parameters: int
    """numbers in its initialisers, without the integers that are shapes and axes"""
    takes_bytes: bool
    """whether the input is uint8 rather than float32"""
    channels_last: bool
    one_by_one: bool
    """whether the batch is fixed to 1"""
    divide_by: float
    """what a float32 input wants pixels to be divided by, from the metadata `policykd.divide_by`"""


def read_onnx_graph(path: Path) -> OnnxGraph:
    """Returns a policy's graph that is safe to run.

    Raises:
        BadFile: missing, damaged, foreign or unsafe file; one line that names it, the reason and the next step.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path}: ONNX teachers need another package: pip install 'policykd[onnx]'") from error
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise BadFile(f"{path}: {size:,} bytes is more than a policy can need ({MAX_BYTES:,}); do not use it")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror}); give the path of an .onnx file") from error
    try:
        _check_small_messages(path, content)
        model = onnx.load_model_from_string(content)
        _check_nodes(path, model)
        _check_tensors(path, model)
        onnx.checker.check_model(model)
        return _describe(path, content, model)
    except (
        DecodeError,
        IndexError,
        UnicodeError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        raise BadFile(f"{path}: truncated, or not a valid ONNX file ({one_line(error)}); export it again") from error


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's text, without the control characters that a file may bring in."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter for letter in words if letter.isprintable())[:150]


def _check_small_messages(path: Path, content: bytes) -> None:
    """Raises ValueError for a file of countless tiny messages, which would fill the memory when parsed."""
    besides, parts = 0, [("model", 0, len(content))]
    while parts:
        kind, at, end = parts.pop()
        while at < end:
            key, at = _varint(content, at)
            number, wire_type = key >> 3, key & 7
            if wire_type == 2:
                size, at = _varint(content, at)
                if number in _NESTED[kind]:
                    parts.append((_NESTED[kind][number], at, min(at + size, end)))
                elif (kind, number) not in _WEIGHTS:
                    besides += size
                at += size
            else:
                at = _varint(content, at)[1] if wire_type == 0 else at + {1: 8, 5: 4}.get(wire_type, len(content))
            besides += 16  # an empty message takes more
            if at > end:
                raise BadFile(f"{path}: truncated, or not an ONNX file; export it again")
            if besides > MAX_BYTES_BESIDES_WEIGHTS:
                raise BadFile(
                    f"{path}: unsafe, more than {MAX_BYTES_BESIDES_WEIGHTS:,} bytes are not weights; do not use it"
                )


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns a protobuf number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, at


def _check_nodes(path: Path, model: "onnx.ModelProto") -> None:
    if model.functions or model.graph.sparse_initializer or model.training_info:
        raise BadFile(
            f"{path}: unsafe, it holds functions, sparse weights or a training graph; export the acting network alone"
        )
    for node in model.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if name not in OPERATORS:
            raise BadFile(f"{path}: operator {name!r} is none of a small policy's; export the acting network alone")
        for a in node.attribute:
            if a.HasField("g") or a.graphs or a.HasField("sparse_tensor") or a.sparse_tensors:
                raise BadFile(f"{path}: unsafe, its {name!r} holds a graph or sparse numbers; do not use it")


def _check_tensors(path: Path, model: "onnx.ModelProto") -> None:
    """Raises ValueError for weights in another file, of no known kind, too few for their shape, or not finite."""
    import numpy as np
    import onnx

    kinds = onnx.TensorProto
    known = {kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BOOL}
    known |= {kinds.INT8, kinds.UINT8, kinds.INT32, kinds.INT64}
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location != kinds.DEFAULT:
            raise BadFile(f"{path}: unsafe, {tensor.name!r} lies in another file; export it with external_data=False")
        if tensor.data_type not in known:
            raise BadFile(f"{path}: {tensor.name!r} is of a kind that no policy needs; export it again as float32")
        try:
            finite = bool(np.isfinite(onnx.numpy_helper.to_array(tensor)).all())
        except (ValueError, TypeError, OverflowError) as error:
            raise BadFile(
                f"{path}: {tensor.name!r} claims shape {tuple(tensor.dims)} over fewer numbers; do not use it"
            ) from error
        if not finite:
            raise BadFile(
                f"{path}: {tensor.name!r} holds NaN or infinite weights; the agent is broken, take an earlier one"
            )


def _tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else attribute.tensors)


def _describe(path: Path, content: bytes, model: "onnx.ModelProto") -> OnnxGraph:
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]  # old files list their weights among the inputs
    outputs = list(model.graph.output)
    if len(outputs) > 1:
        outputs = [o for o in outputs if o.name in OUTPUT_NAMES]
    if len(inputs) != 1 or len(outputs) != 1:
        raise BadFile(
            f"{path}: expected one input and one output (or one named {', '.join(OUTPUT_NAMES)}), found"
            f" {[i.name for i in inputs]} and {[o.name for o in model.graph.output]}; export it with those alone"
        )
    tensor_type = inputs[0].type.tensor_type
    dims = [d.dim_value for d in tensor_type.shape.dim]  # 0 where the size is open
    kind, kinds = tensor_type.elem_type, {number: name for name, number in onnx.TensorProto.DataType.items()}
    if kind not in (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT) or len(dims) not in (2, 4) or min(dims[1:]) < 1:
        raise BadFile(
            f"{path}: its input, {kinds.get(kind, 'unknown')} {tuple(dims)} with 0 for open sizes, is none of UINT8 or"
            " FLOAT (batch, channels, height, width), (batch, height, width, channels) and (batch, features)"
            "; export it so"
        )
    if dims[0] not in (0, 1):
        raise BadFile(f"{path}: its batch is fixed to {dims[0]}; export it with an open batch, or one of 1")
    scores_shape = _checked_shapes(path, model, inputs[0].name, is_batch_open=dims[0] == 0)[outputs[0].name]
    if len(scores_shape) != 2 or scores_shape[0] != 1:
        raise BadFile(f"{path}: one observation gives {scores_shape}, expected scores (1, num_actions); export it so")
    channels_last = len(dims) == 4 and dims[3] < dims[1]
    numbers = {name: math.prod(tensor.dims) for name, tensor in weights.items()}
    return OnnxGraph(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        input_name=inputs[0].name,
        output_name=outputs[0].name,
        obs_shape=(dims[3], dims[1], dims[2]) if channels_last else tuple(dims[1:]),
        num_actions=scores_shape[1],
        num_parameters=sum(n for name, n in numbers.items() if weights[name].data_type != onnx.TensorProto.INT64),
        takes_bytes=kind == onnx.TensorProto.UINT8,
        channels_last=channels_last,
        one_by_one=dims[0] == 1,
        divide_by=_divide_by(path, model),
    )


def _checked_shapes(
    path: Path, model: "onnx.ModelProto", input_name: str, *, is_batch_open: bool
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of everything that is computed from one observation, by name.

    Raises:
        BadFile: a shape that cannot be told, or more numbers than a policy needs.
    """
    shapes = _inferred_shapes(path, model, input_name, 1)
    if is_batch_open:
        one, two = (sum(map(math.prod, s.values())) for s in (shapes, _inferred_shapes(path, model, input_name, 2)))
        if two > 2 * one:
            raise BadFile(f"{path}: unsafe, its memory grows faster than the batch; do not use it")
    return shapes


def _inferred_shapes(path: Path, model: "onnx.ModelProto", input_name: str, batch: int) -> dict[str, tuple[int, ...]]:
    import onnx

    closed = onnx.ModelProto()
    closed.CopyFrom(model)
    del closed.graph.value_info[:]
    next(i for i in closed.graph.input if i.name == input_name).type.tensor_type.shape.dim[0].dim_value = batch
    for output in closed.graph.output:
        output.type.tensor_type.ClearField("shape")
    shapes: dict[str, tuple[int, ...]] = {}
    for follow_values in (False, True):  # values of shapes only once their number is known to be small
        inferred = onnx.shape_inference.infer_shapes(closed, strict_mode=True, data_prop=follow_values).graph
        values = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
        shapes = {
            name: tuple(d.dim_value for d in t.shape.dim)
            for name, t in values.items()
            if t.HasField("shape") and all(d.HasField("dim_value") for d in t.shape.dim)
        }
        if (numbers := sum(map(math.prod, shapes.values()))) > MAX_NUMBERS:
            raise BadFile(f"{path}: unsafe, one observation makes {numbers:,} numbers; do not use it")
    computed = [name for node in model.graph.node for name in node.output if name]
    if unknown := [name for name in computed if name not in shapes]:
        raise BadFile(f"{path}: the size of {unknown[0]!r} cannot be told beforehand; export it with fixed sizes")
    return shapes


def _divide_by(path: Path, model: "onnx.ModelProto") -> float:
    text = {p.key: p.value for p in model.metadata_props}.get("policykd.divide_by", "1")
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise BadFile(f"{path}: its metadata policykd.divide_by is {text!r}, expected a positive number such as 255")
    return number
