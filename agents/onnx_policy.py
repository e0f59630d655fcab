"""A policy in an ONNX file, run by ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policykd.agents.networks import check_obs
from policykd.agents.onnx_graph import OnnxGraph, one_line, read_onnx_graph
from policykd.io.files import BadFile


class OnnxPolicy:
    """Scores actions like every `Policy`; the file is checked before anything in it runs (see `onnx_graph.py`).

    The graph has one input, `(batch, channels, height, width)`, `(batch, height, width, channels)` or
    `(batch, features)`, and one output (or one named `scores`, `logits` or `q_values`), `(batch, num_actions)`. A uint8
    input gets frames as they are, a float32 input gets them from 0.0 to 255.0, or divided by the number in its metadata
    `policykd.divide_by`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._graph = read_onnx_graph(self.path)
        self._session, self._errors = _session(self.path, self._graph)
        self.backend = backend()
        self.sha256 = self._graph.sha256
        self.obs_shape = self._graph.obs_shape
        self.num_actions = self._graph.num_actions
        self.num_parameters = self._graph.num_parameters

    def to(self, device: torch.device | str) -> "OnnxPolicy":
        """Returns itself: the session stays on the CPU, scores go to where the observations are."""
        return self

    def __call__(self, obs: Tensor, /) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`, of uint8 frames or float vectors `(batch, *obs_shape)`.

        Raises:
            ValueError: observations of another shape or kind, or not finite.
            BadFile: the graph does not give scores for this batch.
            FloatingPointError: scores that are not finite.
        """
        check_obs(obs, self.obs_shape)
        rows = self._rows(obs)
        parts = np.split(rows, len(rows)) if self._graph.one_by_one else [rows]
        takes, gives = self._graph.input_name, self._graph.output_name
        try:
            scored = [self._session.run([gives], {takes: part})[0] for part in parts]
        except self._errors as error:
            raise BadFile(f"{self.path}: does not run on a batch of {len(rows)} ({one_line(error)})") from error
        scores_BA = np.concatenate(scored)
        if scores_BA.shape != (len(obs), self.num_actions):
            raise BadFile(
                f"{self.path}: {len(obs)} observations give scores {scores_BA.shape}, expected"
                f" {(len(obs), self.num_actions)}; export it with an open batch"
            )
        if not np.isfinite(scores_BA).all():
            row = int(np.isfinite(scores_BA).all(axis=1).argmin())
            raise FloatingPointError(
                f"{self.path}: scores of observation {row} of {len(obs)} are NaN or infinite; the agent is broken, take"
                " another"
            )
        return torch.from_numpy(scores_BA).to(obs.device, torch.float32)

    def _rows(self, obs: Tensor) -> np.ndarray:
        """Returns observations as the graph takes them."""
        if self._graph.takes_bytes and obs.dtype != torch.uint8:
            raise ValueError(f"{self.path}: observations are {obs.dtype}, expected uint8 from 0 to 255")
        if not self._graph.takes_bytes:
            obs = finite(obs) / self._graph.divide_by
        if self._graph.channels_last:
            obs = obs.movedim(1, -1)
        return np.ascontiguousarray(obs.detach().cpu().numpy())


def backend() -> str:
    """Returns the runtime's name and version, for the record: another runtime's scores differ in the last bits."""
    import onnxruntime  # type: ignore[import-untyped]

    return f"onnxruntime {onnxruntime.__version__}"


def finite(obs: Tensor) -> Tensor:
    """Returns observations as float32; NaN could become an action, since a runtime's ReLU may turn it into 0.

    Raises:
        ValueError: some are not finite.
    """
    if obs.is_floating_point() and not obs.isfinite().all():
        raise ValueError("observations are NaN or infinite, expected finite numbers")
    return obs.detach().float()


def open_session(content: bytes, num_threads: int) -> Any:
    """Returns ONNX Runtime's session of a graph that is known to be harmless, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    # The runtime would read bytes that say ORTM as another format than the one that was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _session(path: Path, graph: OnnxGraph) -> tuple[Any, tuple[type[Exception], ...]]:
    """Returns ONNX Runtime's session and what it raises."""
    try:
        import onnxruntime.capi.onnxruntime_pybind11_state as raised  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path}: ONNX teachers need another package: pip install 'policykd[onnx]'") from error
    errors = (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.NotImplemented, raised.RuntimeException)
    try:
        return open_session(graph.content, torch.get_num_threads()), errors
    except errors as error:
        raise BadFile(f"{path}: ONNX Runtime cannot run it ({one_line(error)}); export it again") from error
