"""Rows of a comparison in processes of their own, some at once; a row waits for the one that it begins with."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from policykd.cli.command import INTERRUPTED, exit_with_one_line, prepare_device
from policykd.compression.comparison import Setting, make_row, results_of
from policykd.compression.rows import TEACHER, Row, check_order
from policykd.io.signals import check_interrupted

POLL_SECONDS = 0.5


def make_rows(rows: Sequence[Row], setting: Setting, *, jobs: int) -> list[Row]:
    """Makes the rows that are not finished and returns those that failed, and those that waited for them.

    Args:
        rows: none before the one that it begins with.
        setting: what they have in common.
        jobs: processes at once, a thread each.

    Raises:
        KeyboardInterrupt: a signal has come; the processes have ended, and what they finished is kept.
    """
    check_order(rows)
    waiting, done = list[Row](), set[str]()
    for row in rows:
        if results_of(row, setting):
            done.add(row.name)
        else:
            waiting.append(row)
    running: dict[BaseProcess, Row] = {}
    failed: list[Row] = []
    try:
        while running or waiting:
            check_interrupted()
            ready = [row for row in waiting if row.begins_with in done or row.name == TEACHER]
            for row in ready[: jobs - len(running)]:
                waiting.remove(row)
                running[_started(row, setting)] = row
            if not running:
                return failed + waiting  # what they begin with has failed
            wait([process.sentinel for process in running], POLL_SECONDS)
            for process in [p for p in running if not p.is_alive()]:
                row = running.pop(process)
                if process.exitcode == INTERRUPTED:
                    raise KeyboardInterrupt
                (failed.append(row) if process.exitcode else done.add(row.name))
    except BaseException:
        _end(list(running))
        raise
    return failed


def _started(row: Row, setting: Setting) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(row, setting))
    process.start()
    return process


def _make(row: Row, setting: Setting) -> None:
    """Is what a row's process does; it ends with its parent, however that ended."""
    os.setsid()  # a Ctrl-C is handed on once, by the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def make() -> None:
        prepare_device("cpu", 1)
        torch.set_num_threads(1)
        make_row(row, setting)

    exit_with_one_line(make)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Asks processes to finish what they are writing and to end, and waits until they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
