"""Signals as a question: the first is noted, the second ends the process (C04 of the fault matrix)."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from policykd.io.signals import check_interrupted, interruptible, noting_signals, seconds_since_signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_asked_for(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with noting_signals():
        check_interrupted()
        assert seconds_since_signal() == 0.0
        signal.raise_signal(number)
        assert 0.0 < seconds_since_signal() < 5.0
        for _ in range(2):  # every loop on the way out is told
            with pytest.raises(KeyboardInterrupt):
                check_interrupted()
        with pytest.raises(KeyboardInterrupt), interruptible():
            pytest.fail("nothing that may block is begun any more")
    assert signal.getsignal(number) == before
    check_interrupted()
    assert capfd.readouterr().err == "\nstopping at the next safe point; again to stop at once\n"


def test_other_threads_are_told() -> None:
    told: list[bool] = []

    def ask() -> None:
        try:
            check_interrupted()
        except KeyboardInterrupt:
            told.append(True)

    with noting_signals():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert told == [True]


def test_what_blocks_is_cut_at_once() -> None:
    with noting_signals():
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM])
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interruptible():
            time.sleep(30)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    code = (
        "import time; from policykd.io.signals import noting_signals\n"
        "with noting_signals():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)"
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
    assert process.wait(timeout=10) == 128 + number
    process.stdout.close()
    process.stderr.close()
