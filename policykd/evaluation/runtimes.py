"""What can play a policy: SB3, torch, ONNX Runtime, NumPy, C, each opened from a file, with what it needs and no more.

Run as a program it measures them, in a process of its own whose environment says how many threads there are:
`python -m policykd.evaluation.runtimes start RUNTIME FILE OBSERVATIONS` or `race SPECIFICATION`.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Call = Callable[[np.ndarray], np.ndarray]
    """from frames uint8 `(batch, 4, 84, 84)` to the best actions `(batch,)`"""

OBS_BYTES = 4 * 84 * 84
MANY = 256
"""observations in a batch, where throughput counts"""


def open_sb3(path: Path) -> "Call":
    """Returns SB3's `predict` of an archive that is named after its algorithm, such as `PPO.zip`."""
    import importlib

    library = importlib.import_module("sb3_contrib" if path.stem == "QRDQN" else "stable_baselines3")
    model = getattr(library, path.stem).load(path, device="cpu")
    return lambda obs: model.predict(obs, deterministic=True)[0]


def open_torch(path: Path) -> "Call":
    """Returns torch, eager, of a student's folder or a teacher's archive."""
    import torch

    from policykd.agents.policy import Policy

    policy: Policy
    if (path / "student.json").is_file():
        from policykd.agents.student import load_student

        policy = load_student(path)
    else:
        from policykd.agents.teacher import load_teacher

        policy = load_teacher(path)

    def act(obs: "np.ndarray") -> "np.ndarray":
        with torch.inference_mode():
            actions: np.ndarray = policy(torch.from_numpy(obs)).argmax(1).numpy()
            return actions

    return act


def open_onnx(path: Path) -> "Call":
    """Returns ONNX Runtime's session of a file that `policykd.agents.onnx_graph` has found harmless."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()  # as agents/onnx_policy.py has them, but that one needs torch
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 4
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    takes = session.get_inputs()[0].name
    return lambda obs: session.run(None, {takes: obs})[0].argmax(1)


def open_numpy(path: Path) -> "Call":
    """Returns the runtime that needs NumPy alone, of its `.npz`."""
    from policykd.export.numpy_policy import load

    policy = load(path)
    return lambda obs: policy(obs).argmax(1)


def open_c(path: Path) -> "Call":
    """Returns the compiled function of a shared library."""
    import ctypes

    import numpy

    act = ctypes.CDLL(str(path)).act
    act.argtypes, act.restype = [ctypes.c_void_p], ctypes.c_int

    def actions(obs: "np.ndarray") -> "np.ndarray":
        at = obs.ctypes.data
        return numpy.array([act(at + i * OBS_BYTES) for i in range(len(obs))])

    return actions


RuntimeName = Literal["sb3", "torch", "onnx", "int8", "numpy", "c"]
RUNTIMES: dict[RuntimeName, tuple[str, Callable[[Path], "Call"]]] = {
    "sb3": ("SB3 predict", open_sb3),
    "torch": ("torch", open_torch),
    "onnx": ("ONNX Runtime", open_onnx),
    "int8": ("ONNX Runtime, int8", open_onnx),
    "numpy": ("NumPy", open_numpy),
    "c": ("C", open_c),
}
"""name -> what tables call it, and what opens a policy's file"""


def start(runtime: RuntimeName, path: Path, observations: Path) -> dict[str, float]:
    """Returns when the first action was there, by the clock that all processes share, and the most memory in use."""
    frames = observations.read_bytes()[:OBS_BYTES]
    if runtime == "c":  # which needs no NumPy
        import ctypes

        ctypes.CDLL(str(path)).act(frames)
    else:
        import numpy

        RUNTIMES[runtime][1](path)(numpy.frombuffer(frames, numpy.uint8).reshape(1, 4, 84, 84).copy())
    return {"monotonic": time.monotonic(), "peak_megabytes": peak_megabytes()}


def race(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what each entry (a runtime and a file) takes for one observation and for many, all in turns."""
    import numpy

    from policykd.evaluation.costs import TimingOptions, measure_latencies

    frames = Path(specification["observations"]).read_bytes()
    obs = numpy.frombuffer(frames, numpy.uint8).reshape(-1, 4, 84, 84).copy()
    acts: dict[str, Call] = {}
    measured: list[dict[str, Any]] = []
    for i, entry in enumerate(specification["entries"]):
        try:
            act = RUNTIMES[entry["runtime"]][1](Path(entry["file"]))
            measured.append({"actions": [int(a) for a in act(obs)]})
            acts[str(i)] = act
        except Exception as error:  # whatever a runtime raises: the others are measured all the same
            measured.append({"why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    rounds, calls = specification["rounds"], specification["calls_per_round"]
    options = TimingOptions(rounds=rounds, calls_per_round=calls)
    one = measure_latencies({i: _next_one(act, obs) for i, act in acts.items()}, options)
    some = {i: _all_of(act, obs[:MANY]) for i, act in acts.items()}
    many = measure_latencies(some, TimingOptions(rounds=min(rounds, 5), calls_per_round=5, warm_up=1))
    for name in acts:
        per_second = 1e6 * len(obs[:MANY]) / many[name].median_us
        measured[int(name)] |= {**vars(one[name]), "states_per_second": per_second}
    return measured


def _next_one(act: "Call", obs: "np.ndarray") -> Callable[[], object]:
    """Returns a call on one observation, another one each time."""
    ones = cycle([obs[i : i + 1] for i in range(len(obs))])
    return lambda: act(next(ones))


def _all_of(act: "Call", obs: "np.ndarray") -> Callable[[], object]:
    return lambda: act(obs)


def peak_megabytes() -> float:
    """Returns the most memory that this process had in use, MB.

    Linux's `ru_maxrss` would count what the process had that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def main(what: str, *arguments: str) -> None:
    """Prints what was measured, as JSON."""
    if what == "start":
        runtime, path, observations = arguments
        assert runtime in RUNTIMES
        print(json.dumps(start(runtime, Path(path), Path(observations))))
    else:
        print(json.dumps(race(json.loads(Path(arguments[0]).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
