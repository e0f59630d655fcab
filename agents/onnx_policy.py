"""A policy in an ONNX file, run by ONNX Runtime on the CPU."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policykd.agents.networks import check_obs
from policykd.agents.onnx_session import backend, open_session
from policykd.io.files import BadFile
from policykd.io.typed import one_line


class OnnxPolicy:
    """An ONNX file as a `Policy`; the file is checked before anything in it runs (see `onnx_graph.py`).

    The graph has one input, `(batch, channels, height, width)`, `(batch, height, width, channels)` or
    `(batch, features)`, and one output (or one named `scores`, `logits` or `q_values`), `(batch, num_actions)`. A uint8
    input gets the frames unchanged, a float32 input gets them from 0.0 to 255.0, or divided by the number in its
    metadata `policykd.divide_by`.
    """

    temperature = 1.0
    """`load_teacher` returns a `Teacher` with the temperature of the algorithm on the file's card"""

    def __init__(self, path: str | Path, *, content: bytes | None = None, num_threads: int | None = None) -> None:
        """Reads a file and opens a session.

        Args:
            path: the file; with `content`, only its name in error messages.
            content: a graph that policykd has exported from a network. Its outputs are not checked, so that they are as
                finite as the network's own.
            num_threads: CPU threads per call; by default torch's.

        Raises:
            BadFile: missing, damaged, foreign or unsafe file.
            ValueError: the packages onnx and onnxruntime are not installed.
        """
        self.path = Path(path)
        self._is_file = content is None
        try:
            import onnxruntime.capi.onnxruntime_pybind11_state as ort  # type: ignore[import-untyped]

            from policykd.agents.onnx_graph import read_onnx_graph
        except ImportError as error:
            raise ValueError(f"{path}: ONNX teachers need another package: pip install 'policykd[onnx]'") from error
        self._graph = read_onnx_graph(self.path, content)
        # The runtime's exceptions have no base class of their own.
        self._errors = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented, ort.RuntimeException)
        try:
            self._session = open_session(self._graph.content, num_threads or torch.get_num_threads())
        except self._errors as error:
            raise BadFile(f"{path}: ONNX Runtime cannot run it ({one_line(str(error))}); export it again") from error
        self.backend = backend()
        self.sha256 = self._graph.sha256
        self.obs_shape = self._graph.obs_shape
        self.num_actions = self._graph.num_actions
        self.num_parameters = self._graph.num_parameters

    def to(self, device: torch.device | str) -> "OnnxPolicy":
        """Returns the policy unchanged: the session stays on the CPU, outputs go to the observations' device."""
        return self

    def __call__(self, obs: Tensor, /) -> Tensor:
        """Returns logits or Q-values, float32 `(batch, num_actions)`, of uint8 frames or float vectors.

        Raises:
            ValueError: observations of another shape or dtype, or not finite.
            BadFile: the graph fails on this batch, or returns another shape.
            FloatingPointError: outputs of a file that are not finite.
        """
        check_obs(obs, self.obs_shape)
        rows = self._rows(obs)
        # A graph exported with a batch of 1 is called once per observation.
        parts = np.split(rows, len(rows)) if self._graph.is_single else [rows]
        outputs = [self._graph.output_name]
        try:
            found = [self._session.run(outputs, {self._graph.input_name: part})[0] for part in parts]
        except self._errors as error:
            reason = one_line(str(error))
            raise BadFile(f"{self.path}: fails on a batch of {len(rows)} ({reason}); export it again") from error
        outputs_BA = np.concatenate(found)
        if outputs_BA.shape != (len(obs), self.num_actions):
            raise BadFile(
                f"{self.path}: {len(obs)} observations give {outputs_BA.shape}, expected"
                f" {(len(obs), self.num_actions)}; export it with an open batch"
            )
        finite_B = np.isfinite(outputs_BA).all(axis=1)
        if self._is_file and not finite_B.all():
            raise FloatingPointError(
                f"{self.path}: outputs of observation {int(finite_B.argmin())} of {len(obs)} are NaN or infinite; the"
                " agent is broken, take another one"
            )
        return torch.from_numpy(outputs_BA).to(obs.device, torch.float32)

    def _rows(self, obs: Tensor) -> np.ndarray:
        """Returns observations as the graph takes them."""
        if self._graph.takes_bytes and obs.dtype != torch.uint8:
            raise ValueError(f"{self.path}: observations are {obs.dtype}, expected uint8 from 0 to 255")
        # A runtime's ReLU may turn NaN into 0, which would become an action.
        if obs.is_floating_point() and not obs.isfinite().all():
            raise ValueError("observations are NaN or infinite, expected finite numbers")
        if not self._graph.takes_bytes:
            obs = obs.float() / self._graph.divide_by
        if self._graph.channels_last:
            # policykd's frames are channels first.
            obs = obs.movedim(1, -1)
        return np.ascontiguousarray(obs.detach().cpu().numpy())
