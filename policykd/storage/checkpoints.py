"""Saves and restores a learner at the end of a round, so that a run goes on as if nothing had happened.

A checkpoint is a generation of a store: one safetensors file with the student, the optimizer and the random streams, a
shard of the replay for every round, and a manifest with the rest.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from policykd.envs.vector import Episode
from policykd.io.signals import check_interrupted
from policykd.legacy.train_state import Learner, Visit
from policykd.storage.generations import commit, last, packed, read_arrays, read_file, recover
from policykd.storage.shards import compressed

KEYS = ("round", "num_updates", "num_rows", "num_states", "envs", "starts", "visit")


def save_checkpoint(learner: Learner, folder: Path) -> None:
    """Writes the learner's last round into `folder`: its new states as a shard, the rest whole.

    Raises:
        ValueError: the folder holds the checkpoints of another run.
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    before, replay = last(folder, KEYS), learner.replay
    num_saved = before.about["num_rows"] if before else 0
    if num_saved > len(replay):
        raise ValueError(f"{folder}: holds the checkpoints of another run; give another folder")
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in learner.student.state_dict().items()}
    tensors |= {f"beyond.{k}": v for k, v in learner.beyond.state_dict().items()} if learner.beyond else {}
    tensors |= optimizer_tensors(learner.optimizer)
    tensors["action_generator"] = learner.action_generator.get_state()
    tensors["batch_generator"] = learner.batch_generator.get_state()
    files = {"learner.safetensors": packed(tensors)}
    first_new = max(num_saved, replay.num_given)
    if first_new < len(replay):
        files["replay.npz"] = compressed(replay.arrays(first_new))
    commit(
        folder,
        before,
        files,
        kept=before.named("replay") if before else (),
        at=f"round {learner.round}",
        about={
            "round": learner.round,
            "num_updates": learner.num_updates,
            "num_rows": len(replay),
            "num_states": replay.num_states,
            "envs": learner.envs.state(),
            "starts": learner.starts_B.tolist(),
            "visit": asdict(learner.visit) if learner.visit else None,
            "student_returns": learner.student_returns,
            "student_steps": learner.student_steps,
        },
    )


def restore_checkpoint(learner: Learner, folder: Path) -> None:
    """Brings a fresh learner to where `save_checkpoint` saw one: weights, optimizer, replay, games, random streams.

    Raises:
        BadFile: no checkpoint, or none whose files are those that were saved.
    """
    generation = recover(folder, KEYS)
    about = generation.about
    for name in generation.named("replay"):
        check_interrupted()
        learner.replay.extend(read_arrays(generation, name))
    (name,) = generation.named("learner")
    tensors = load_tensors(read_file(generation, name))
    for prefix, module in (("student.", learner.student), ("beyond.", learner.beyond)):
        if module:
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(state)
    restore_optimizer(learner.optimizer, tensors)
    learner.obs = learner.envs.restore(about["envs"])
    learner.starts_B = torch.tensor(about["starts"])
    learner.round, learner.num_updates = about["round"], about["num_updates"]
    learner.student_returns, learner.student_steps = about.get("student_returns", []), about.get("student_steps", 0)
    learner.visit = None
    if about["visit"]:
        episodes = [Episode(**episode) for episode in about["visit"]["episodes"]]
        lists = {key: tuple(about["visit"].get(key, ())) for key in ("teacher_weights", "student_returns")}
        learner.visit = Visit(**{**about["visit"], **lists, "episodes": episodes})
    learner.action_generator.set_state(tensors["action_generator"])
    learner.batch_generator.set_state(tensors["batch_generator"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state under names `optimizer.<parameter>.<slot>`."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{key}": torch.as_tensor(v) for index, slot in slots for key, v in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` returned."""
    state = optimizer.state_dict()
    state["state"] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            weights = parameters[int(index)]
            if tensor.shape == weights.shape:  # in the weights' memory format: fused Adam pairs them as they lie
                tensor = torch.empty_like(weights).copy_(tensor)
            state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)
