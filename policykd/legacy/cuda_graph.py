"""A whole update as one CUDA graph: a small network's kernels take less time than launching them one by one.

Not run on a GPU yet, see docs/gpu.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""updates that run one kernel after the other first, as capturing wants"""


class CapturedUpdate:
    """Runs an update that reads its batch from fixed tensors, by replaying it once it has been captured.

    The update must not wait for the device or make tensors that outlive it; with one shape of batch for ever.
    """

    def __init__(self, update: Callable[..., None]) -> None:
        self.update = update
        self.num_calls = 0
        self._batch = tuple[Tensor, ...]()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> None:
        """Takes the update on a batch: tensors on the device, such as the rows of its states `(batch,)`."""
        if self._graph:
            for fixed, tensor in zip(self._batch, batch, strict=True):
                fixed.copy_(tensor)
            self._graph.replay()
            return
        self.num_calls += 1
        if self.num_calls <= WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.update(*batch)
            torch.cuda.current_stream().wait_stream(side)
            return
        self._batch = tuple(tensor.clone() for tensor in batch)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # the visits go on in another thread
            self.update(*self._batch)
        self._graph.replay()  # what was captured has not run yet
