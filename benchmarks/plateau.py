"""What gets a small student off the plateau: one stored set of states, one budget, several seeds a variant.

`python benchmarks/plateau.py [--seeds 3]` prints the KL on held-out states after 300 updates of 256, for the 7 %
student on the bundled Pong teacher. A quarter of a minute a fit on one core.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from policykd.agents.networks import ConvNet
from policykd.agents.policy import sample
from policykd.agents.student import Shape, Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.cli.command import prepare_device
from policykd.envs.atari import make_atari
from policykd.legacy.loop import compare
from policykd.legacy.losses import ForwardKL
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import WarmupCosine

NUM_STATES, NUM_HELD_OUT, UPDATES = 24_000, 4_000, 300


def visit(game: str, num_states: int, seed: int) -> Replay:
    """Returns states of sampled teacher play; training and held-out sets are other games."""
    teacher, envs = load_teacher(game=game), make_atari(game, 16, seed)
    replay = Replay(num_states, 16, envs.num_actions, envs.obs_shape, stack=4, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    obs, starts_B = envs.reset(), torch.ones(16, dtype=torch.bool)
    while len(replay) < num_states:
        scores_BA = teacher(obs)
        replay.add(obs, starts_B, scores_BA)
        step = envs.step(sample(scores_BA, generator))
        obs, starts_B = step.obs, step.starts_B
    return replay


def fit(
    replay: Replay, student: Student, *, rate: float, batch_size: int, updates: int, warmup: float, seed: int
) -> None:
    schedule, loss = WarmupCosine(rate, warmup), ForwardKL()
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = schedule((update + 1) / updates)
        obs, teacher_BA = replay.sample(batch_size, generator)
        optimizer.zero_grad(set_to_none=True)
        loss(student(obs), teacher_BA).mean().backward()
        optimizer.step()


def scaled(centre: bool, scale: bool) -> Callable[[Student, torch.Tensor], None]:
    def prepare(student: Student, frames: torch.Tensor) -> None:
        assert isinstance(student.net, ConvNet)
        student.fit_input_normalization(frames)
        if not centre:
            student.net.centre.zero_()
        if not scale:
            student.net.scale.fill_(255.0)

    return prepare


def orthogonal(student: Student, frames: torch.Tensor) -> None:
    scaled(False, False)(student, frames)
    for layer in student.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), 2**0.5))


BASE = {"rate": 1e-3, "batch_size": 256, "updates": UPDATES, "warmup": 0.05}
PLAIN, BOTH = scaled(False, False), scaled(True, True)
VARIANTS: dict[str, tuple[Callable[[Student, torch.Tensor], None], dict[str, float], int]] = {
    "frames / 255 (as SB3)": (PLAIN, {}, 16),
    "centred and scaled": (BOTH, {}, 16),
    "centred, / 255": (scaled(True, False), {}, 16),
    "scaled by the spread, not centred": (scaled(False, True), {}, 16),
    "centred and scaled, learning rate 2e-3": (BOTH, {"rate": 2e-3}, 16),
    "frames / 255, orthogonal weights": (orthogonal, {}, 16),
    "frames / 255, first layer 32 wide": (PLAIN, {}, 32),
    "frames / 255, batches of 64, 4 x updates": (PLAIN, {"batch_size": 64, "updates": 4 * UPDATES}, 16),
    "frames / 255, learning rate 2e-3": (PLAIN, {"rate": 2e-3}, 16),
    "frames / 255, no warm-up": (PLAIN, {"warmup": 1e-9}, 16),
    "centred and scaled, learning rate 4e-3": (BOTH, {"rate": 4e-3}, 16),
    "centred and scaled, learning rate 8e-3": (BOTH, {"rate": 8e-3}, 16),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default="", help="only those whose name holds this text")
    args = parser.parse_args()
    prepare_device("cpu", 1)
    replay, held_out = visit("Pong", NUM_STATES, seed=0), visit("Pong", NUM_HELD_OUT, seed=1)
    print("| variant | median KL | every seed |\n|---|---:|---|")
    for name, (prepare, settings, width) in VARIANTS.items():
        if args.variants not in name:
            continue
        kls = []
        for seed in range(args.seeds):
            student = make_student("7%", 6, seed=seed)
            if width != 16:
                torch.manual_seed(seed)
                student = Student(Shape((width, 16, 16), (128,), 6, (4, 84, 84)))
            torch.manual_seed(seed)
            prepare(student, replay.frames[1:8001:31])
            fit(replay, student, seed=seed, **{**BASE, **settings})  # type: ignore[arg-type]
            kls.append(compare(student, held_out, 0, temperature=1.0)[0])
        print(f"| {name} | {statistics.median(kls):.4f} | {', '.join(f'{kl:.4f}' for kl in kls)} |", flush=True)
