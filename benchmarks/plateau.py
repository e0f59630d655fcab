"""Measures what gets a small student off the plateau: one stored set of states, one budget, several seeds per variant.

`python benchmarks/plateau.py [--seeds 3]` prints the KL on held-out states after 300 updates of 256, for the 7 %
student of the bundled Pong teacher. A quarter of a minute per run on one core.
"""

import statistics
from dataclasses import dataclass

import torch
import tyro
from labelled_states import labelled_states
from torch import nn
from torch.nn import functional as F

from policykd.agents.networks import FrameNet
from policykd.agents.policy import log_policy
from policykd.agents.student import Shape, Student, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.io.machine import prepare_device
from policykd.losses import kl_divergence_B
from policykd.replay import DrawRange, Replay
from policykd.schedules import WarmupCosine

UPDATES = 300


@dataclass(frozen=True)
class Variant:
    """Input scaling, initialization and optimizer settings of one row."""

    centred: bool = False
    """subtract the median of the frames from the pixels"""
    scaled: bool = False
    """divide the pixels by the standard deviation of the frames instead of 255"""
    orthogonal: bool = False
    """initialize as SB3 does"""
    first_width: int = 16
    """channels of the first convolution"""
    learning_rate: float = 1e-3
    """peak learning rate"""
    warmup: float = 0.05
    """fraction of the run that the warm-up takes"""
    batch_size: int = 256
    updates: int = UPDATES

    def student(self, num_actions: int, frames: torch.Tensor, seed: int) -> Student:
        """Returns the untrained student of this variant; `frames` are uint8 `(n, 84, 84)`."""
        torch.manual_seed(seed)
        if self.first_width == 16:
            student = make_student("7%", num_actions, seed=seed)
        else:
            student = Student(Shape((self.first_width, 16, 16), (128,), num_actions, (4, 84, 84)))
        student.fit_input_normalization(frames)
        assert isinstance(student.net, FrameNet)
        if not self.centred:
            student.net.centre.zero_()
        if not self.scaled:
            student.net.scale.fill_(255.0)
        if self.orthogonal:
            for layer in student.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.weight.data.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), 2**0.5))
        return student


VARIANTS = {
    "frames / 255 (as SB3)": Variant(),
    "centred and scaled": Variant(centred=True, scaled=True),
    "centred, / 255": Variant(centred=True),
    "scaled by the spread, not centred": Variant(scaled=True),
    "centred and scaled, learning rate 2e-3": Variant(centred=True, scaled=True, learning_rate=2e-3),
    "frames / 255, orthogonal weights": Variant(orthogonal=True),
    "frames / 255, first layer 32 wide": Variant(first_width=32),
    "frames / 255, batches of 64, 4 x updates": Variant(batch_size=64, updates=4 * UPDATES),
    "frames / 255, learning rate 2e-3": Variant(learning_rate=2e-3),
    "frames / 255, no warm-up": Variant(warmup=1e-9),
    "centred and scaled, learning rate 4e-3": Variant(centred=True, scaled=True, learning_rate=4e-3),
    "centred and scaled, learning rate 8e-3": Variant(centred=True, scaled=True, learning_rate=8e-3),
}


def train(student: Student, replay: Replay, variant: Variant, seed: int) -> None:
    """Trains a student in place, with a plain loop: the optimizer is what is varied."""
    schedule = WarmupCosine(variant.learning_rate, variant.warmup)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    drawn = DrawRange(0, len(replay))
    batches = replay.batches(variant.updates, variant.batch_size, drawn, torch.Generator().manual_seed(seed))
    for update, rows_B in enumerate(batches):
        optimizer.param_groups[0]["lr"] = schedule((update + 1) / variant.updates)
        log_teacher_BA = log_policy(replay.teacher_NA[rows_B])
        log_student_BA = log_policy(student(replay.gather(rows_B)))
        optimizer.zero_grad(set_to_none=True)
        F.kl_div(log_student_BA, log_teacher_BA, log_target=True, reduction="batchmean").backward()
        optimizer.step()


@torch.inference_mode()
def held_out_kl(student: Student, held_out: Replay) -> float:
    """Returns the mean KL(teacher || student) on held-out states, nats."""
    kl_B = [
        kl_divergence_B(log_policy(held_out.teacher_NA[rows_B]), log_policy(student(held_out.gather(rows_B))))
        for rows_B in held_out.states_from(0).split(500)
    ]
    return float(torch.cat(kl_B).mean())


@dataclass(frozen=True)
class Args:
    """Measures variants of input scaling, initialization and optimizer on stored states of Pong."""

    seeds: int = 3
    """runs per variant"""
    variants: str = ""
    """text that the name of a variant must contain"""
    num_states: int = 24_000
    """training states"""
    num_held_out: int = 4_000
    """held-out states, from other games"""


def main(args: Args) -> None:
    """Prints a row per variant."""
    prepare_device("cpu", 1)
    teacher = load_teacher(game="Pong")
    replay = labelled_states("Pong", teacher, args.num_states, 0, teacher_plays=True)
    held_out = labelled_states("Pong", teacher, args.num_held_out, 1, teacher_plays=True)
    print("| variant | median KL | every seed |\n|---|---:|---|")
    for name, variant in VARIANTS.items():
        if args.variants in name:
            kls = [measure(variant, teacher, replay, held_out, seed) for seed in range(args.seeds)]
            print(f"| {name} | {statistics.median(kls):.4f} | {', '.join(f'{kl:.4f}' for kl in kls)} |", flush=True)


def measure(variant: Variant, teacher: Teacher, replay: Replay, held_out: Replay, seed: int) -> float:
    """Returns the held-out KL after one run of a variant, nats."""
    student = variant.student(teacher.num_actions, replay.frames[1:8001:31], seed)
    train(student, replay, variant, seed)
    return held_out_kl(student, held_out)


if __name__ == "__main__":
    main(tyro.cli(Args))
