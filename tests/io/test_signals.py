"""Signals interrupt the main thread, deferred where needed; a second one ends the process (C04 of the fault matrix)."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from policykd.io.signals import check_interrupted, deferred_signals, handle_signals, is_signalled

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    previous = signal.getsignal(number)

    @handle_signals()
    def wait() -> None:
        check_interrupted()
        threading.Timer(0.1, os.kill, [os.getpid(), number]).start()
        time.sleep(300)
        pytest.fail("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert signal.getsignal(number) == previous
    assert not is_signalled()
    check_interrupted()
    assert capfd.readouterr().err == "\nstopping; press Ctrl-C again to stop at once\n"


def test_background_threads_can_ask() -> None:
    seen: list[bool] = []

    def ask() -> None:
        try:
            check_interrupted()
        except KeyboardInterrupt:
            seen.append(True)

    @handle_signals()
    def interrupt() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    interrupt()
    assert seen == [True]


def test_a_deferred_signal_interrupts_at_the_end_of_the_outermost_block() -> None:
    reached: list[str] = []

    @handle_signals()
    @deferred_signals()
    def commit() -> None:
        with deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            reached.append("inner")
        reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert reached == ["inner", "outer"]
    with deferred_signals():  # of no effect without a signal
        pass


def test_a_swallowed_interrupt_is_raised_again_at_the_next_commit() -> None:
    @handle_signals()
    def swallow() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with deferred_signals():
            pass
        pytest.fail("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        swallow()


def test_background_threads_do_not_defer() -> None:
    errors: list[BaseException] = []

    def commit() -> None:
        with deferred_signals():
            errors.append(RuntimeError("ran"))

    with handle_signals():
        thread = threading.Thread(target=commit)
        thread.start()
        thread.join()
    assert [str(error) for error in errors] == ["ran"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    code = (
        "import time; from policykd.io.signals import *\n"
        "with handle_signals(), deferred_signals():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.readline() == "\n"
    assert "again to stop at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=100) == 128 + number
    process.stdout.close()
    process.stderr.close()
