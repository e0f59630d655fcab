"""A policy's network run by ONNX Runtime: the same outputs from a CPU core in two thirds of the time or less."""

import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from policykd.agents.ensemble import Ensemble
from policykd.agents.networks import MLP, ConvNet, Net
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.teacher import Teacher
from policykd.export.onnx import to_onnx

TOLERANCE = 1e-4
"""maximum difference of an output from torch's, relative to the largest output: float32 has seven digits"""


@torch.inference_mode()
def compile_net(net: Net, obs: Tensor, *, num_threads: int = 1) -> OnnxPolicy:
    """Returns the compiled network with its present weights, after comparing its outputs with torch's on `obs`.

    Within the tolerance a greedy action differs only where two actions are nearly tied. The same observations give the
    same bits at every call, in any batch. With one thread per call, as many callers may run in parallel as there are
    cores: ONNX Runtime does not hold Python's lock while it computes.

    Raises:
        ValueError: the package onnx is not installed.
        FloatingPointError: the outputs differ from torch's.
    """
    compiled = OnnxPolicy("the compiled network", content=to_onnx(net), num_threads=num_threads)
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
