"""Behavioural cloning with the package `imitation` and its defaults, on the states and actions of the teacher.

Defaults: Adam at 1e-3, batches of 32, entropy bonus 1e-3. The cost of the states is added to that of the training.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from imitation.algorithms.bc import BC  # type: ignore[import-not-found]
from imitation.data.types import Transitions  # type: ignore[import-not-found]
from small_cnn import SmallCNN
from snapshots import SnapshotWriter
from stable_baselines3.common.policies import ActorCriticCnnPolicy


@dataclass(frozen=True)
class Args:
    """Clones a recorded teacher."""

    out: Path
    """folder for the snapshots"""
    demonstrations: Path
    """folder that demonstrations.py wrote"""
    num_states: int = 80_000
    """recorded states to use"""
    batch_size: int = 32
    learning_rate: float = 1e-3
    epochs: int = 100
    seconds: float = 1000.0
    """CPU seconds of training"""
    seed: int = 0


class OutOfTimeError(Exception):
    """Ends the training."""


def main(args: Args) -> None:
    """Trains until the time is up."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    costs = np.load(args.demonstrations / "costs.npy")
    _, cpu, wall = costs[np.searchsorted(costs[:, 0], args.num_states)]
    snapshots = SnapshotWriter(args.out, spent_cpu=cpu, spent_wall=wall)
    observations = np.load(args.demonstrations / "observations.npy", mmap_mode="r")[: args.num_states]
    actions = np.load(args.demonstrations / "actions.npy")[: args.num_states]
    observation_space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    policy = ActorCriticCnnPolicy(
        observation_space,
        gymnasium.spaces.Discrete(6),
        lambda _: args.learning_rate,
        features_extractor_class=SmallCNN,
        net_arch=[],
    )
    seen = np.asarray(observations)
    unused = {"infos": np.array([{}] * len(actions)), "dones": np.zeros(len(actions), bool), "next_obs": seen}
    bc = BC(
        observation_space=observation_space,
        action_space=policy.action_space,
        rng=np.random.default_rng(args.seed),
        policy=policy,
        demonstrations=Transitions(obs=seen, acts=actions, **unused),
        batch_size=args.batch_size,
        optimizer_kwargs={"lr": args.learning_rate},
        device="cpu",
    )
    updates = 0

    def save() -> None:
        tensors = [*policy.features_extractor.parameters(), *policy.action_net.parameters()]
        snapshots.save(tensors, steps=args.num_states, updates=updates)

    def after_batch() -> None:
        nonlocal updates
        updates += 1
        if snapshots.is_due():
            save()
        if snapshots.cpu_seconds() - cpu > args.seconds:
            raise OutOfTimeError

    with suppress(OutOfTimeError):
        bc.train(n_epochs=args.epochs, on_batch_end=after_batch, progress_bar=False)
    save()


if __name__ == "__main__":
    main(tyro.cli(Args))
