"""Checkpoints of a distillation run: it resumes from the last completed round with bit-identical results.

A checkpoint is a generation (`policykd.storage.generations`): weights, optimizer and random generators in one
safetensors file, counters and environments in one JSON file, and a shard for the states of every round.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from policykd.io.typed import parse_json, to_json
from policykd.storage.generations import Count, Manifest, Origin, ShardEntry, commit, describe, last, recover
from policykd.train_state import Rollout, TrainState


@dataclass(frozen=True)
class RunProgress:
    """Content of `progress-NNNNNN.json`: everything in a checkpoint that is neither a tensor nor a stored state."""

    round: Count
    num_updates: Count
    envs: dict[str, Any]
    """state of the environments: JSON that only they understand"""
    episode_starts: Annotated[tuple[bool, ...], Field(min_length=1)]
    rollout: Rollout | None
    student_returns: tuple[float, ...]
    num_student_steps: Count


def save_checkpoint(state: TrainState, folder: Path, origin: Origin | None = None) -> None:
    """Writes the training state after a round; of the replay only the new states.

    Args:
        state: after a completed round.
        folder: created if missing.
        origin: game and teacher, so that others can read the folder as a dataset (`open_dataset`).

    Raises:
        ValueError: the folder holds the checkpoints of another run.
        OSError: no space left or no permission; the previous checkpoint stays valid.
    """
    previous = last(folder, "round", max_position=state.round)
    shards = previous.manifest.shards if previous else dict[str, ShardEntry]()
    # The rows of a dataset that the run started with stay in that dataset.
    num_saved = state.replay.num_preloaded + sum(shard.num_rows for shard in shards.values())
    tensors = {f"{prefix}{key}": tensor for prefix, m in _modules(state) for key, tensor in m.state_dict().items()}
    tensors |= optimizer_tensors(state.optimizer)
    # Without the generators' states a resumed run would draw other actions and batches.
    tensors["action_generator"] = state.action_generator.get_state()
    tensors["batch_generator"] = state.batch_generator.get_state()
    rollout = state.rollout
    if rollout:
        # JSON has no NaN, the mean of a metric that no state of the round had.
        finite = {name: value for name, value in rollout.metrics.items() if math.isfinite(value)}
        rollout = replace(rollout, metrics=finite)
    progress = RunProgress(
        round=state.round,
        num_updates=state.num_updates,
        envs=state.envs.state(),
        episode_starts=tuple(state.episode_starts_B.tolist()),
        rollout=rollout,
        student_returns=tuple(state.student_returns),
        num_student_steps=state.num_student_steps,
    )
    manifest = Manifest(
        unit="round",
        position=state.round,
        shards=shards,
        states=describe(state.replay, origin or Origin(f"the run {folder.absolute().parent.name}")),
    )
    files = {"model.safetensors": pack_tensors(tensors), "progress.json": to_json(progress, indent=None)}
    new_rows = state.replay.arrays(num_saved) if num_saved < len(state.replay) else {}
    commit(folder, previous, manifest, files, new_rows, first_row=num_saved)


def restore_checkpoint(state: TrainState, folder: Path) -> None:
    """Brings a fresh training state to that of the newest intact checkpoint.

    Raises:
        BadFile: no checkpoint, or none that is intact.
    """
    generation = recover(folder, "round")
    progress = parse_json(RunProgress, generation.read_kind("progress"), folder)
    num_rows = sum(shard.num_rows for shard in generation.manifest.shards.values())
    state.replay.reserve(len(state.replay) + num_rows)
    for _, arrays in generation.read_shards():
        state.replay.extend(arrays)
    tensors = load_tensors(generation.read_kind("model"))
    for prefix, module in _modules(state):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    restore_optimizer(state.optimizer, tensors)
    state.action_generator.set_state(tensors["action_generator"])
    state.batch_generator.set_state(tensors["batch_generator"])
    # The environments continue in the middle of their episodes.
    state.obs = state.envs.restore(progress.envs)
    state.episode_starts_B = torch.tensor(progress.episode_starts)
    state.round = progress.round
    state.num_updates = progress.num_updates
    state.rollout = progress.rollout
    state.student_returns = list(progress.student_returns)
    state.num_student_steps = progress.num_student_steps


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns tensors as a safetensors file."""
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state under the names `optimizer.<parameter>.<slot>`."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{key}": torch.as_tensor(v) for index, slot in slots for key, v in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` returned."""
    state = optimizer.state_dict()
    state["state"] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            weights = parameters[int(index)]
            # Fused Adam pairs weights and moments by their memory order, so both need the same memory format.
            if tensor.shape == weights.shape:
                tensor = torch.empty_like(weights).copy_(tensor)
            state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)


def _modules(state: TrainState) -> list[tuple[str, nn.Module]]:
    """Returns the trained modules by the prefix of their tensors: the student, and a loss with weights of its own."""
    return [("student.", state.student), *([("loss.", state.loss_module)] if state.loss_module else [])]
