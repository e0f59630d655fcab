"""One student for several games (Rusu et al., 2015, section 3.2; Parisotto et al., 2015).

The games' environments are stepped side by side. The student has a shared trunk and an output for every action of every
game (`separate_heads`), or one for each of ALE's 18 actions (`shared_head`). Outputs that are not actions of a state's
game are masked: they get no probability and no gradient. To the loop all this is one vector of environments, one
teacher, one state source and one loss function. Shape suffixes: B batch, E environments, A outputs of the student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policykd.agents.policy import Policy, check_outputs, log_policy
from policykd.envs import EnvState
from policykd.envs.vector import Episode, Step, VectorEnv
from policykd.losses import Batch, LossFn, Metrics
from policykd.schedules import Quantity
from policykd.states import StateSource

UNAVAILABLE = -1e9
"""logit of an output that is no action of the game; finite, since 0 * -inf would be NaN in a divergence"""

Heads = Mapping[str, tuple[int, ...]]
"""game -> the student's outputs that are its actions, in the game's own order"""


def separate_heads(num_actions: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns heads that share no output: a last layer of its own for every game."""
    heads: dict[str, tuple[int, ...]] = {}
    first = 0
    for game, num in num_actions.items():
        heads[game] = tuple(range(first, first + num))
        first += num
    return heads


def shared_head(action_names: Mapping[str, Sequence[str]], all_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns heads in one common set of actions, such as ALE's 18: FIRE is the same output in all games."""
    return {game: tuple(all_names.index(name) for name in names) for game, names in action_names.items()}


class MultiGameEnvs:
    """Environments of several games as one `VectorEnv`: all of the first game, then all of the second, and so on."""

    def __init__(self, envs: Mapping[str, VectorEnv], heads: Heads | None = None) -> None:
        """Joins the environments.

        Args:
            envs: equally many of each game, so that batches are balanced, with observations of one shape.
            heads: outputs of the student that are each game's actions; by default separate ones.

        Raises:
            ValueError: other numbers or observations, or heads that do not fit the games.
        """
        self.envs = dict(envs)
        self.games = tuple(envs)
        self.heads = dict(heads or separate_heads({game: e.num_actions for game, e in envs.items()}))
        first = self.envs[self.games[0]]
        for game, e in self.envs.items():
            if (e.num_envs, tuple(e.obs_shape), e.stack) != (first.num_envs, tuple(first.obs_shape), first.stack):
                raise ValueError(
                    f"{game} has {e.num_envs} environments with observations {e.obs_shape}, {self.games[0]} has"
                    f" {first.num_envs} with {first.obs_shape}; give as many of the same shape"
                )
            if len(set(self.heads.get(game, ()))) != e.num_actions:
                raise ValueError(f"{game} has {e.num_actions} actions, its head is {self.heads.get(game)}")
        self.num_per_game = first.num_envs
        self.num_envs = len(self.games) * self.num_per_game
        self.num_actions = 1 + max(max(head) for head in self.heads.values())
        self.obs_shape: tuple[int, ...] = first.obs_shape
        self.stack = first.stack
        self.game_E = torch.arange(len(self.games)).repeat_interleave(self.num_per_game)
        """index of each environment's game"""
        self.available_EA = torch.zeros(self.num_envs, self.num_actions, dtype=torch.bool)
        """whether an output is an action of the environment's game"""
        self._own_actions_A: dict[str, Tensor] = {}
        """by game, its own number of each output; -1 where it has none"""
        for game, rows in self.rows.items():
            head = list(self.heads[game])
            self.available_EA[rows, head] = True
            self._own_actions_A[game] = torch.full((self.num_actions,), -1)
            self._own_actions_A[game][head] = torch.arange(len(head))

    @property
    def rows(self) -> dict[str, slice]:
        """The environments of each game."""
        n = self.num_per_game
        return {game: slice(i * n, (i + 1) * n) for i, game in enumerate(self.games)}

    def reset(self) -> Tensor:
        """Starts new episodes everywhere; returns the first observations, `(num_envs, *obs_shape)`."""
        return torch.cat([envs.reset() for envs in self.envs.values()])

    def step(self, actions_B: Tensor) -> Step:
        """Takes one of the student's outputs as the action in every environment; where negative, nothing happens.

        Raises:
            ValueError: an output that is no action of the environment's game.
        """
        steps: list[Step] = []
        episodes: list[Episode] = []
        for game, rows in self.rows.items():
            outputs = actions_B[rows]
            actions = torch.where(outputs < 0, outputs, self._own_actions_A[game][outputs.clamp(min=0)])
            if ((actions < 0) & (outputs >= 0)).any():
                raise ValueError(f"outputs {outputs.tolist()}: not all are actions of {game}, {self.heads[game]}")
            step = self.envs[game].step(actions)
            steps.append(step)
            episodes += [Episode(rows.start + e.env, e.episodic_return, e.length, e.truncated) for e in step.episodes]
        obs, rewards_B, starts_B = (
            torch.cat([getattr(step, name) for step in steps]) for name in ("obs", "rewards_B", "starts_B")
        )
        return Step(obs, rewards_B, starts_B, episodes)

    def state(self) -> EnvState:
        """Returns the position in every game."""
        return {game: envs.state() for game, envs in self.envs.items()}

    def restore(self, state: EnvState) -> Tensor:
        """Returns the observations of a position.

        Raises:
            ValueError: the state is of other games.
        """
        if tuple(state) != self.games:
            raise ValueError(f"the state is that of {', '.join(state)}, these are {', '.join(self.games)}")
        return torch.cat([envs.restore(state[game]) for game, envs in self.envs.items()])

    def close(self) -> None:
        """Releases all environments."""
        for envs in self.envs.values():
            envs.close()


class MaskedPolicy:
    """A policy whose outputs are masked, each row by its own game."""

    def __init__(self, policy: Policy, available_BA: Tensor) -> None:
        self.policy = policy
        self.available_BA = available_BA

    def __call__(self, obs: Tensor) -> Tensor:
        """Returns logits `(batch, num_actions)`, `UNAVAILABLE` where an output is no action."""
        return self.policy(obs).masked_fill(~self.available_BA, UNAVAILABLE)


class MultiGameTeacher:
    """One teacher per game as one policy: log-probabilities of each game's actions, `UNAVAILABLE` elsewhere."""

    temperature = 1.0

    def __init__(
        self, teachers: Mapping[str, Policy], envs: MultiGameEnvs, *, temperature: float | None = None
    ) -> None:
        """Assigns teachers to games.

        Args:
            teachers: one for every game.
            envs: the games' environments.
            temperature: divides the outputs of all teachers; by default each one's own does.

        Raises:
            ValueError: not one teacher for every game.
        """
        if set(teachers) != set(envs.games):
            raise ValueError(f"teachers of {', '.join(teachers)} for the games {', '.join(envs.games)}; give one each")
        self.teachers = tuple(teachers[game] for game in envs.games)
        self.envs = envs
        self._temperatures = [temperature or float(getattr(t, "temperature", 1.0)) for t in self.teachers]

    def __call__(self, obs: Tensor) -> Tensor:
        """Returns `(num_envs, num_actions)` of one observation per environment, in their order.

        Raises:
            ValueError: other numbers of observations, or outputs that do not fit a game.
        """
        envs = self.envs
        if len(obs) != envs.num_envs:
            raise ValueError(f"{len(obs)} observations for {envs.num_envs} environments: their games are unknown")
        outputs_BA = torch.full((envs.num_envs, envs.num_actions), UNAVAILABLE, device=obs.device)
        for teacher, own, (game, rows) in zip(self.teachers, self._temperatures, envs.rows.items(), strict=True):
            head = list(envs.heads[game])
            raw = check_outputs(teacher(obs[rows]), envs.num_per_game, len(head), f"the teacher of {game}")
            # Logits and Q-values of different teachers only mean the same as log-probabilities.
            outputs_BA[rows, head] = log_policy(raw, own).to(obs.device)
        return outputs_BA


@dataclass(frozen=True)
class MultiGameStates:
    """A state source whose actions are those of each environment's game."""

    states: StateSource
    envs: MultiGameEnvs

    @property
    def epsilon(self) -> Quantity:
        """Probability of a random action."""
        return getattr(self.states, "epsilon", 0.0)

    def student_fraction(self, progress: float, /) -> float:
        """Returns the probability that a step is the student's."""
        return self.states.student_fraction(progress)

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns outputs of the student that are actions, int64 `(num_envs,)`."""
        available_EA = self.envs.available_EA
        student = MaskedPolicy(student, available_EA.to(obs.device))
        teacher_BA = teacher_BA.masked_fill(~available_EA, UNAVAILABLE)  # also where its outputs were not finite
        actions_B = self.states(obs, teacher_BA, student, progress, generator)
        # A random action may be one of another game: then another one is drawn.
        is_action_B = available_EA.gather(1, actions_B[:, None]).squeeze(1)
        if is_action_B.all():
            return actions_B
        random_B = available_EA.float().multinomial(1, generator=generator).squeeze(1)
        return torch.where(is_action_B, actions_B, random_B)


@dataclass(frozen=True)
class MultiGameLoss:
    """A loss function in which each state's outputs are masked by its game; its metrics are also given per game."""

    loss: LossFn
    envs: MultiGameEnvs

    def __call__(self, student: nn.Module, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """Returns the loss per state and the metrics, each also as GAME/NAME."""
        # State n of the replay buffer belongs to environment n mod num_envs.
        env_B = batch.rows_B % self.envs.num_envs
        masked = MaskedPolicy(student, self.envs.available_EA.to(env_B.device)[env_B])
        loss_B, metrics = self.loss(masked, batch)  # type: ignore[arg-type]  # losses on outputs only call it
        # The loop logs means over all states. Each game has the same share of them, so its own mean is that of the
        # values times the number of games, with 0 for the states of the others.
        game_B = self.envs.game_E.to(env_B.device)[env_B]
        by_game: Metrics = {}
        for i, game in enumerate(self.envs.games):
            share_B = (game_B == i) * float(len(self.envs.games))
            by_game |= {f"{game}/{name}": value_B * share_B for name, value_B in metrics.items()}
        return loss_B, metrics | by_game
