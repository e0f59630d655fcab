"""Games in other processes: the same results, and nothing is left behind however a process ends."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.emulators import OUTCOME, Rules
from policykd.envs.workers import SubprocessWorker


def workers(envs: AtariEnvs) -> list[SubprocessWorker]:
    return [player for player in envs._workers if isinstance(player, SubprocessWorker)]


def has_ended(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def ends(pid: int, *, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if has_ended(pid):
            return True
        time.sleep(0.02)
    return False


def test_the_number_of_workers_changes_nothing() -> None:
    """Sticky Breakout with lost lives and ended games; a position goes from one number of workers to another."""
    some = [make_atari("Breakout", 5, 3, repeat_action_probability=0.25, num_workers=n) for n in (0, 2)]
    obs = [envs.reset() for envs in some]
    assert (obs[0] == obs[1]).all()
    generator, num_episodes = torch.Generator().manual_seed(0), 0
    for k in range(260):
        actions_B = torch.randint(-1 if k % 2 else 0, 4, (5,), generator=generator)
        here, there = (envs.step(actions_B) for envs in some)
        assert (here.obs == there.obs).all()
        assert (here.rewards_B == there.rewards_B).all()
        assert (here.starts_B == there.starts_B).all()
        assert here.episodes == there.episodes
        num_episodes += len(here.episodes)
    assert num_episodes
    assert some[0].state() == some[1].state()
    assert (some[0].screens() == some[1].screens()).all()
    state = some[0].state()
    stood = some[1].step(torch.full((5,), -1)).obs
    some[0].step(torch.zeros(5, dtype=torch.long))
    for envs in some:
        assert (envs.restore(state) == stood).all()
        envs.close()


def test_a_worker_that_dies_is_one_clear_line_and_signals_are_its_parents() -> None:
    """C04: SIGINT and SIGTERM end no game. A worker that is killed, as by the kernel for memory, is an OSError."""
    envs = make_atari("Pong", 4, 0, num_workers=2)
    obs = envs.reset()
    pids = [worker.pid for worker in workers(envs)]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pids[1], number)
    obs = envs.step(torch.zeros(4, dtype=torch.long)).obs
    assert obs.shape == (4, 4, 84, 84)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(OSError, match="emulator process of Pong ended with SIGKILL") as error:
        envs.step(torch.zeros(4, dtype=torch.long))
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="make new environments"):
        envs.step(torch.zeros(4, dtype=torch.long))
    envs.close()
    envs.close()
    assert all(map(has_ended, pids))


def test_a_bad_position_is_refused_by_a_worker_too() -> None:
    envs = make_atari("Pong", 1, 0, num_workers=1)
    obs = envs.reset()
    state = envs.state()
    with pytest.raises(ValueError, match="damaged"):
        envs.restore(state | {"games": [state["games"][0] | {"ale": ""}]})
    assert (envs.restore(state) == obs).all()
    envs.close()


def test_an_interrupted_answer_is_never_taken_for_the_next_one() -> None:
    envs = make_atari("Pong", 1, 0, num_workers=1)
    envs.reset()
    workers(envs)[0].send("step", [0])
    with pytest.raises(OSError, match="make new environments"):
        envs.step(torch.tensor([1]))
    envs.close()


def test_closed_and_forgotten_environments_end_their_workers() -> None:
    envs = make_atari("Pong", 1, 0, num_workers=1)
    (closed,) = (worker.pid for worker in workers(envs))
    assert not has_ended(closed)
    envs.close()
    assert has_ended(closed)
    envs = make_atari("Pong", 1, 0, num_workers=1)
    (forgotten,) = (worker.pid for worker in workers(envs))
    del envs
    gc.collect()
    assert has_ended(forgotten)


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "sys.exit(3)"], ids=["killed", "ends"])
def test_workers_die_with_their_parent(how: str) -> None:
    """C01: also when it is killed in the middle of a step; nothing is written about it, no shared memory stays."""
    code = (
        "import os, sys, torch; from policykd.envs.atari import make_atari\n"
        "envs = make_atari('Pong', 2, 0, num_workers=2); envs.reset()\n"
        "print(*[w.pid for w in envs._workers], flush=True)\n"
        f"envs._workers[0].send('step', [0]); {how}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3 if "exit" in how else -9, "")
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    assert all(map(ends, pids))


def test_a_worker_imports_no_torch() -> None:
    code = "import sys, policykd.envs.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_signal_to_the_group_cannot_meet_a_worker_that_is_just_starting() -> None:
    """C04: Ctrl-C reaches children too, before Python has started in them: they inherit that it waits."""
    worker = SubprocessWorker(
        Rules("Pong", 0, 30, 0.0), range(1), np.zeros(1, OUTCOME), np.zeros((1, 84, 84), np.uint8)
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.send("num_actions")
    assert worker.receive() == 6
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker.close()
