"""States that a run is given before it begins: a dataset's, alone or beside those that are visited."""

import time

import torch

from policykd.agents.teacher import Teacher
from policykd.legacy.replay import Replay
from policykd.legacy.states import BlendedStates, DatasetStates, StateSource
from policykd.storage.dataset import label, load_dataset
from policykd.storage.manifest import open_dataset


def open_replay(
    states: StateSource, teacher: Teacher, game: str, *, room: int, num_envs: int, device: torch.device
) -> Replay | None:
    """Returns the replay of the dataset that a state source names, with room for more; None if it names none.

    Raises:
        ValueError: stored states of another number of environments, beside live ones.
        BadFile: no dataset of this game.
    """
    if not isinstance(states, DatasetStates | BlendedStates):
        return None
    dataset = open_dataset(states.path)
    if isinstance(states, BlendedStates) and dataset.about.num_envs != num_envs:
        raise ValueError(
            f"{states.path}: was visited in {dataset.about.num_envs} environments; give --num-envs"
            f" {dataset.about.num_envs}, and --states-per-round a multiple of it"
        )
    held_out = states.held_out if isinstance(states, DatasetStates) else 0.0
    replay = load_dataset(
        states.path,
        num_actions=teacher.num_actions,
        obs_shape=teacher.obs_shape,
        game=game,
        teacher_sha256=teacher.sha256,
        num_held_out=max(1, round(held_out * dataset.num_rows)) if held_out else 0,
        room=room,
        device=device,
    )
    replay.num_given = len(replay)
    return replay


def label_given(replay: Replay, teacher: Teacher) -> None:
    """Scores the states of a dataset that this teacher has not scored yet, and says how many they were."""
    if not replay.num_given:
        return
    began = time.perf_counter()
    num_labelled = label(replay, teacher)
    seconds = time.perf_counter() - began
    print(f"a dataset of {replay.num_states:,} states, {num_labelled:,} labelled in {seconds:.0f} s", flush=True)
