"""States for a comparison: those that a distillation visits, kept as the dataset that all rows are fitted to."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from policykd.agents.student import make_student
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.evaluation.results import about
from policykd.export.compiled import compile_policy
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL, at_temperature
from policykd.legacy.schedules import WarmupCosine
from policykd.legacy.states import StateSource
from policykd.legacy.train_state import make_learner
from policykd.runs.folder import CONFIG, start_run
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.storage.generations import has_generations


@dataclass(frozen=True)
class Collection:
    """Visits states as `scripts/distill_atari.py` does by default: by the teacher first, then by a 7 % student."""

    rounds: int = 10
    """times to visit, then fit the student that visits the next ones"""
    states_per_round: int = 8000
    """states to visit in a round"""
    updates_per_round: int = 700
    """gradient steps of that student in a round"""

    def __call__(
        self, folder: Path, teacher: Teacher, game: str, states: StateSource, *, seed: int, threads: int
    ) -> None:
        """Fills `folder` with what `open_dataset` reads; goes on where it was stopped.

        Raises:
            KeyboardInterrupt: a signal has come; the rounds before are saved.
        """
        with closing(make_atari(game, 16, seed, num_workers=threads)) as envs:
            teacher = compile_policy(teacher, envs.reset())
            student = make_student("7%", teacher.num_actions, seed=seed)
            learner = make_learner(student, envs, capacity=self.rounds * self.states_per_round, seed=seed)
            if has_generations(folder / "checkpoints"):
                restore_checkpoint(learner, folder / "checkpoints")
            elif not (folder / CONFIG).is_file():
                start_run(folder, {"game": game, "teacher": about(teacher)}, machine={"threads": threads})
            rounds = distill(
                teacher,
                learner,
                loss=at_temperature(ForwardKL(), teacher.temperature),
                states=states,
                learning_rate=WarmupCosine(2e-3),
                rounds=self.rounds,
                states_per_round=self.states_per_round,
                updates_per_round=self.updates_per_round,
                temperature=teacher.temperature,
                threads=threads,
            )
            for _ in tqdm(rounds, total=self.rounds, initial=learner.round, unit="round", desc="states"):
                save_checkpoint(learner, folder / "checkpoints")
