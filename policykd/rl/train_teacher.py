"""Trains a teacher with SB3's own algorithms and the hyperparameters of rl-baselines3-zoo, and writes its card."""

import hashlib
import shlex
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.utils import LinearSchedule

from policykd.agents.card import Card, CardProtocol, TeacherRecord
from policykd.agents.policy import log_policy, policy_temperature
from policykd.agents.rebuild import Sb3Algorithm
from policykd.agents.student import Student, packed_weights
from policykd.agents.teacher import Teacher, load_teacher
from policykd.agents.trusted import Sb3PolicyNet
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation, TemperedPolicy, evaluate_on_atari
from policykd.evaluation.policies import load_named_policy
from policykd.evaluation.results import FinishedGames
from policykd.io.files import lock_folder
from policykd.io.machine import prepare_device, versions
from policykd.io.typed import write_json
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.qdagger import collect_with_teacher
from policykd.rl.sb3_archive import InputScaling, centre_input, start_from, write_teacher
from policykd.rl.training import Training, TrainingArgs
from policykd.runs.config import (
    RESUMABLE_CHANGES,
    GameArgs,
    MachineArgs,
    NotNegative,
    Positive,
    Probability,
    RunArgs,
    SeedArgs,
    check_flags,
    check_name,
    to_settings,
)
from policykd.runs.folder import (
    FINAL_EVALUATION,
    Machine,
    RunRecord,
    check_resumable,
    load_started_run,
    record_changes,
    write_run_config,
)

AlgorithmFlag = Literal["ppo", "a2c", "dqn", "qrdqn"]
ALGORITHMS: dict[AlgorithmFlag, Any] = {"ppo": PPO, "a2c": A2C, "dqn": DQN, "qrdqn": QRDQN}
_REPLAY = {"buffer_size": 100_000, "learning_starts": 100_000, "train_freq": 4}
ZOO: dict[AlgorithmFlag, dict[str, object]] = {
    "ppo": {
        "n_steps": 128,
        "n_epochs": 4,
        "batch_size": 256,
        "learning_rate": LinearSchedule(2.5e-4, 0.0, 1.0),
        "clip_range": LinearSchedule(0.1, 0.0, 1.0),
        "vf_coef": 0.5,
        "ent_coef": 0.01,
    },
    "a2c": {
        "ent_coef": 0.01,
        "vf_coef": 0.25,
        "policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}},
    },
    "dqn": {
        **_REPLAY,
        "learning_rate": 1e-4,
        "batch_size": 32,
        "target_update_interval": 1000,
        "exploration_fraction": 0.1,
        "exploration_final_eps": 0.01,
    },
    "qrdqn": {**_REPLAY, "exploration_fraction": 0.025},
}
"""rl-baselines3-zoo's hyperparameters for Atari; QR-DQN's buffer and first random steps are DQN's, because the zoo's
need ten times the memory"""
_NUMBER: TypeAdapter[bool | int | float] = TypeAdapter(bool | int | float)
EVALUATION_SEED_OFFSET = 1000
"""keeps the card's episodes apart from those of the training"""


@dataclass(frozen=True, kw_only=True)
class TrainTeacherConfig(TrainingArgs, MachineArgs, SeedArgs, RunArgs, GameArgs):
    """Trains a teacher with Stable-Baselines3's own algorithms and the zoo's hyperparameters, and writes its card.

    Writes runs/GAME/NAME/ with TensorBoard curves, checkpoints/, and at the end ALGO-GAME.zip, an SB3 archive, with its
    card ALGO-GAME.json. A killed run resumes from its last checkpoint with --resume, bit for bit.
    """

    algo: AlgorithmFlag = "ppo"
    """SB3's PPO, A2C or DQN, or sb3-contrib's QR-DQN"""
    steps: Positive = 10_000_000
    """agent steps (4 frames each) over all environments; may be changed on resume, schedules then follow the new
    number"""
    num_envs: NotNegative = 0
    """parallel environments; 0 is 16 for A2C, 8 for the others; DQN and QR-DQN train once per 4 steps in any case"""
    hyperparams: tuple[str, ...] = ()
    """hyperparameters that replace the zoo's, each as NAME:NUMBER, such as learning_rate:3e-4 n_steps:3"""
    sticky: Probability = 0.0
    """probability per frame that the last action is repeated (Machado et al., 2018, use 0.25); a teacher trained with 0
    often plays badly under sticky actions"""
    centre: bool = False
    """train on frames centred on the background and scaled by their spread (folded into the weights at the end), which
    leaves Pong's plateau sooner"""
    start_from: str = ""
    """teacher, or folder of a `100%` student, to start from (Agarwal et al., 2022): its convolutions and features are
    copied, and both heads of a policy; for DQN and QR-DQN it also fills the replay buffer, in place of random play"""
    eval_episodes: Positive = 100
    """full episodes per protocol at the end, for the card"""


def train_teacher(config: TrainTeacherConfig) -> Card:
    """Trains a teacher, or resumes its training, writes its archive and its card, and returns the card.

    Raises:
        ValueError: an invalid config, or the folder holds another run.
        BadFile: `start_from` does not fit the game, or a file of the run is damaged.
        OSError: another process holds the run's folder, or it is not writable.
        KeyboardInterrupt: a signal was received; the message contains the command that resumes.
    """
    check_flags(config)
    check_name(config.name)
    num_envs = config.num_envs or (16 if config.algo == "a2c" else 8)
    config = replace(config, game=canonical_name(config.game), num_envs=num_envs)
    device = prepare_device(config.device, config.threads)
    run = config.folder / config.game / (config.name or f"{config.algo}-seed{config.seed}")
    # One process per folder; the emulators are closed whatever happens.
    with (
        lock_folder(run),
        closing(make_atari(config.game, num_envs, config.seed, repeat_action_probability=config.sticky)) as envs,
    ):
        return _train(run, config, SB3VecEnv(envs, clip_rewards=True), device)


def _train(run: Path, config: TrainTeacherConfig, envs: SB3VecEnv, device: torch.device) -> Card:
    # 1. The model, with the scaling of its input and the weights of another teacher if asked for.
    started = load_started_run(run, resume=config.resume)
    model = make_model(config, envs, device)
    start, start_record = _load_start(config)
    scaling = measure_scaling(config.game, config.seed) if config.centre else InputScaling()
    if start:
        start_from(model.policy, start.to(device), scaling)
    if config.centre:
        centre_input(model.policy, scaling)

    # 2. The record of the run, which a resumed one must match.
    record = RunRecord(
        subcommand="train-teacher",
        settings=to_settings(config),
        machine=Machine(device=str(device), threads=torch.get_num_threads()),
        teacher=start_record,
    )
    if started:
        check_resumable(run, started, record, may_change=RESUMABLE_CHANGES)
        record_changes(run, started, record)
    else:
        write_run_config(run, record)

    # 3. Training from the last checkpoint on, then the archive and its card.
    algorithm: Sb3Algorithm = ALGORITHMS[config.algo].__name__

    def evaluate() -> Evaluation:
        scores = Sb3PolicyNet(model.policy.eval(), algorithm, envs.envs.obs_shape, envs.envs.num_actions)
        policy = TemperedPolicy(scores, policy_temperature(algorithm))
        return evaluate_on_atari(policy, config.game, "noop_sampled", 16, seed=config.seed)

    training = Training(model, envs.envs, run, config, evaluate)
    with training.resume_hint():
        if start and isinstance(model, OffPolicyAlgorithm) and not training.is_resumed:
            _explore_with(start, model)
        training.train()
        archive = run / f"{config.algo}-{config.game}.zip"
        write_teacher(model, archive, scaling)
        return _write_card(archive, config, training)


def _load_start(config: TrainTeacherConfig) -> tuple[Teacher | Student | None, TeacherRecord | None]:
    """Returns the network that the training starts from, with its identity for the run's record."""
    if not config.start_from:
        return None, None
    policy = load_named_policy(config.start_from, config.game).policy
    if isinstance(policy, Teacher):
        return policy, policy.record
    sha256 = hashlib.sha256(packed_weights(policy)).hexdigest()
    return policy, TeacherRecord(ref=config.start_from, sha256=sha256, file="student.safetensors")


def make_model(config: TrainTeacherConfig, envs: SB3VecEnv, device: torch.device) -> BaseAlgorithm:
    """Returns a new agent with the zoo's hyperparameters and those of the config.

    Raises:
        ValueError: an unknown hyperparameter, or an invalid value.
    """
    # The zoo's for one environment, then the user's.
    settings = ZOO[config.algo] | _parse_hyperparams(config.hyperparams)
    if "buffer_size" in settings:
        # One gradient step per train_freq steps of any environment, as with the zoo's single environment.
        gradient_steps: Any = settings.get("gradient_steps", 1)
        settings["gradient_steps"] = gradient_steps * envs.num_envs
        settings["replay_buffer_class"] = FrameReplayBuffer
        n_steps = settings.pop("n_steps", 1)
        settings["replay_buffer_kwargs"] = {"n_steps": n_steps, "gamma": settings.get("gamma", 0.99)}
    # SB3 checks values with assertions, and unknown names fail as unexpected arguments.
    try:
        model: BaseAlgorithm = ALGORITHMS[config.algo]("CnnPolicy", envs, seed=config.seed, device=device, **settings)
    except (TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--hyperparams: unknown to {config.algo}, or an invalid value ({reason})") from error
    # The faster memory format for convolutions on the CPU.
    model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _parse_hyperparams(texts: tuple[str, ...]) -> dict[str, float]:
    """Returns hyperparameters that are written NAME:NUMBER."""
    numbers: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition(":")
        try:
            numbers[name] = _NUMBER.validate_json(number)
        except ValueError as error:
            raise ValueError(f"--hyperparams {text!r}: write NAME:NUMBER, such as learning_rate:3e-4") from error
    return numbers


def measure_scaling(game: str, seed: int) -> InputScaling:
    """Returns the median and the standard deviation of the pixels that a random policy sees, in grey levels."""
    generator = torch.Generator().manual_seed(seed)
    with closing(make_atari(game, 8, seed)) as envs:
        # After 100 steps the games are under way, and differ.
        obs = envs.reset()
        for _ in range(100):
            obs = envs.step(torch.randint(envs.num_actions, (8,), generator=generator)).obs
        pixels = obs.float()
    return InputScaling(float(pixels.median()), float(pixels.std().clamp(min=1.0)))


def _explore_with(teacher: Teacher | Student, model: OffPolicyAlgorithm) -> None:
    """Fills the replay buffer with the teacher's steps, where SB3 would take random actions."""
    # Resets the environments; the steps count as training steps, as SB3's random ones do.
    model._setup_learn(model.learning_starts)
    collect_with_teacher(model, lambda obs: log_policy(teacher(obs), teacher.temperature), model.learning_starts)
    model.num_timesteps = model.learning_starts


def _write_card(archive: Path, config: TrainTeacherConfig, training: Training) -> Card:
    """Plays full episodes with the archive's agent under every protocol, and writes its card next to it."""
    # Read back from the archive, so that the card describes what users will load.
    teacher = load_teacher(archive)
    games = FinishedGames(archive.parent / FINAL_EVALUATION)
    protocols: dict[str, CardProtocol] = {}
    for protocol in PROTOCOLS:
        what = (config.game, protocol, config.eval_episodes)
        episodes = games.play(teacher, teacher.sha256, *what, seed=config.seed + EVALUATION_SEED_OFFSET)
        protocols[protocol] = CardProtocol(
            returns=episodes.returns,
            lengths=episodes.lengths,
            num_truncated=episodes.num_truncated,
            num_unfinished=len(episodes.unfinished),
        )
        print(f"{protocol}: mean {episodes.mean_return:.2f}", flush=True)
    # Settings that determine the weights; the others, such as the folder, mean nothing elsewhere.
    settings = {name: value for name, value in to_settings(config).items() if name not in RESUMABLE_CHANGES}
    model: Any = training.model
    card = Card(
        game=config.game,
        algorithm=teacher.algorithm,
        policy="CnnPolicy",
        agent_steps=model.num_timesteps,
        updates=model._n_updates,
        wall_seconds=round(training.wall_seconds),
        command=shlex.join(sys.argv),
        settings=settings,
        versions=versions(),
        sha256=teacher.sha256,
        protocols=protocols,
    )
    write_json(archive.with_suffix(".json"), card)
    return card
