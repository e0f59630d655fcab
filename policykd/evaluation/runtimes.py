"""Runtimes that can run a policy: SB3, torch, ONNX Runtime, NumPy and C, each opened from a file.

As a program it measures them in a process of its own, whose environment sets the number of threads:
`python -m policykd.evaluation.runtimes start RUNTIME FILE OBSERVATIONS`, or `benchmark REQUEST`. It prints JSON. Each
function imports what its runtime needs and no more, since start-up time and memory are measured too.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    ActFn = Callable[[np.ndarray], np.ndarray]
    """maps frames uint8 `(batch, 4, 84, 84)` to the best actions `(batch,)`"""

OBS_SHAPE = (4, 84, 84)
OBS_BYTES = 4 * 84 * 84
BATCH_SIZE = 256
"""observations per call where throughput is measured"""


def open_sb3(path: Path) -> "ActFn":
    """Returns SB3's `predict` of an archive that is named after its algorithm, such as `PPO.zip`."""
    import importlib

    library = importlib.import_module("sb3_contrib" if path.stem == "QRDQN" else "stable_baselines3")
    model = getattr(library, path.stem).load(path, device="cpu")
    return lambda obs: model.predict(obs, deterministic=True)[0]


def open_torch(path: Path) -> "ActFn":
    """Returns eager torch, for a student's folder or a teacher's archive."""
    import torch

    from policykd.agents.student import load_student
    from policykd.agents.teacher import load_teacher

    policy = load_student(path) if (path / "student.json").is_file() else load_teacher(path)

    def act(obs: "np.ndarray") -> "np.ndarray":
        with torch.inference_mode():
            actions: np.ndarray = policy(torch.from_numpy(obs)).argmax(1).numpy()
            return actions

    return act


def open_onnx(path: Path) -> "ActFn":
    """Returns an ONNX Runtime session with one thread."""
    from policykd.agents.onnx_session import open_session

    # One thread, so that it does not slow down the runtimes that are timed in between.
    session = open_session(path.read_bytes(), 1)
    input_name = session.get_inputs()[0].name
    return lambda obs: session.run(None, {input_name: obs})[0].argmax(1)


def open_numpy(path: Path) -> "ActFn":
    """Returns an `.npz` file in the runtime next to it, `numpy_policy.py`, as a user imports it."""
    sys.path.insert(0, str(path.parent))
    import numpy_policy  # type: ignore[import-not-found]

    policy = numpy_policy.load(path)
    return lambda obs: policy(obs).argmax(1)


def open_c(path: Path) -> "ActFn":
    """Returns the compiled function of a shared library."""
    import ctypes

    import numpy

    act = ctypes.CDLL(str(path)).act
    act.argtypes = [ctypes.c_void_p]
    act.restype = ctypes.c_int

    def act_on_batch(obs: "np.ndarray") -> "np.ndarray":
        address = obs.ctypes.data
        return numpy.array([act(address + i * OBS_BYTES) for i in range(len(obs))])

    return act_on_batch


RuntimeName = Literal["sb3", "torch", "onnx", "int8", "numpy", "c"]
RUNTIMES: dict[RuntimeName, tuple[str, Callable[[Path], "ActFn"]]] = {
    "sb3": ("SB3 predict", open_sb3),
    "torch": ("torch", open_torch),
    "onnx": ("ONNX Runtime", open_onnx),
    "int8": ("ONNX Runtime, int8", open_onnx),
    "numpy": ("NumPy", open_numpy),
    "c": ("C", open_c),
}
"""name -> label in tables, function that opens a policy's file"""


def measure_start(runtime: RuntimeName, path: Path, observations: Path) -> tuple[float, float]:
    """Returns the time of the first action, on the clock that all processes share, and this process's peak memory."""
    frames = observations.read_bytes()[:OBS_BYTES]
    if runtime == "c":  # the library needs no NumPy
        import ctypes

        ctypes.CDLL(str(path)).act(frames)
    else:
        import numpy

        RUNTIMES[runtime][1](path)(numpy.frombuffer(frames, numpy.uint8).reshape(1, *OBS_SHAPE).copy())
    return time.monotonic(), peak_megabytes()


def benchmark(
    observations: str, files: list[tuple[RuntimeName, str, list[int]]], rounds: int, calls_per_round: int
) -> list[dict[str, object]]:
    """Returns batch-1 latency, throughput and agreement of each file, or the reason why there are none.

    Each file is a runtime, a path, and the actions that the policy itself takes on the observations.
    """
    import numpy

    from policykd.evaluation.costs import TimingOptions, measure_latencies, on_next

    obs = numpy.frombuffer(Path(observations).read_bytes(), numpy.uint8).reshape(-1, *OBS_SHAPE).copy()
    act_fns: dict[str, ActFn] = {}
    measured: list[dict[str, object]] = []
    for i, (runtime, path, own_actions) in enumerate(files):
        try:
            act = RUNTIMES[runtime][1](Path(path))
            measured.append({"same_actions": float(numpy.mean(act(obs) == own_actions))})
            act_fns[str(i)] = act
        except Exception as error:  # one runtime's failure, whatever it raises, must not stop the others
            measured.append({"reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]})

    # Latency: one observation per call, another one each time.
    singles = [obs[i : i + 1] for i in range(len(obs))]
    single_options = TimingOptions(rounds=rounds, calls_per_round=calls_per_round)
    single = measure_latencies({name: on_next(act, singles) for name, act in act_fns.items()}, single_options)
    # Throughput: fewer calls, as each takes as long as hundreds of the others.
    batch_options = TimingOptions(rounds=min(rounds, 5), calls_per_round=5, warm_up=1)
    batches = measure_latencies({name: on_next(act, [obs]) for name, act in act_fns.items()}, batch_options)
    for name in act_fns:
        measured[int(name)] |= {**vars(single[name]), "states_per_second": 1e6 * len(obs) / batches[name].median_us}
    return measured


def peak_megabytes() -> float:
    """Returns the peak memory of this process, MB; Linux's `ru_maxrss` would include its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def main(command: str, *arguments: str) -> None:
    """Prints a measurement as JSON."""
    if command == "start":
        runtime, path, observations = arguments
        assert runtime in RUNTIMES
        print(json.dumps(measure_start(runtime, Path(path), Path(observations))))
    else:
        print(json.dumps(benchmark(**json.loads(Path(arguments[0]).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
