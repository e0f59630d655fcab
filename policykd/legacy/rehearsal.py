"""What a run is told, tried before it begins: whether all of it fits, and every schedule at every round."""

from policykd.legacy.auxiliary import BeyondLogits
from policykd.legacy.losses import Loss
from policykd.legacy.schedules import Measured, ReturnGap, ReturnReached, at, scheduled, value
from policykd.legacy.states import StateSource
from policykd.legacy.train_state import Learner


def rehearse(
    learner: Learner,
    *,
    loss: Loss,
    beyond: BeyondLogits,
    states: StateSource,
    rounds: int,
    states_per_round: int,
    batch_size: int,
    rounds_kept: int,
    stored: float,
    teacher_return: float | None,
    random_return: float,
) -> None:
    """Goes through the rounds of a run without playing or learning; the arguments are those of `distill`.

    Raises:
        ValueError: what would end the run on its way, or does not fit what the learner was made for.
    """
    made_for = learner.beyond.active if learner.beyond else ()
    if beyond.active != made_for:
        raise ValueError(f"beyond is {beyond.active}, the learner was made for {made_for}; give both the same weights")
    check_states(learner, states_per_round, batch_size, rounds_kept, stored)
    returns = [None] if teacher_return is None else [None, random_return, teacher_return]
    for k in range(rounds):
        for student_return in returns:
            measured = Measured(student_return, teacher_return, random_return)
            progress, next_progress = k / max(1, rounds - 1), min(1.0, k / max(1, rounds - 2))
            at((loss, beyond), progress, measured)
            now = at(states, next_progress, measured)
            now.student_fraction(next_progress)
            if not 0.0 <= (epsilon := value(getattr(now, "epsilon", 0.0), next_progress)) <= 1.0:
                raise ValueError(f"--states.epsilon is a chance and must lie in [0, 1], not {epsilon}")


def check_states(learner: Learner, states_per_round: int, batch_size: int, rounds_kept: int, stored: float) -> None:
    """Raises ValueError for numbers of states that do not fit the environments, the replay or each other."""
    replay, num_envs = learner.replay, learner.envs.num_envs
    if states_per_round % num_envs:
        raise ValueError(f"states_per_round {states_per_round} is not a multiple of num_envs {num_envs}")
    if not states_per_round:
        if not 0 < replay.num_held_out < len(replay):
            raise ValueError(f"states_per_round 0 needs a replay that holds some states out, not {replay.num_held_out}")
        if rounds_kept:
            raise ValueError(f"--rounds-kept {rounds_kept} needs states that are visited; leave it out with a dataset")
        return
    if (replay.num_given > 0) != (stored > 0.0):
        raise ValueError(f"{stored} of each batch from stored states, and the replay was given {replay.num_given}")
    if stored and not 0 < round(stored * batch_size) < batch_size:
        raise ValueError(
            f"--states.stored {stored} of --batch-size {batch_size} leaves no room for both; give another share"
        )
    if replay.num_envs != num_envs or replay.num_given % num_envs:
        raise ValueError(
            f"the stored states are {replay.num_given} of {replay.num_envs} environments; visit as many at once, not"
            f" {num_envs}"
        )


def follows_return(*things: object) -> bool:
    """Returns whether a schedule in these dataclasses answers to the student's return."""
    return any(isinstance(s, ReturnGap | ReturnReached) for thing in things for _, s in scheduled(thing))


def plays_alone(states: StateSource) -> bool:
    """Returns whether the student plays games of its own by the end of a run, without noise and whatever it scores."""
    if follows_return(states):
        return False
    return states.student_fraction(1.0) == 1.0 and not value(getattr(states, "epsilon", 0.0), 1.0)
