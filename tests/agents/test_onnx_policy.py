"""ONNX files: those that other programs export score as the originals do, and hostile ones never get a session."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from policykd.agents import onnx_graph
from policykd.agents.networks import MLP
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari

Weights = dict[str, np.ndarray]


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Weights | None = None,
    *,
    obs: Sequence[int | str] = ("batch", 4),
    scores: Sequence[int | str] = ("batch", 2),
    kind: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Returns a graph from `obs` to `scores`."""
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("obs", kind, obs)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, scores)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def node(kind: str, inputs: str, output: str = "scores", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


MATRIX = np.arange(8, dtype=np.float32).reshape(4, 2)


def linear() -> onnx.ModelProto:
    return model([node("MatMul", "obs w")], {"w": MATRIX})


def convolution(kind: int, *, channels_last: bool = False, batch: int | str = "batch") -> onnx.ModelProto:
    """Returns 8 by 8 patches of frames times random weights, averaged: 6 scores."""
    weights = {"w": np.random.default_rng(0).normal(size=(6, 4, 8, 8)).astype(np.float32)}
    nodes = [
        node("Cast", "obs", "float", to=TensorProto.FLOAT),
        *([node("Transpose", "float", "first", perm=[0, 3, 1, 2])] if channels_last else []),
        node("Conv", "first w" if channels_last else "float w", "features", strides=[8, 8]),
        node("GlobalAveragePool", "features", "mean"),
        node("Flatten", "mean"),
    ]
    shape = (batch, 84, 84, 4) if channels_last else (batch, 4, 84, 84)
    return model(nodes, weights, obs=shape, scores=(batch, 6), kind=kind)


def saved(folder: Path, content: onnx.ModelProto | bytes) -> Path:
    path = folder / "policy.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def export(net: nn.Module, obs: Tensor, path: Path, *, open_batch: bool = True) -> Path:
    axes = {"obs": {0: "batch"}, "scores": {0: "batch"}} if open_batch else None
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the other exporter: 30 times longer
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")  # the shape that nets insist on
        torch.onnx.export(
            net, (obs,), path, dynamo=False, input_names=["obs"], output_names=["scores"], dynamic_axes=axes
        )
    return path


@pytest.fixture(scope="module")
def frames() -> Tensor:
    envs = make_atari("Pong", 4, seed=0)
    obs = [envs.reset()]
    generator = torch.Generator().manual_seed(0)
    obs += [envs.step(torch.randint(6, (4,), generator=generator)).obs for _ in range(60)]
    return torch.cat(obs)


def test_an_exported_teacher_scores_as_it_did(tmp_path: Path, frames: Tensor) -> None:
    teacher = load_teacher("bundled", game="Pong")
    policy = OnnxPolicy(export(teacher.net, frames[:2], tmp_path / "pong.onnx"))  # type: ignore[arg-type]
    assert (policy.obs_shape, policy.num_actions) == ((4, 84, 84), 6)
    assert policy.num_parameters == pytest.approx(1_687_206, abs=2)
    scores_BA = policy(frames)
    assert scores_BA.dtype is torch.float32
    torch.testing.assert_close(scores_BA, teacher(frames), atol=1e-4, rtol=1e-4)
    assert (scores_BA.argmax(dim=1) == teacher(frames).argmax(dim=1)).all()
    torch.testing.assert_close(policy(frames[:1]), scores_BA[:1], atol=1e-4, rtol=1e-4)
    one_by_one = OnnxPolicy(export(teacher.net, frames[:1], tmp_path / "one.onnx", open_batch=False))  # type: ignore[arg-type]
    torch.testing.assert_close(one_by_one(frames[:5]), scores_BA[:5], atol=1e-4, rtol=1e-4)
    loaded = load_teacher(tmp_path / "pong.onnx", game="Pong")
    assert loaded.sha256 == policy.sha256
    assert torch.equal(loaded(frames), scores_BA)


def test_an_exported_mlp_scores_as_it_did(tmp_path: Path) -> None:
    net, obs = MLP(4, (16, 16), 2, activation=nn.Tanh), torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    policy = OnnxPolicy(export(net, obs[:2], tmp_path / "mlp.onnx"))
    assert (policy.obs_shape, policy.num_actions) == ((4,), 2)
    torch.testing.assert_close(policy(obs.double()), net(obs).detach())  # Gymnasium has float64 observations too


class Views(nn.Module):
    """Asks for the batch size and computes the shape from it, as older code does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(4, 8, 8, 4), nn.Linear(8 * 20 * 20, 6)

    def forward(self, obs: Tensor) -> Tensor:
        x = self.conv(obs.float()).relu()
        scores: Tensor = self.dense(x.view(x.size(0), -1))
        return scores


def test_a_shape_that_is_computed_from_the_batch_is_followed(tmp_path: Path, frames: Tensor) -> None:
    net = Views()
    path = export(net, frames[:2], tmp_path / "views.onnx")
    assert "Shape" in {n.op_type for n in onnx.load(path).graph.node}
    torch.testing.assert_close(OnnxPolicy(path)(frames[:9]), net(frames[:9]).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", ["batch", 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT])
def test_bytes_and_floats_channels_first_and_last_score_alike(
    kind: int, channels_last: bool, batch: int | str, tmp_path: Path, frames: Tensor
) -> None:
    policy = OnnxPolicy(saved(tmp_path, convolution(kind, channels_last=channels_last, batch=batch)))
    expected = OnnxPolicy(saved(tmp_path, convolution(TensorProto.UINT8)))(frames[:7])
    assert policy.obs_shape == (4, 84, 84)
    torch.testing.assert_close(policy(frames[:7]), expected, atol=1e-2, rtol=1e-5)  # scores of thousands


def test_the_metadata_say_what_pixels_are_divided_by(tmp_path: Path, frames: Tensor) -> None:
    raw = convolution(TensorProto.FLOAT)
    expected = OnnxPolicy(saved(tmp_path, raw))(frames[:3]) / 255.0
    helper.set_model_props(raw, {"policykd.divide_by": "255"})
    torch.testing.assert_close(OnnxPolicy(saved(tmp_path, raw))(frames[:3]), expected, atol=1e-3, rtol=1e-5)
    helper.set_model_props(raw, {"policykd.divide_by": "nan"})
    with pytest.raises(ValueError, match=r"policykd.divide_by is 'nan', expected a positive number"):
        OnnxPolicy(saved(tmp_path, raw))


def test_one_output_of_several_is_taken_by_its_name(tmp_path: Path) -> None:
    both = linear()
    both.graph.node.append(node("Relu", "scores", "value"))
    both.graph.output.insert(0, helper.make_tensor_value_info("value", TensorProto.FLOAT, ("batch", 2)))
    obs = torch.eye(4) - 2.0
    torch.testing.assert_close(OnnxPolicy(saved(tmp_path, both))(obs), obs @ torch.from_numpy(MATRIX))


def test_a_quantised_policy_runs(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", "obs scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "x"),
        node("DequantizeLinear", "w scale zero", "dequantised"),
        node("MatMul", "x dequantised"),
    ]
    weights: Weights = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8), "w": MATRIX.astype(np.int8)}
    policy = OnnxPolicy(saved(tmp_path, model(nodes, weights)))
    torch.testing.assert_close(policy(torch.eye(4)), torch.from_numpy(MATRIX) / 2.0)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT])
@pytest.mark.parametrize("channels_last", [False, True])
def test_other_observations_are_refused(kind: int, channels_last: bool, tmp_path: Path, frames: Tensor) -> None:
    """X02: another layout, kind or range, whatever the graph itself would take."""
    policy = OnnxPolicy(saved(tmp_path, convolution(kind, channels_last=channels_last)))
    with pytest.raises(ValueError, match=r"observations are \(84, 84, 4\), expected a batch of \(4, 84, 84\)"):
        policy(frames.movedim(1, -1))
    with pytest.raises(ValueError, match=r"observations are \(84, 84\), expected a batch of \(4, 84, 84\)"):
        policy(frames[0])
    for other in (frames / 255.0, frames.float(), frames.long(), frames.bool()):
        with pytest.raises(ValueError, match=rf"observations are {other.dtype}, expected uint8 frames from 0 to 255"):
            policy(other)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_relu_does_not_hide_vectors_that_are_not_finite(number: float, tmp_path: Path) -> None:
    """X02."""
    relu = model([node("MatMul", "obs w", "x"), node("Relu", "x")], {"w": MATRIX})
    obs = torch.eye(4)
    obs[2, 1] = number
    with pytest.raises(ValueError, match="observations are NaN or infinite, expected finite numbers"):
        OnnxPolicy(saved(tmp_path, relu))(obs)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """N02."""
    logarithm = OnnxPolicy(saved(tmp_path, model([node("MatMul", "obs w", "x"), node("Log", "x")], {"w": MATRIX})))
    obs = torch.ones(3, 4)
    assert logarithm(obs).isfinite().all()
    obs[1] = -1.0
    with pytest.raises(FloatingPointError, match=r"policy.onnx: outputs of observation 1 of 3 are NaN or infinite"):
        logarithm(obs)


# Hostile and broken files. Each was first shown to get a session of ONNX Runtime, or to do its harm to a naive reader.


def loop() -> onnx.ModelProto:
    """Returns a policy that never ends."""
    kinds = {"i": TensorProto.INT64, "go": TensorProto.BOOL, "x": TensorProto.FLOAT}
    forever = helper.make_graph(
        [node("Identity", "go", "on"), node("Identity", "x", "y")],
        "body",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, kinds[old], None) for name, old in (("on", "go"), ("y", "x"))],
    )
    return model(
        [node("MatMul", "obs w", "start"), helper.make_node("Loop", ["", "yes", "start"], ["scores"], body=forever)],
        {"w": MATRIX, "yes": np.array(True)},
    )


def branch() -> onnx.ModelProto:
    """Returns a policy with a graph inside a node."""
    inner = helper.make_graph(
        [node("MatMul", "obs w", "out")], "b", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    )
    nodes = [helper.make_node("If", ["yes"], ["scores"], then_branch=inner, else_branch=inner)]
    return model(nodes, {"w": MATRIX, "yes": np.array(True)})


def huge_constant() -> onnx.ModelProto:
    """Returns a policy that asks for 256 GB at its first observation."""
    nodes = [
        node("ConstantOfShape", "size", "huge"),
        node("ReduceMean", "huge", "mean", keepdims=0),
        node("MatMul", "obs w", "x"),
        node("Add", "x mean"),
    ]
    return model(nodes, {"size": np.array([1 << 36]), "w": MATRIX})


def outer_product() -> onnx.ModelProto:
    """Returns a policy that makes 10^12 numbers of 10^6 by broadcasting."""
    nodes = [
        node("Reshape", "n column", "tall"),
        node("Add", "n tall", "square"),
        node("ReduceMean", "square", "mean", keepdims=0),
        node("MatMul", "obs w", "x"),
        node("Add", "x mean"),
    ]
    return model(nodes, {"n": np.zeros(1 << 20, np.float32), "column": np.array([-1, 1]), "w": MATRIX})


def doubling(times: int = 40) -> onnx.ModelProto:
    """Returns a policy that is 2^40 numbers long after forty lines; after 64 the size no longer fits its integer."""
    nodes = [node("Concat", f"x{i} x{i}", f"x{i + 1}", axis=0) for i in range(times)]
    nodes += [node("ReduceMean", f"x{times}", "mean", keepdims=0), node("MatMul", "obs w", "x"), node("Add", "x mean")]
    return model(nodes, {"x0": np.zeros(1, np.float32), "w": MATRIX})


def doubling_shape() -> onnx.ModelProto:
    """Returns the same of integers, which shape inference would follow number by number."""
    nodes = [node("Concat", f"x{i} x{i}", f"x{i + 1}", axis=0) for i in range(40)]
    nodes += [node("Reshape", "obs x40", "y"), node("MatMul", "y w")]
    return model(nodes, {"x0": np.ones(1, np.int64), "w": MATRIX})


def wide_padding() -> onnx.ModelProto:
    """Returns a policy that pads a frame to 10^12 pixels."""
    padded = convolution(TensorProto.FLOAT)
    padded.graph.node[1].attribute.append(helper.make_attribute("pads", [4 << 20] * 4))
    return padded


def power_of_the_batch() -> onnx.ModelProto:
    """Returns a policy that makes batch^4 numbers: one of one observation, 4 * 10^9 of 256."""
    nodes = [node("ReduceMean", "obs axis", "a", keepdims=0)]
    for i, name in enumerate("abc"):
        nodes += [node("Unsqueeze", f"a axis{i + 1}", f"a{i}"), node("Add", f"{name} a{i}", "bcd"[i])]
    nodes += [node("ReduceMean", "d", "mean", keepdims=0), node("MatMul", "obs w", "x"), node("Add", "x mean")]
    axes = {f"axis{i}": np.arange(1, i + 1) for i in (1, 2, 3)}
    return model(nodes, {"axis": np.array([1]), "w": MATRIX, **axes})


def named(tensor: str, **fields: Any) -> onnx.ModelProto:
    broken = linear()
    for key, value in fields.items():
        setattr(broken.graph.initializer[0], key, value)
    assert broken.graph.initializer[0].name == tensor
    return broken


def with_weight(number: float) -> onnx.ModelProto:
    return model([node("MatMul", "obs w")], {"w": np.where(MATRIX == 5.0, np.float32(number), MATRIX)})


def with_function() -> onnx.ModelProto:
    called = model([helper.make_node("Mine", ["obs", "w"], ["scores"], domain="own")], {"w": MATRIX}, domains=["own"])
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opsets = [helper.make_opsetid("", 20)]
    called.functions.append(helper.make_function("own", "Mine", ["a", "b"], ["c"], body, opsets))
    return called


def two_inputs() -> onnx.ModelProto:
    double = model([node("Add", "x other"), node("MatMul", "obs w", "x")][::-1], {"w": MATRIX})
    double.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, (1, 2)))
    return double


def runtime_operator() -> onnx.ModelProto:
    custom = helper.make_node("FusedMatMul", ["obs", "w"], ["scores"], domain="com.microsoft")
    return model([custom], {"w": MATRIX}, domains=["com.microsoft"])


GET_A_SESSION: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "loop": (loop, "unsupported operator 'Loop'"),
    "branch": (branch, "unsupported operator 'If'"),
    "runtime operator": (runtime_operator, "unsupported operator 'com.microsoft.FusedMatMul'"),
    "function": (with_function, "unsafe, it holds functions"),
    "huge constant": (huge_constant, "unsupported operator 'ConstantOfShape'"),
    "outer product": (outer_product, "unsafe, one observation makes 1,099,5"),
    "doubling": (doubling, "unsafe, one observation makes 2,199,0"),
    "doubling shape": (doubling_shape, "unsafe, one observation makes 2,199,0"),
    "wide padding": (wide_padding, "unsafe, one observation makes"),
    "power of the batch": (power_of_the_batch, "memory grows faster than the batch"),
    "NaN": (lambda: with_weight(float("nan")), "'w' holds NaN or infinite weights"),
    "infinity": (lambda: with_weight(float("inf")), "'w' holds NaN or infinite weights"),
    "two inputs": (two_inputs, r"found \['obs', 'other'\] and \['scores'\]"),
    "batch of 3": (lambda: model([node("MatMul", "obs w")], {"w": MATRIX}, obs=(3, 4)), "its batch is fixed to 3"),
    "no batch": (lambda: model([node("MatMul", "obs w")], {"w": MATRIX}, obs=(4,), scores=(2,)), "unsupported input"),
    "int64 input": (
        lambda: model([node("Cast", "obs", "x", to=1), node("MatMul", "x w")], {"w": MATRIX}, kind=TensorProto.INT64),
        "unsupported input",
    ),
    "open features": (
        lambda: model([node("MatMul", "obs w")], {"w": MATRIX}, obs=("batch", "features")),
        "unsupported input",
    ),
    "scores of rank 3": (
        lambda: model([node("Unsqueeze", "obs one")], {"one": np.array([1])}, scores=("batch", 1, 4)),
        r"one observation gives \(1, 1, 4\), expected",
    ),
}


def bare_session(content: bytes) -> Any:
    """Returns a session without a check, and without the optimiser, which would run some of the harm at once."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def mebibytes_grown(action: Callable[[], Any]) -> float:
    """Returns how much more memory an action took at its peak than there was before."""

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak()
    kept = action()  # noqa: F841
    return peak() - before


def refused(path: Path, message: str) -> None:
    """Asserts that a file is refused with one line that names it, quickly and with little memory."""

    def read() -> None:
        with pytest.raises(ValueError, match=message) as raised:
            OnnxPolicy(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert str(raised.value).isprintable()

    began = time.process_time()
    assert mebibytes_grown(read) < 100
    assert time.process_time() - began < 10.0  # of CPU time: an attack on time would take hours


@pytest.mark.parametrize("case", GET_A_SESSION)
def test_what_onnx_runtime_would_run_is_refused(case: str, tmp_path: Path) -> None:
    make, message = GET_A_SESSION[case]
    content = make().SerializeToString()
    assert len(content) < 5 << 20
    assert bare_session(content).get_outputs()
    refused(saved(tmp_path, content), message)


def test_two_of_them_do_their_harm() -> None:
    """The batch's power takes 16 times the memory at twice the batch; the constant is asked for at the first run."""
    session = bare_session(power_of_the_batch().SerializeToString())
    assert mebibytes_grown(lambda: session.run(None, {"obs": np.zeros((80, 4), np.float32)})) > 100
    with pytest.raises(Exception, match=r"(?i)alloc"):
        bare_session(huge_constant().SerializeToString()).run(None, {"obs": np.zeros((1, 4), np.float32)})


def external(location: str) -> onnx.ModelProto:
    elsewhere = linear()
    tensor = elsewhere.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return elsewhere


def test_another_file_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.bin").write_bytes(MATRIX.tobytes())
    monkeypatch.chdir(tmp_path)
    content = external("secret.bin").SerializeToString()
    stolen = bare_session(content).run(None, {"obs": np.eye(4, dtype=np.float32)})
    assert np.array_equal(stolen[0], MATRIX)
    refused(saved(tmp_path, content), "unsafe, 'w' is in another file; export it with external_data=False")
    refused(saved(tmp_path, external("../secret.bin")), "unsafe, 'w' is in another file")
    constant = linear()
    constant.graph.node.insert(
        0, helper.make_node("Constant", [], ["w"], value=external("secret.bin").graph.initializer[0])
    )
    del constant.graph.initializer[:]
    refused(saved(tmp_path, constant), "unsafe, 'w' is in another file")


def test_countless_tiny_messages_are_not_parsed(tmp_path: Path) -> None:
    """A graph of empty nodes: two bytes each in the file, a hundred in memory."""
    content = b"\x3a\x80\x80\x80\x02" + b"\x0a\x00" * (2 << 20)
    refused(saved(tmp_path, content), "unsafe, more than 1,048,576 bytes are not weights")
    assert mebibytes_grown(lambda: onnx.load_model_from_string(content)) > 100
    assert len(onnx.load_model_from_string(content).graph.node) == 2 << 20


def test_a_file_of_two_formats_is_run_as_the_one_that_was_checked(tmp_path: Path) -> None:
    """ONNX Runtime takes a file with ORTM at byte 4 for its own format, in which another graph could hide."""
    polyglot = linear()
    polyglot.producer_name = "ORTM"
    content = polyglot.SerializeToString()
    assert content[4:8] == b"ORTM"
    with pytest.raises(Exception, match="ORT"):
        bare_session(content)
    assert torch.equal(OnnxPolicy(saved(tmp_path, content))(torch.eye(4)), torch.from_numpy(MATRIX))


BROKEN: dict[str, tuple[bytes | Callable[[], onnx.ModelProto], str]] = {
    "empty": (b"", "not a valid ONNX file"),
    "text": (b"hello, I am a policy", "not an ONNX file|not a valid ONNX file"),
    "zip": (b"PK\x03\x04" + bytes(100), "not an ONNX file|not a valid ONNX file"),
    "fewer numbers": (lambda: named("w", raw_data=bytes(8)), r"'w' claims shape \(4, 2\) over fewer numbers"),
    "no numbers": (lambda: named("w", raw_data=b""), r"'w' claims shape \(4, 2\) over fewer numbers"),
    "complex": (lambda: named("w", data_type=TensorProto.COMPLEX64), "'w' has a dtype that no policy needs"),
    "unknown operator": (lambda: model([node("Teleport", "obs")]), "unsupported operator 'Teleport'"),
    "overflowing doubling": (lambda: doubling(66), "not a valid ONNX file.*Integer overflow"),
    "dangling": (lambda: model([node("MatMul", "obs nothing")]), "not a valid ONNX file"),
    "does not fit": (lambda: model([node("MatMul", "obs w")], {"w": MATRIX.T.copy()}), "not a valid ONNX file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    refused(saved(tmp_path, content if isinstance(content, bytes) else content()), message)


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "No such file or directory; give the path of an .onnx file")
    with (tmp_path / "policy.onnx").open("wb") as file:
        file.truncate((64 << 20) + 1)
    refused(tmp_path / "policy.onnx", "larger than 67,108,864 bytes")


def test_no_truncation_and_no_flipped_bit_ends_in_anything_but_a_line(tmp_path: Path) -> None:
    content = convolution(TensorProto.UINT8).SerializeToString()
    weights = content.index(convolution(TensorProto.UINT8).graph.initializer[0].raw_data)
    cases = [content[: int(share * len(content))] for share in (0.1, 0.5, 0.9, 0.999)]
    generator = np.random.default_rng(0)
    for position in generator.integers(weights, size=300):  # where every bit means something
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(generator.integers(8))
        cases.append(bytes(flipped))
    lines = []
    for case in cases:
        try:
            OnnxPolicy(saved(tmp_path, case))
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert all(line.isprintable() and line.startswith(f"{tmp_path}") for line in lines)


def test_without_the_extra_there_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, linear())
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "policykd.agents.onnx_graph")
            without.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=r"another package: pip install 'policykd\[onnx\]'"):
                OnnxPolicy(path)


def test_nothing_on_the_list_makes_arrays_of_a_computed_size() -> None:
    makers = {
        "ConstantOfShape",
        "Expand",
        "Tile",
        "Range",
        "Pad",
        "Resize",
        "Upsample",
        "OneHot",
        "EyeLike",
        "Compress",
    }
    assert not onnx_graph.OPERATORS & (makers | {"Loop", "If", "Scan", "SequenceMap", "RandomNormal", "NonZero"})
