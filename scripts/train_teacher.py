"""Trains a teacher with Stable-Baselines3's own algorithms and the zoo's hyperparameters, and writes its card."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from policykd.agents.policy import Policy, sample
from policykd.agents.rebuild import Algorithm
from policykd.agents.teacher import load_teacher, policy_temperature
from policykd.agents.trusted import Sb3Scores
from policykd.cli.arguments import parse_args
from policykd.cli.command import DeviceName, exit_with_one_line, needs_extra, prepare_device, versions
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.evaluate import PROTOCOLS, TemperedPolicy, evaluate_on_atari
from policykd.evaluation.results import FinishedGames, judgement
from policykd.evaluation.teacher_check import check_fits
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted, interruptible
from policykd.runs.folder import again, check_at_least, check_name, goes_on, lock, start_run
from policykd.storage.generations import has_generations

with needs_extra("sb3"):
    from sb3_contrib import QRDQN
    from stable_baselines3 import A2C, DQN, PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.utils import LinearSchedule

    from policykd.envs.sb3_vec_env import SB3VecEnv
    from policykd.rl.frame_buffer import FrameReplayBuffer
    from policykd.rl.sb3_archive import InputScaling, centre_input, start_from, write_teacher
    from policykd.rl.sb3_checkpoints import TrainingCallback, restore_training

ALGORITHMS: dict[str, Algorithm] = {"ppo": "PPO", "a2c": "A2C", "dqn": "DQN", "qrdqn": "QRDQN"}
OFF_POLICY = ("dqn", "qrdqn")
FILL_THEN_LEARN: dict[str, Any] = {"learning_starts": 100_000, "train_freq": 4, "gradient_steps": 1}
ZOO: dict[str, dict[str, Any]] = {
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
        **FILL_THEN_LEARN,
        "buffer_size": 100_000,
        "learning_rate": 1e-4,
        "batch_size": 32,
        "target_update_interval": 1000,
        "exploration_fraction": 0.1,
        "exploration_final_eps": 0.01,
    },
    "qrdqn": {**FILL_THEN_LEARN, "buffer_size": 100_000, "exploration_fraction": 0.025},
}
"""rl-baselines3-zoo's for Atari; QR-DQN's buffer and first random steps are DQN's, since the zoo's take ten times the
memory"""
NUM_ENVS = {"ppo": 8, "a2c": 16, "dqn": 8, "qrdqn": 8}
FREE = {
    "steps",
    "device",
    "threads",
    "name",
    "folder",
    "resume",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "debug",
}
"""what may be changed when a run goes on"""


@dataclass(frozen=True)
class Args:
    """Trains a teacher with Stable-Baselines3's own algorithms and the zoo's hyperparameters, and writes its card.

    Writes runs/GAME/NAME/ with TensorBoard curves, checkpoints/, and at the end ALGO-GAME.zip, an SB3 archive, with its
    card ALGO-GAME.json. A run that was killed goes on from its last checkpoint with --resume, bit for bit.
    """

    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game"""
    algo: Literal["ppo", "a2c", "dqn", "qrdqn"] = "ppo"
    """SB3's PPO, A2C or DQN, or sb3-contrib's QR-DQN"""
    steps: int = 10_000_000
    """agent steps (4 frames each) over all environments; may be changed when a run goes on, to end it sooner or later:
    schedules then follow the new number"""
    num_envs: int = 0
    """games played at once; 0 is 16 for A2C, 8 for the others; DQN and QR-DQN learn once in 4 steps whatever it is"""
    hyperparams: tuple[str, ...] = ()
    """others than the zoo's, NAME:NUMBER each, such as learning_rate:3e-4 n_steps:3"""
    centre: bool = False
    """train on frames centred on the background and scaled by their spread (folded into the weights at the end): leaves
    Pong's plateau sooner"""
    start_from: str = ""
    """a teacher to go on from (Agarwal et al., 2022): its convolutions and features are copied, a policy's head too;
    for DQN and QR-DQN it also plays, sampled, while the buffer is first filled, in place of random actions"""
    checkpoint_every: int = 50_000
    """steps between checkpoints"""
    eval_every: int = 250_000
    """steps between evaluations on the way (16 games, no-op starts, sampled); 0 for none"""
    eval_episodes: int = 100
    """whole games under each protocol at the end, for the card"""
    device: DeviceName = "auto"
    """where to learn: cuda, then mps, then cpu, whichever is there first"""
    threads: int = 0
    """CPU threads; 0 takes what torch finds"""
    seed: int = 0
    """of weights, games and actions"""
    name: str = ""
    """of the run's folder; by default algorithm and seed"""
    folder: Path = Path("runs")
    """where runs are kept"""
    resume: bool = False
    """go on with the run of this --name from its last checkpoint, or start it if there is none"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Prepares the machine, and takes the run's folder for this process alone."""
    check_at_least(args, 1, "steps", "checkpoint_every", "eval_episodes")
    check_at_least(args, 0, "num_envs", "eval_every", "seed")
    check_name(args.name)
    args = dataclasses.replace(args, game=canonical_name(args.game), num_envs=args.num_envs or NUM_ENVS[args.algo])
    device = prepare_device(args.device, args.threads)
    run = args.folder / args.game / (args.name or f"{args.algo}-seed{args.seed}")
    with lock(run):
        train(run, args, device)


def train(run: Path, args: Args, device: torch.device) -> None:
    """Trains, or goes on training, then writes the archive and its card."""
    with interruptible():
        envs = make_atari(args.game, args.num_envs, args.seed)
    model = make_model(args, SB3VecEnv(envs, clip_rewards=True), device)
    start = load_teacher(args.start_from, game=args.game) if args.start_from else None
    if start:
        check_fits(start, envs, args.start_from, args.game)
    scaling = spread(args.game, args.seed) if args.centre else InputScaling()
    if start:
        start_from(model.policy, start, scaling)
    if args.centre:
        centre_input(model.policy, scaling)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if k not in FREE}
    settings["start_from"] = start.sha256 if start else ""
    machine = {"device": str(device), "threads": torch.get_num_threads()}
    if not goes_on(run, settings, resume=args.resume, machine=machine):
        start_run(run, settings, machine=machine, start_from=args.start_from)

    is_old = has_generations(run / "checkpoints")
    with interruptible():  # a replay buffer may be gigabytes
        wall_seconds = restore_training(model, envs, run / "checkpoints") if is_old else 0.0
    board = TensorBoardOutputFormat(str(run))
    board.writer = SummaryWriter(str(run), purge_step=model.num_timesteps + 1)
    model.set_logger(Logger(str(run), [board]))

    def evaluate(steps: int) -> None:
        policy = Sb3Scores(model.policy.eval(), ALGORITHMS[args.algo], envs.obs_shape, envs.num_actions)
        tempered = TemperedPolicy(policy, policy_temperature(ALGORITHMS[args.algo]))
        games = evaluate_on_atari(tempered, args.game, "noop_sampled", 16, seed=args.seed)
        board.writer.add_scalar("eval/mean_reward", np.mean(games.returns), steps)
        board.writer.add_scalar("eval/mean_ep_length", np.mean(games.lengths), steps)
        print(f"{steps:>11,} steps: 16 games, mean {np.mean(games.returns):.2f}", flush=True)

    progress = TrainingCallback(
        envs, run / "checkpoints", args.checkpoint_every, evaluate, args.eval_every, wall_seconds
    )
    print(f"{run}: {model.num_timesteps:,} of {args.steps:,} steps; watch it with: tensorboard --logdir {args.folder}")
    try:
        if start and args.algo in OFF_POLICY and not is_old:
            explore(model, start.to(device), args.seed, start.temperature)
        model.learn(max(0, args.steps - model.num_timesteps), progress, reset_num_timesteps=False)
        progress.save()
        archive = run / f"{args.algo}-{args.game}.zip"
        write_teacher(model, archive, scaling)
        write_card(archive, model, args, settings, progress.wall_seconds)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{progress.saved_steps:,} steps are saved; go on with: {again(args, run)}") from None


def make_model(args: Args, envs: SB3VecEnv, device: torch.device) -> BaseAlgorithm:
    """Returns a new agent with the zoo's hyperparameters and those given."""
    algorithms: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "a2c": A2C, "dqn": DQN, "qrdqn": QRDQN}
    settings = {**ZOO[args.algo], **overrides(args.hyperparams)}
    if args.algo in OFF_POLICY:
        # One learning step for every train_freq steps, as with the zoo's single environment.
        settings["gradient_steps"] *= args.num_envs
        multi_step = {"n_steps": settings.pop("n_steps", 1), "gamma": settings.get("gamma", 0.99)}
        settings |= {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": multi_step}
    try:
        model = algorithms[args.algo]("CnnPolicy", envs, seed=args.seed, device=device, **settings)
    except (TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--hyperparams: {args.algo} knows no such setting, or not such a value ({reason})") from error
    model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def overrides(given: tuple[str, ...]) -> dict[str, float]:
    """Returns hyperparameters written NAME:NUMBER."""
    numbers = dict[str, float]()
    for text in given:
        name, _, value = text.partition(":")
        try:
            numbers[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--hyperparams {text!r}: write NAME:NUMBER, such as learning_rate:3e-4") from error
    return numbers


def spread(game: str, seed: int) -> InputScaling:
    """Returns the median and the standard deviation of the pixels of random play, grey levels."""
    envs, generator = make_atari(game, 8, seed), torch.Generator().manual_seed(seed)
    obs = envs.reset()
    for _ in range(100):
        check_interrupted()
        obs = envs.step(torch.randint(envs.num_actions, (8,), generator=generator)).obs
    pixels = obs.float()
    return InputScaling(float(pixels.median()), float(pixels.std().clamp(min=1.0)))


@torch.no_grad()
def explore(model: BaseAlgorithm, explorer: Policy, seed: int, temperature: float) -> None:
    """Fills the buffer up to `learning_starts` with the actions of another agent."""
    assert isinstance(model, DQN) or hasattr(model, "quantile_net")
    envs, generator = model.env, torch.Generator().manual_seed(seed)
    assert envs is not None
    obs: Any = envs.reset()
    dones = np.ones(envs.num_envs, np.bool_)
    while model.num_timesteps < model.learning_starts:  # type: ignore[attr-defined]
        check_interrupted()
        scores_BA = explorer(torch.from_numpy(obs).to(model.device)).cpu() / temperature
        actions = sample(scores_BA, generator).numpy()
        new_obs, rewards, dones, infos = envs.step(actions)
        model.replay_buffer.add(obs, new_obs, actions, rewards, dones, infos)  # type: ignore[attr-defined]
        obs = new_obs
        model.num_timesteps += envs.num_envs
    model._last_obs, model._last_episode_starts = obs, dones


def write_card(
    archive: Path, model: BaseAlgorithm, args: Args, settings: Mapping[str, Any], wall_seconds: float
) -> None:
    """Plays the archive's agent and writes what it is beside it."""
    teacher = load_teacher(archive)
    protocols = {}
    finished = FinishedGames(archive.parent / "judged.json")
    for protocol in PROTOCOLS:
        seed = args.seed + 1000
        games = finished.play(teacher, teacher.sha256, args.game, protocol, args.eval_episodes, seed=seed)
        protocols[protocol] = judgement(games)
        print(f"mean {protocols[protocol]['mean']:.2f} {protocols[protocol]['interval']}", flush=True)
    card = {
        "game": args.game,
        "algorithm": teacher.algorithm,
        "policy": "CnnPolicy",
        "agent_steps": model.num_timesteps,
        "updates": model._n_updates,
        "wall_seconds": round(wall_seconds),
        "command": shlex.join(sys.argv),
        "settings": settings,
        "versions": versions(),
        "sha256": teacher.sha256,
        "protocols": protocols,
    }
    write_atomically(archive.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
