"""A policy in an ONNX file, run by ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policykd.agents.onnx_graph import OnnxGraph, one_line, read_onnx_graph


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
            ValueError: observations of another shape or kind, or scores that are not numbers.
        """
        if tuple(obs.shape[1:]) != self.obs_shape:
            raise ValueError(f"{self.path}: observations are {tuple(obs.shape[1:])}, expected {self.obs_shape}")
        rows = self._rows(obs)
        parts = np.split(rows, len(rows)) if self._graph.one_by_one else [rows]
        takes, gives = self._graph.input_name, self._graph.output_name
        try:
            scored = [self._session.run([gives], {takes: part})[0] for part in parts]
        except self._errors as error:
            raise ValueError(f"{self.path}: does not run on a batch of {len(rows)} ({one_line(error)})") from error
        scores_BA = torch.from_numpy(np.concatenate(scored)).to(obs.device, torch.float32)
        if scores_BA.shape != (len(obs), self.num_actions):
            raise ValueError(
                f"{self.path}: {len(obs)} observations give scores {tuple(scores_BA.shape)}, expected"
                f" {(len(obs), self.num_actions)}; export it with an open batch"
            )
        if not scores_BA.isfinite().all():
            raise ValueError(f"{self.path}: its scores are NaN or infinite; the agent is broken, take another")
        return scores_BA

    def _rows(self, obs: Tensor) -> np.ndarray:
        """Returns observations as the graph takes them."""
        if self._graph.takes_bytes and obs.dtype != torch.uint8:
            raise ValueError(f"{self.path}: observations are {obs.dtype}, expected uint8 frames from 0 to 255")
        if not self._graph.takes_bytes:
            obs = obs.to(torch.float32) / self._graph.divide_by
        if self._graph.channels_last:
            obs = obs.movedim(1, -1)
        return np.ascontiguousarray(obs.detach().cpu().numpy())


def _session(path: Path, graph: OnnxGraph) -> tuple[Any, tuple[type[Exception], ...]]:
    """Returns ONNX Runtime's session and what it raises."""
    try:
        import onnxruntime  # type: ignore[import-untyped]
        from onnxruntime.capi import onnxruntime_pybind11_state as raised  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path}: ONNX teachers need another package: pip install 'policykd[onnx]'") from error
    errors = (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.NotImplemented, raised.RuntimeException)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # The runtime would read bytes that say ORTM as another format than the one that was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])
    except errors as error:
        raise ValueError(f"{path}: ONNX Runtime cannot run it ({one_line(error)}); export it again") from error
    return session, errors
