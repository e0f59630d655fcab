"""A module of the user's as an ONNX file, by way of torch's own export."""

import logging
import warnings

import torch

from policykd.agents.networks import UserNet

_OPSET = 20


def traced_onnx(net: UserNet) -> bytes:
    """Returns the module as an ONNX model like `to_onnx`'s: `obs` in, `scores` out, any batch, weights inside.

    Raises:
        ValueError: the package onnxscript is missing, or torch cannot export the module.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX export of a module needs another package: pip install 'policykd[onnx]'") from error
    name, is_training = type(net.module).__name__, net.training
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations, on the way
            program = torch.onnx.export(
                net.eval(),
                (net.blank_obs(2),),
                input_names=["obs"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString(deterministic=True)
        return content
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{name}: torch.onnx.export fails ({reason}); use operators that it knows") from error
    finally:
        log.setLevel(level)
        net.train(is_training)
