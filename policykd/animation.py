"""A film of a policy at play, as an animated GIF."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from policykd.agents.files import write_atomically
from policykd.agents.interrupts import check_interrupted
from policykd.agents.policy import Policy, greedy
from policykd.envs.atari import make_atari
from policykd.evaluation import PROTOCOLS


def play_to_gif(policy: Policy, game: str, path: Path, *, seed: int = 0, num_steps: int = 600, every: int = 2) -> None:
    """Writes the first `num_steps` agent steps (15 a second) of one sticky, greedy game.

    Every `every`th is a picture.
    """
    how = PROTOCOLS["sticky_greedy"]
    envs = make_atari(game, 1, seed, noop_max=how.noop_max, repeat_action_probability=how.repeat_action_probability)
    obs, screens = envs.reset(), list[np.ndarray]()
    device = next((p.device for p in getattr(policy, "parameters", list)()), torch.device("cpu"))
    for _ in range(num_steps):
        check_interrupted()
        screens.append(envs.screens()[0])
        with torch.inference_mode():
            step = envs.step(greedy(policy(obs.to(device)).cpu()))
        obs = step.obs
        if step.episodes:
            break
    palette = Image.fromarray(np.concatenate(screens[:: max(1, len(screens) // 8)])).quantize(64)
    pictures = []
    for screen in screens[::every]:
        check_interrupted()
        pictures.append(Image.fromarray(screen).quantize(palette=palette, dither=Image.Dither.NONE))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=every * 1000 // 15,
        loop=0,
        optimize=False,
    )
    write_atomically(path, buffer.getvalue())
