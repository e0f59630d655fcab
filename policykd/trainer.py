"""Gradient steps: threads that share a batch, bfloat16, CUDA graphs, updates that are not finite.

Nothing here knows which loss is minimised. Shape suffixes: B batch, M metrics.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from policykd.losses import Batch, LossFn, Metrics
from policykd.schedules import Progress
from policykd.train_state import TrainState

if TYPE_CHECKING:
    from policykd.loop import DistillConfig

MAX_NONFINITE_UPDATES = 10
"""updates per round that may be skipped before the run ends"""
MIN_STATES_PER_THREAD = 32
"""smaller parts of a batch cost more to hand out than they save"""
_EVALUATION_BATCH_SIZE = 1024
_GRAPH_WARM_UP = 3
"""updates that run one kernel after the other before a CUDA graph is captured, as torch requires"""


class Trainer:
    """Takes gradient steps on the student.

    On a CPU each batch is cut into as many parts as `config.threads`; their gradients are added in order, so the bits
    depend on the number of threads alone. Torch's own threads are best left at one: they stall when an emulator needs
    a core.
    """

    def __init__(self, state: TrainState, loss_fn: LossFn, config: "DistillConfig", temperature: float) -> None:
        self.state = state
        self.loss_fn = loss_fn
        self.config = config
        self.temperature = temperature
        self.parameters = state.parameters()
        # Other devices parallelise a batch themselves.
        self.num_parts = 1
        if state.device.type == "cpu":
            self.num_parts = max(1, min(config.threads, config.batch_size // MIN_STATES_PER_THREAD))
        self._pool = ThreadPoolExecutor(self.num_parts, thread_name_prefix="trainer")
        self._metric_names: tuple[str, ...] = ()
        self._sums_M = torch.zeros(0, device=state.device)
        self._progress = Progress(0.0)
        self._num_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_input = torch.zeros(0)

    def __enter__(self) -> "Trainer":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def start_round(self, progress: Progress) -> None:
        """Prepares for the updates of a round, in which the loss function's schedules stay constant."""
        self.state.student.train()
        self._progress = progress
        self._sums_M.zero_()
        self._num_steps = 0
        self._graph = None  # a captured graph holds the numbers of the previous round's schedules

    def step(self, rows_B: Tensor, random_B: Tensor, learning_rate: float) -> None:
        """Takes one gradient step, or skips it if loss or gradient are not finite; never waits for the device.

        Args:
            rows_B: states in the replay buffer, int64 `(batch,)`.
            random_B: random bits for the loss function, int64 `(batch,)`.
            learning_rate: of the optimizer.
        """
        for group in self.state.optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        self._num_steps += 1
        if self.config.cuda_graph:
            self._replay_graph(torch.stack([rows_B, random_B]))
            return
        chunks = [*zip(rows_B.chunk(self.num_parts), random_B.chunk(self.num_parts), strict=True)]
        # One part runs here; only several go through the pool, whose threads compute at the same time.
        parts = [*self._pool.map(self._gradients, *zip(*chunks, strict=True))] if len(chunks) > 1 else None
        self._apply(parts or [self._gradients(rows_B, random_B)])

    def _loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the loss per state and the metrics; a mean in place of one number per state would be averaged twice.

        Raises:
            ValueError: the loss function returns anything else.
        """
        result: object = self.loss_fn(self.state.student, batch)
        expected = f"expected (loss, metrics), the loss and each metric a tensor ({len(batch.rows_B)},)"
        name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise ValueError(f"loss_fn {name} returns {type(result).__name__}, {expected}")
        for key, value in [("the loss", result[0]), *result[1].items()]:
            if not isinstance(value, Tensor) or value.shape != batch.rows_B.shape:
                found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss_fn {name} returns {found} as {key}, {expected}")
        return result

    def _gradients(self, rows_B: Tensor, random_B: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns a part's share of the gradient of the batch's mean loss, and of the mean loss and metrics."""
        replay = self.state.replay
        obs = replay.gather(rows_B)
        teacher_BA = replay.teacher_NA.index_select(0, rows_B)
        batch = Batch(obs, teacher_BA, rows_B, self.temperature, self._progress, random_B)
        bf16 = torch.autocast(obs.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()
        with bf16:
            loss_B, metrics = self._loss(batch)
        # Divided by the whole batch, not by the part: the parts' gradients then simply add up.
        share_of_mean = loss_B.sum() / self.config.batch_size
        gradients = torch.autograd.grad(share_of_mean, self.parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            shares = [value_B.sum() / self.config.batch_size for value_B in metrics.values()]
        self._metric_names = tuple(metrics)
        return gradients, torch.stack([share_of_mean.detach(), *shares])

    def _apply(self, parts: list[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        """Adds the parts up in order and lets the optimizer take the step, unless it is not finite."""
        # Always in the order of the parts, not of their completion: floating-point addition is not associative.
        for parameter, *gradients in zip(self.parameters, *(g for g, _ in parts), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0])
        measured_M = sum((m for _, m in parts[1:]), start=parts[0][1])
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        skipped = (~(norm.isfinite() & measured_M[0].isfinite())).float()
        # Where found_inf is 1 an optimizer leaves weights and moments alone: an update is skipped without waiting for
        # the device.
        self.state.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.state.optimizer.step()
        row_M = torch.cat([norm[None], skipped[None], measured_M])
        if len(self._sums_M) != len(row_M):
            self._sums_M = torch.zeros_like(row_M)
        self._sums_M.add_(row_M)

    def _replay_graph(self, inputs: Tensor) -> None:
        """Runs the update as one CUDA graph: launching a small network's kernels takes longer than they do."""

        def update() -> None:
            self._apply([self._gradients(self._graph_input[0], self._graph_input[1])])

        if self._graph is not None:
            self._graph_input.copy_(inputs)
            self._graph.replay()
            return
        self._graph_input = inputs.clone()
        if self._num_steps <= _GRAPH_WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                update()
            torch.cuda.current_stream().wait_stream(side)
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # the collector's thread may use CUDA
            update()
        self._graph.replay()  # capturing does not run the update

    def finish_round(self) -> dict[str, float]:
        """Returns the means over the round's updates: loss, grad_norm, num_skipped and the loss function's metrics.

        Raises:
            FloatingPointError: more than `MAX_NONFINITE_UPDATES` updates, or all of them, were not finite.
        """
        self.state.student.eval()  # a caller plays with it between two rounds
        # The only read from the device in a round.
        grad_norm, skipped, loss, *values = (self._sums_M / self._num_steps).tolist()
        num_skipped = round(skipped * self._num_steps)
        if num_skipped > MAX_NONFINITE_UPDATES or 0 < num_skipped == self._num_steps:
            raise FloatingPointError(
                f"round {self.state.round}: {num_skipped} updates with loss {loss} or gradient norm {grad_norm} that"
                " are not finite; lower the learning rate"
            )
        metrics = dict(zip(self._metric_names, values, strict=True))
        return {"loss": loss, "grad_norm": grad_norm, "num_skipped": num_skipped, **metrics}

    @torch.inference_mode()
    def measure(self, first: int, progress: Progress) -> dict[str, float]:
        """Returns the means of loss and metrics on the states from row `first` on, without training."""
        replay = self.state.replay
        self.state.student.eval()
        sums: dict[str, Tensor] = {}
        rows = replay.states_from(first)
        if not len(rows):
            return {}
        for rows_B in rows.split(_EVALUATION_BATCH_SIZE):
            teacher_BA = replay.teacher_NA.index_select(0, rows_B)
            batch = Batch(replay.gather(rows_B), teacher_BA, rows_B, self.temperature, progress, rows_B)
            loss_B, metrics = self._loss(batch)
            for name, value_B in ({"loss": loss_B} | metrics).items():
                sums[name] = sums.get(name, torch.zeros((), device=value_B.device)) + value_B.float().sum()
        return {name: float(total) / len(rows) for name, total in sums.items()}
