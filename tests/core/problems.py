"""A problem of seconds: one step per episode, one right action per observation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from policykd.agents.student import make_student
from policykd.loop import DistillConfig, Round, distill, forward_kl
from policykd.losses import LossFn
from policykd.train_state import TrainState, make_train_state
from tests.identity_env import IdentityEnv

SMALL = DistillConfig(rounds=8, states_per_round=160, updates_per_round=40, batch_size=64, learning_rate=2e-2)


def identity_teacher(obs: Tensor) -> Tensor:
    return 3.0 * obs


@dataclass
class Problem:
    """A run of the identity environment: `train` it, then look at its state."""

    seed: int = 0
    temperature: float = 1.0
    num_actions: int = 4
    student: nn.Module = field(init=False)
    state: TrainState | None = None

    def __post_init__(self) -> None:
        self.student = make_student((16,), 4, (4,), seed=self.seed, temperature=self.temperature)

    def make_state(self, config: DistillConfig, loss_fn: LossFn = forward_kl, **more: Any) -> TrainState:
        self.state = make_train_state(self.student, IdentityEnv(8, 4, self.seed), config, loss_fn=loss_fn, **more)
        return self.state

    def train(
        self, loss_fn: LossFn = forward_kl, teacher: Callable[[Tensor], Tensor] = identity_teacher, **settings: Any
    ) -> list[Round]:
        config = replace(SMALL, seed=self.seed, **settings)
        state = self.state or self.make_state(config, loss_fn)
        return list(distill(teacher, self.student, state.envs, config, loss_fn=loss_fn, state=state))
