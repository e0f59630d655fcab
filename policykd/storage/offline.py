"""States that a run starts with: those of a dataset, alone or in addition to those that it collects."""

import time

import torch

from policykd.agents.teacher import Teacher
from policykd.replay import Replay
from policykd.states import BlendedStates, DatasetStates, StateSource
from policykd.storage.dataset import label, load_dataset, open_dataset


def open_replay(
    states: StateSource, teacher: Teacher, game: str, *, room: int, num_envs: int, device: torch.device
) -> Replay | None:
    """Returns a replay of the dataset that a state source names, or None if it names none.

    Raises:
        ValueError: stored states of another number of environments than the new ones.
        BadFile: no dataset, or one of another game.
    """
    if not isinstance(states, DatasetStates | BlendedStates):
        return None
    dataset = open_dataset(states.path)
    if isinstance(states, BlendedStates) and dataset.info.num_envs != num_envs:
        raise ValueError(
            f"{states.path}: collected in {dataset.info.num_envs} environments; pass --num-envs"
            f" {dataset.info.num_envs}, and --states-per-round a multiple of it"
        )
    held_out = states.held_out if isinstance(states, DatasetStates) else 0.0
    num_held_out = max(1, round(held_out * dataset.num_rows)) if held_out else 0
    replay = load_dataset(states.path, teacher, game=game, num_held_out=num_held_out, room=room)
    replay.num_preloaded = len(replay)
    return replay.to(device)


def label_preloaded(replay: Replay, teacher: Teacher) -> None:
    """Labels the states of a dataset that this teacher has not labelled yet, and prints how many those were."""
    if replay.num_preloaded:
        began = time.perf_counter()
        num_labelled = label(replay, teacher)
        seconds = time.perf_counter() - began
        print(f"a dataset of {replay.num_states:,} states, {num_labelled:,} labelled in {seconds:.0f} s", flush=True)
