"""A network of ours run by ONNX Runtime: the same scores from a CPU core in two thirds of the time or less."""

import torch
from torch import Tensor

from policykd.agents.networks import check_obs
from policykd.agents.onnx_policy import backend, finite, open_session
from policykd.agents.shapes import Net
from policykd.export.onnx import to_onnx

TOLERANCE = 1e-4
"""the largest difference from torch's scores, as a share of the largest score"""


class CompiledNet:
    """Scores as the network did that it was made from, on the CPU; later changes of its weights do not come through.

    The same observations give the same bits at every call. Several threads may call it at once: it holds no lock of
    Python's while it computes.
    """

    def __init__(self, net: Net, *, num_threads: int) -> None:
        self.obs_shape, self.num_actions = net.obs_shape, net.num_actions
        self.backend = backend()
        self._session = open_session(to_onnx(net), num_threads)

    def to(self, device: torch.device | str) -> "CompiledNet":
        """Returns itself: the session stays on the CPU, scores go to where the observations are."""
        return self

    def __call__(self, obs: Tensor, /) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`, of uint8 frames or float vectors `(batch, *obs_shape)`.

        Raises:
            ValueError: observations of another shape or kind, or vectors that are not finite.
        """
        check_obs(obs, self.obs_shape)
        rows = obs if len(self.obs_shape) == 3 else finite(obs)
        scores_BA = self._session.run(["scores"], {"obs": rows.contiguous().cpu().numpy()})[0]
        return torch.from_numpy(scores_BA).to(obs.device)


@torch.inference_mode()
def compile_net(net: Net, obs: Tensor, *, num_threads: int = 1) -> CompiledNet:
    """Returns the network compiled, once it has scored these observations as torch does.

    A best action can then differ only where two are nearly tied: a score and its rival each move by the tolerance.

    Args:
        net: whose weights are taken as they are now.
        obs: to try both on, `(batch, *obs_shape)`.
        num_threads: for one call; with one, as many callers may run side by side as there are cores.

    Raises:
        ValueError: the packages onnx and onnxruntime are missing.
        FloatingPointError: another result than torch's.
    """
    compiled = CompiledNet(net, num_threads=num_threads)
    expected_BA, found_BA = net(obs), compiled(obs)
    difference, largest = float((found_BA - expected_BA).abs().max()), float(expected_BA.abs().max())
    if not difference <= TOLERANCE * largest:
        raise FloatingPointError(
            f"{compiled.backend} scores {len(obs)} observations differently from torch, by {difference:.2g} where the"
            f" largest score is {largest:.2g}; take another version of it, or uninstall it to go on with torch"
        )
    return compiled
