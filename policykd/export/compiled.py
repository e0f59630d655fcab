"""A policy's network run by ONNX Runtime: the same outputs from a CPU core in two thirds of the time or less."""

import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from policykd.agents.ensemble import Ensemble
from policykd.agents.networks import MLP, ConvNet, Net, check_obs
from policykd.agents.onnx_policy import finite
from policykd.agents.onnx_session import backend, open_session
from policykd.agents.teacher import Teacher
from policykd.export.onnx import to_onnx

TOLERANCE = 1e-4
"""maximum difference of an output from torch's, relative to the largest output: float32 has seven digits"""


class CompiledNet:
    """ONNX Runtime session of a network, on the CPU; it keeps the weights that the network had when it was compiled.

    The same observations give the same bits at every call, in any batch. Several threads may call it at once: it does
    not hold Python's lock while it computes.
    """

    def __init__(self, net: Net, *, num_threads: int) -> None:
        self.obs_shape = net.obs_shape
        self.num_actions = net.num_actions
        self.backend = backend()
        self._session = open_session(to_onnx(net), num_threads)

    def to(self, device: torch.device | str) -> "CompiledNet":
        """Returns itself: the session stays on the CPU, outputs move to the observations' device."""
        return self

    def __call__(self, obs: Tensor, /) -> Tensor:
        """Returns logits or Q-values, float32 `(batch, num_actions)`, of uint8 frames or float vectors.

        Raises:
            ValueError: observations of another shape or dtype, or vectors that are not finite.
        """
        check_obs(obs, self.obs_shape)
        # ReLU in ONNX Runtime may turn NaN into 0, so vectors are checked before it sees them.
        rows = obs if len(self.obs_shape) == 3 else finite(obs)
        outputs_BA = self._session.run(["scores"], {"obs": rows.contiguous().cpu().numpy()})[0]
        return torch.from_numpy(outputs_BA).to(obs.device)


@torch.inference_mode()
def compile_net(net: Net, obs: Tensor, *, num_threads: int = 1) -> CompiledNet:
    """Returns the compiled network, after comparing its outputs with torch's on `obs`.

    Within the tolerance a greedy action differs only where two actions are nearly tied. With one thread per call, as
    many callers may run in parallel as there are cores.

    Raises:
        ValueError: the package onnx is not installed.
        FloatingPointError: the outputs differ from torch's.
    """
    compiled = CompiledNet(net, num_threads=num_threads)
    expected_BA = net(obs)
    difference = float((compiled(obs) - expected_BA).abs().max())
    largest = float(expected_BA.abs().max())
    # `not <=` also catches NaN
    if not difference <= TOLERANCE * largest:
        raise FloatingPointError(
            f"{compiled.backend} differs from torch by {difference:.2g} on {len(obs)} observations (largest output"
            f" {largest:.2g}); install another version of onnxruntime, or uninstall it to continue with torch"
        )
    return compiled


def compile_policy(teacher: Teacher, obs: Tensor, *, num_threads: int = 1) -> Teacher:
    """Returns the teacher with ONNX Runtime as its backend, or the teacher itself where that does not apply.

    It applies on the CPU, where onnx and onnxruntime are installed, to networks that policykd rebuilt from an archive;
    of an ensemble each member is compiled. `net` stays the torch network. Several threads may call the result at once.

    Args:
        teacher: the policy to speed up.
        obs: real observations `(batch, *obs_shape)`, on the teacher's device, to compare both backends on.
        num_threads: CPU threads per call.

    Raises:
        FloatingPointError: the backends' outputs differ.
    """
    if isinstance(teacher.net, Ensemble):
        members = [compile_policy(member, obs, num_threads=num_threads) for member in teacher.net.teachers]
        return replace(teacher, session=teacher.net.with_members(members))
    # On a GPU torch stays; so does any network that policykd did not build, such as a policy loaded by SB3 itself.
    is_installed = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))
    if not is_installed or obs.device.type != "cpu" or not isinstance(teacher.net, ConvNet | MLP):
        return teacher
    return replace(teacher, session=compile_net(teacher.net, obs, num_threads=num_threads))
