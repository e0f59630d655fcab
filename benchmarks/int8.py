"""Agreement of each form of int8 with the float32 policy, on states of its own games: the table in docs/export.md.

python benchmarks/int8.py bundled:ppo runs/Pong/pong
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.evaluation.policies import infer_game, load_named_policy
from policykd.evaluation.real_states import on_policy_states
from policykd.export.formats import ExportSource
from policykd.export.int8 import quantize_static, quantize_weights
from policykd.export.onnx import to_onnx

FORMS: dict[str, Callable[[bytes, np.ndarray], bytes]] = {
    "int8 weights": quantize_weights,
    "int8 weights and activations": quantize_static,
}


@dataclass(frozen=True)
class Args:
    """Measures how many actions each form of int8 keeps."""

    policies: Annotated[tuple[str, ...], tyro.conf.Positional] = ("bundled:ppo", "bundled:dqn")
    """runs or teachers"""
    game: str = "Pong"
    """game of the teachers"""
    states: int = 2000
    """states to calibrate on, and other states to compare on"""
    seeds: int = 2
    """repetitions with other games"""


def agreement(policy: OnnxPolicy, expected_B: Tensor, obs: Tensor) -> float:
    """Returns the share of states in which a policy takes the expected action, ties included."""
    actions_B = torch.cat([policy(batch).argmax(dim=1) for batch in obs.split(256)])
    return float((actions_B == expected_B).float().mean())


@torch.inference_mode()
def main(args: Args) -> None:
    """Prints one line per policy, form and seed."""
    for ref in args.policies:
        game = infer_game([ref], args.game)
        source = ExportSource(load_named_policy(ref, game).policy, game)
        for seed in range(args.seeds):
            obs = on_policy_states(source.policy, game, args.states, seed=2 * seed)
            calibration = on_policy_states(source.policy, game, args.states, seed=2 * seed + 1).numpy()
            expected_B = torch.cat([source.net(batch).argmax(dim=1) for batch in obs.split(256)])
            for name, quantize in FORMS.items():
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "int8.onnx"
                    path.write_bytes(quantize(to_onnx(source.net), calibration))
                    kept = agreement(OnnxPolicy(path), expected_B, obs)
                print(f"{ref}, seed {seed}, {name}: {kept:.1%} of {args.states:,} actions", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
