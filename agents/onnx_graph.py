"""A reader of ONNX files that refuses everything but the graph of a small policy, before any runtime sees it.

An ONNX file is a program. ONNX Runtime checks that it is well formed, not that it is harmless: it opens files that the
graph names, and a hundred bytes may ask for a terabyte. Here the file is read once, its operators come from a list, and
the size of everything that it computes is known in advance.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from policykd.io.files import BadFile
from policykd.io.typed import one_line, read_bounded

MAX_BYTES = 64 << 20
MAX_BYTES_BESIDES_WEIGHTS = 1 << 20
"""protobuf takes 50 times as much memory for small messages as they take in the file"""
MAX_NUMBERS = 1 << 24
"""numbers computed for one observation; SB3's NatureCNN takes 50,000"""
OUTPUT_NAMES = ("scores", "logits", "q_values")

# The shapes of their inputs bound their outputs: no ConstantOfShape, Expand, Tile, Range, Pad or Resize.
_OPERATORS = (
    "Abs Add AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant Conv DequantizeLinear Div Dropout"
    " Elu Equal Erf Exp Flatten Floor Gather Gelu Gemm GlobalAveragePool GlobalMaxPool Greater HardSigmoid HardSwish"
    " Identity InstanceNormalization LayerNormalization LeakyRelu Less Log LogSoftmax MatMul MatMulInteger Max MaxPool"
    " Mean Min Mish Mul Neg Not PRelu Pow QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL2 ReduceMax"
    " ReduceMean ReduceMin ReduceSum Relu Reshape Selu Shape Sigmoid Sign Slice Softmax Softplus Softsign Split Sqrt"
    " Squeeze Sub Sum Tanh Transpose Unsqueeze Where"
)
OPERATORS = frozenset(_OPERATORS.split())
_DTYPES = {"FLOAT", "FLOAT16", "DOUBLE", "BOOL", "INT8", "UINT8", "INT32", "INT64"}
_DTYPE_NAMES = {number: name for name, number in onnx.TensorProto.DataType.items()}
_CHECK_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)

# Field numbers of nested messages (onnx.proto), and of the fields that hold weights: float_data and raw_data.
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
    """Inputs and outputs of a policy's graph."""

    content: bytes
    """the file, read once"""
    sha256: str
    input_name: str
    output_name: str
    obs_shape: tuple[int, ...]
    """shape of one observation, channels first"""
    num_actions: int
    num_parameters: int
    """numbers in its initialisers, without the integers that are shapes and axes"""
    takes_bytes: bool
    """the input is uint8, not float32"""
    channels_last: bool
    is_single: bool
    """the batch is fixed to 1"""
    divide_by: float
    """divisor of pixels for a float32 input, from the metadata `policykd.divide_by`"""


def read_onnx_graph(path: Path, content: bytes | None = None) -> OnnxGraph:
    """Returns a policy's graph that is safe to run; with `content`, the path is only named in error messages.

    Raises:
        BadFile: missing, damaged, foreign or unsafe file; one line that names it, the reason and the next step.
    """
    if content is None:
        content = read_bounded(path, MAX_BYTES, next_step="give the path of an .onnx file")
    try:
        _check_message_sizes(path, content)
        model = onnx.load_model_from_string(content)
        _check_nodes(path, model)
        _check_tensors(path, model)
        onnx.checker.check_model(model)
        return _describe(path, content, model)
    except (*_CHECK_ERRORS, DecodeError, IndexError, UnicodeError) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise BadFile(f"{path}: truncated, or not a valid ONNX file ({reason}); export it again") from error


def _check_message_sizes(path: Path, content: bytes) -> None:
    """Raises BadFile for a file of countless tiny messages, which would fill the memory when parsed."""
    num_bytes = 0
    messages = [("model", 0, len(content))]
    while messages:
        kind, position, end = messages.pop()
        while position < end:
            key, position = _varint(content, position)
            field, wire_type = divmod(key, 8)
            if wire_type == 2:  # a message, text or bytes: a length, then the content
                size, position = _varint(content, position)
                # Nested messages are walked, weights are free, anything else counts.
                if field in _NESTED[kind]:
                    messages.append((_NESTED[kind][field], position, min(position + size, end)))
                elif (kind, field) not in _WEIGHTS:
                    num_bytes += size
                position += size
            elif wire_type == 0:
                _, position = _varint(content, position)
            else:
                position += {1: 8, 5: 4}.get(wire_type, len(content))
            num_bytes += 16  # an empty message takes more than that
            if position > end:
                raise BadFile(f"{path}: truncated, or not an ONNX file; export it again")
            if num_bytes > MAX_BYTES_BESIDES_WEIGHTS:
                raise BadFile(
                    f"{path}: unsafe, more than {MAX_BYTES_BESIDES_WEIGHTS:,} bytes are not weights; do not use it"
                )


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Returns a protobuf integer and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, position


def _check_nodes(path: Path, model: onnx.ModelProto) -> None:
    """Raises BadFile for an operator that is not on the list, or a graph inside a node."""
    if model.functions or model.graph.sparse_initializer or model.training_info:
        raise BadFile(
            f"{path}: unsafe, it holds functions, sparse weights or a training graph; export the acting network alone"
        )
    for node in model.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if name not in OPERATORS:
            raise BadFile(f"{path}: unsupported operator {name!r}; export the acting network of a small policy alone")
        for a in node.attribute:
            if a.HasField("g") or a.graphs or a.HasField("sparse_tensor") or a.sparse_tensors:
                raise BadFile(f"{path}: unsafe, its {name!r} holds a graph or sparse numbers; do not use it")


def _check_tensors(path: Path, model: onnx.ModelProto) -> None:
    """Raises BadFile for weights in another file, of an unknown type, too few for their shape, or not finite."""
    for tensor in _tensors(model):
        # ONNX Runtime would open the file that a tensor names.
        if tensor.external_data or tensor.data_location != onnx.TensorProto.DEFAULT:
            raise BadFile(f"{path}: unsafe, {tensor.name!r} is in another file; export it with external_data=False")
        if _DTYPE_NAMES.get(tensor.data_type) not in _DTYPES:
            raise BadFile(f"{path}: {tensor.name!r} has a dtype that no policy needs; export it again as float32")
        try:
            is_finite = bool(np.isfinite(onnx.numpy_helper.to_array(tensor)).all())
        except (ValueError, TypeError, OverflowError) as error:
            raise BadFile(
                f"{path}: {tensor.name!r} claims shape {tuple(tensor.dims)} over fewer numbers; do not use it"
            ) from error
        if not is_finite:
            raise BadFile(
                f"{path}: {tensor.name!r} holds NaN or infinite weights; the agent is broken, take an earlier one"
            )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else attribute.tensors)


def _describe(path: Path, content: bytes, model: onnx.ModelProto) -> OnnxGraph:
    """Returns the graph's inputs and outputs, once everything that it computes is small."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    graph_input, output_name = _only_input_and_output(path, model, weights)
    tensor_type = graph_input.type.tensor_type
    dims = [d.dim_value for d in tensor_type.shape.dim]  # 0 where the size is open
    dtype = _DTYPE_NAMES.get(tensor_type.elem_type)
    if dtype not in ("UINT8", "FLOAT") or len(dims) not in (2, 4) or min(dims[1:]) < 1:
        raise BadFile(
            f"{path}: unsupported input {dtype} {tuple(dims)} (0 for open sizes); export it with"
            " UINT8 or FLOAT (batch, channels, height, width), (batch, height, width, channels) or (batch, features)"
        )
    if dims[0] not in (0, 1):
        raise BadFile(f"{path}: its batch is fixed to {dims[0]}; export it with an open batch, or one of 1")
    shapes = _inferred_shapes(path, model, graph_input.name, batch=1)
    if dims[0] == 0:
        # A size may hide in the batch: batch^4 numbers are few for one observation.
        of_two = _inferred_shapes(path, model, graph_input.name, batch=2)
        if _num_numbers(of_two) > 2 * _num_numbers(shapes):
            raise BadFile(f"{path}: unsafe, its memory grows faster than the batch; do not use it")
    output_shape = shapes[output_name]
    if len(output_shape) != 2 or output_shape[0] != 1:
        raise BadFile(f"{path}: one observation gives {output_shape}, expected (1, num_actions); export it like that")
    # Frames have more pixels per side than stacked channels.
    channels_last = len(dims) == 4 and dims[3] < dims[1]
    return OnnxGraph(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        input_name=graph_input.name,
        output_name=output_name,
        obs_shape=(dims[3], dims[1], dims[2]) if channels_last else tuple(dims[1:]),
        num_actions=output_shape[1],
        num_parameters=sum(math.prod(t.dims) for t in weights.values() if t.data_type != onnx.TensorProto.INT64),
        takes_bytes=dtype == "UINT8",
        channels_last=channels_last,
        is_single=dims[0] == 1,
        divide_by=_divide_by(path, model),
    )


def _only_input_and_output(
    path: Path, model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]
) -> tuple[onnx.ValueInfoProto, str]:
    inputs = [i for i in model.graph.input if i.name not in weights]  # old files list their weights as inputs too
    outputs = list(model.graph.output)
    if len(outputs) > 1:
        outputs = [o for o in outputs if o.name in OUTPUT_NAMES]
    if len(inputs) != 1 or len(outputs) != 1:
        raise BadFile(
            f"{path}: expected one input and one output (or one named {', '.join(OUTPUT_NAMES)}), found"
            f" {[i.name for i in inputs]} and {[o.name for o in model.graph.output]}; export it with those alone"
        )
    return inputs[0], outputs[0].name


def _inferred_shapes(path: Path, model: onnx.ModelProto, input_name: str, batch: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of everything that is computed from a batch, by name, once all are known and small."""
    # The file's own claims about shapes are removed, and the batch is closed.
    closed = onnx.ModelProto()
    closed.CopyFrom(model)
    del closed.graph.value_info[:]
    next(i for i in closed.graph.input if i.name == input_name).type.tensor_type.shape.dim[0].dim_value = batch
    for output in closed.graph.output:
        output.type.tensor_type.ClearField("shape")
    shapes: dict[str, tuple[int, ...]] = {}
    # The values of shapes are followed only once their number is known to be small.
    for data_prop in (False, True):
        inferred = onnx.shape_inference.infer_shapes(closed, strict_mode=True, data_prop=data_prop).graph
        types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
        shapes = {
            name: tuple(d.dim_value for d in t.shape.dim)
            for name, t in types.items()
            if t.HasField("shape") and all(d.HasField("dim_value") for d in t.shape.dim)
        }
        if (numbers := _num_numbers(shapes)) > MAX_NUMBERS:
            raise BadFile(f"{path}: unsafe, one observation makes {numbers:,} numbers; do not use it")
    computed = [name for node in model.graph.node for name in node.output if name]
    if unknown := [name for name in computed if name not in shapes]:
        raise BadFile(f"{path}: the size of {unknown[0]!r} is not known in advance; export it with fixed sizes")
    return shapes


def _num_numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _divide_by(path: Path, model: onnx.ModelProto) -> float:
    text = {p.key: p.value for p in model.metadata_props}.get("policykd.divide_by", "1")
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise BadFile(f"{path}: its metadata policykd.divide_by is {text!r}, expected a positive number such as 255")
    return number
