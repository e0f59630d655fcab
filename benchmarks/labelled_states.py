"""States with a teacher's outputs, for benchmarks that train offline."""

import torch

from policykd.agents.policy import sample
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.replay import Replay


@torch.inference_mode()
def labelled_states(game: str, teacher: Teacher, num_states: int, seed: int, *, teacher_plays: bool) -> Replay:
    """Returns states of 16 parallel games, labelled by the teacher.

    Args:
        game: an Atari game.
        teacher: labels every state.
        num_states: a multiple of 16.
        seed: seed of games and actions.
        teacher_plays: sample the teacher's actions instead of random ones.
    """
    envs = make_atari(game, 16, seed)
    replay = Replay(num_states, 16, envs.num_actions, envs.obs_shape, stack=4, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    obs = envs.reset()
    starts_B = torch.ones(16, dtype=torch.bool)
    while len(replay) < num_states:
        outputs_BA = teacher(obs)
        replay.add(obs, starts_B, outputs_BA)
        if teacher_plays:
            actions_B = sample(outputs_BA / teacher.temperature, generator)
        else:
            actions_B = torch.randint(envs.num_actions, (16,), generator=generator)
        step = envs.step(actions_B)
        obs = step.obs
        starts_B = step.starts_B
    envs.close()
    return replay
