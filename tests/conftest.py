"""One thread a test process: the suite runs in parallel, and OpenMP threads that wait for a busy core spin."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
