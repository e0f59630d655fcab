"""Whatever kills, flips, cuts or removes: the newest whole generation is what is opened, and never none in silence."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from policykd.io.files import BadFile
from policykd.storage.dataset import write_dataset
from policykd.storage.generations import commit, has_generations, last, newest, packed, read_arrays, read_file, recover
from policykd.storage.manifest import MANIFEST, About, open_dataset, read_manifest
from policykd.storage.shards import Arrays, compressed

KEYS = ("rows",)
CALLS = ((io, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"))
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25, stateful_step_count=20)


class Killed(BaseException):
    """What no code may catch."""


@contextmanager
def dying(at: int | None) -> Iterator[list[str]]:
    """Kills at the `at`-th call, counted from 0, and at all that come after it, so that nothing is tidied up.

    Nothing is really synced: the page cache outlives a process, and a disk would only slow the test down.

    Yields:
        the names of the calls so far.
    """
    calls = list[str]()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            calls.append(name)
            if at is not None and len(calls) > at:
                raise Killed
            return None if name == "fsync" else real(*args, **settings)

        return call

    patches = [patch.object(module, name, counted(name, getattr(module, name))) for module, name in CALLS]
    for each in patches:
        each.start()
    try:
        yield calls
    finally:
        for each in patches:
            each.stop()


def add(folder: Path, content: bytes, rows: bytes = b"") -> int:
    """Commits a state and new rows, and returns the number of the generation."""
    before = last(folder, KEYS)
    number = before.number + 1 if before else 1
    files = {"state.safetensors": content, **({"replay.npz": rows} if rows else {})}
    kept = before.named("replay") if before else ()
    commit(folder, before, files, kept=kept, at=f"round {number}", about={"rows": len(rows)})
    return number


def test_what_is_committed_is_read(tmp_path: Path) -> None:
    assert not has_generations(tmp_path / "none")
    assert last(tmp_path, KEYS) is None
    tensors = {"w": torch.arange(5.0)}
    arrays: Arrays = {"x": np.arange(3), "y": np.ones((2, 2), np.uint8)}
    files = {"state.safetensors": packed(tensors), "replay.npz": compressed(arrays)}
    commit(tmp_path, None, files, kept=(), at="round 1", about={"rows": 3})
    generation = newest(tmp_path, KEYS)
    assert (generation.number, generation.at, generation.about) == (1, "round 1", {"rows": 3})
    assert read_file(generation, "state-000001.safetensors") == files["state.safetensors"]
    again = read_arrays(generation, "replay-000001.npz")
    assert all((again[name] == array).all() and again[name].dtype == array.dtype for name, array in arrays.items())


def test_a_commit_cut_at_every_call_keeps_the_one_before_whole(tmp_path: Path) -> None:
    """C02: every point where a commit can die."""
    at, is_done, names = 0, False, list[str]()
    while not is_done:
        folder = tmp_path / str(at)
        for content in (b"one", b"two"):
            with dying(None):
                add(folder, content, content)
        try:
            with dying(at) as names:
                add(folder, b"three", b"three")
            is_done = True
        except Killed:
            at += 1
        with redirect_stderr(io.StringIO()):
            generation = recover(folder, KEYS)
        content = read_file(generation, f"state-{generation.number:06d}.safetensors")
        assert (generation.number, content) in ((2, b"two"), (3, b"three"))
        with dying(None):
            assert add(folder, b"four") == generation.number + 1
        kinds = ("checkpoint", "state")
        assert {p.name for p in folder.iterdir() if p.name.startswith((".", *kinds))} == {
            f"{kind}-{generation.number + k:06d}.{'json' if kind == 'checkpoint' else 'safetensors'}"
            for kind in kinds
            for k in (0, 1)
        }
    assert at == len(names) > 12
    assert {"open", "fsync", "replace", "unlink"} == set(names)


@pytest.mark.parametrize("what", ["missing", "cut"])
def test_a_first_commit_that_was_killed_is_none(what: str, tmp_path: Path) -> None:
    (tmp_path / "state-000001.safetensors").write_bytes(b"cut")
    assert not has_generations(tmp_path)
    with pytest.raises(BadFile, match="no checkpoint to resume from"):
        newest(tmp_path, KEYS)
    add(tmp_path, b"one")
    assert read_file(newest(tmp_path, KEYS), "state-000001.safetensors") == b"one"


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    """C05."""
    add(tmp_path, b"one")
    manifest = tmp_path / "checkpoint-000001.json"
    content = manifest.read_bytes()
    assert json.loads(content)["files"] == {"state-000001.safetensors": hashlib.sha256(b"one").hexdigest()}
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        with pytest.raises(BadFile, match=r"checkpoint-000001\.json: damaged"):
            newest(tmp_path, KEYS)


def sealed(manifest: object) -> bytes:
    lines = json.dumps(manifest)[1:].encode()
    return f'{{"sha256": "{hashlib.sha256(lines).hexdigest()}",\n'.encode() + lines


GOOD = {"format": 2, "number": 1, "at": "round 1", "about": {"rows": 0}, "files": {}}
FOREIGN = {
    "newer": ({**GOOD, "format": 3}, "of format 3, this policykd reads 2; update policykd"),
    "another kind": ({**GOOD, "about": {}}, "checkpoints of another kind (no rows)"),
    "another number": ({**GOOD, "number": 7}, "damaged"),
    "a way out": ({**GOOD, "files": {"../../secret-000001.npz": "ab"}}, "damaged"),
    "files of no kind": ({**GOOD, "files": [1]}, "damaged"),
    "nothing": ({}, "damaged"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_manifest_is_one_line(case: str, tmp_path: Path) -> None:
    manifest, reason = FOREIGN[case]
    (tmp_path / "checkpoint-000001.json").write_bytes(sealed(manifest))
    with pytest.raises(BadFile, match=re.escape(reason)) as error:
        newest(tmp_path, KEYS)
    assert "\n" not in str(error.value)


def test_the_older_format_is_refused(tmp_path: Path) -> None:
    """S11."""
    (tmp_path / "checkpoint.json").write_text('{"format": 1}')
    with pytest.raises(BadFile, match="format 1, this policykd reads 2; end that run with"):
        has_generations(tmp_path)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        add(tmp_path, content)
    (tmp_path / "state-000003.safetensors").write_bytes(b"damaged")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert newest(tmp_path, KEYS).number == 2
    assert newest(tmp_path, KEYS, only="replay").number == 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@dataclass
class Saved:
    """What the model knows of a generation: its manifest, and every file's content."""

    manifest: bytes
    contents: dict[str, bytes]


def damage(data: st.DataObject, file: Path, kind: str) -> None:
    """Changes a file as a bad disk or a careless hand does; no bit of a dataset's manifest, which has no hash."""
    content = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif content and file.name != MANIFEST:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)


class StoreMachine(RuleBasedStateMachine):
    """Commits, kills and damages a folder in any order beside a model that knows what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saved: dict[int, Saved] = {}
        self.is_open = True
        """whether this process has opened the folder since it was killed or the folder damaged"""
        self.num_commits = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def numbers(self, *kinds: str) -> list[int]:
        return sorted((int(p.stem[-6:]) for p in self.folder.glob("[!.]*") if p.stem[:-7] in kinds), reverse=True)

    def is_whole(self, number: int) -> bool:
        name = f"checkpoint-{number:06d}.json"
        files = {name: self.saved[number].manifest, **self.saved[number].contents} if number in self.saved else {}
        return bool(files) and all(
            (self.folder / name).is_file() and (self.folder / name).read_bytes() == content
            for name, content in files.items()
        )

    @precondition(lambda self: self.is_open)
    @rule(
        content=st.binary(min_size=1, max_size=9),
        rows=st.binary(max_size=9),
        drop=st.booleans(),
        dies_at=st.none() | st.integers(0, 22),
    )
    def commit(self, content: bytes, rows: bytes, drop: bool, dies_at: int | None) -> None:
        before = last(self.folder, KEYS)
        number = 1 + max(self.numbers("checkpoint", "damaged"), default=0)
        kept = list(before.named("replay"))[drop:] if before else []
        new = {"state.safetensors": content, **({"replay.npz": rows} if rows else {})}
        contents = {name: self.saved[before.number].contents[name] for name in kept} if before else {}
        contents |= {name.replace(".", f"-{number:06d}."): new[name] for name in new}
        manifest = self.folder / f"checkpoint-{number:06d}.json"
        self.num_commits += 1
        try:
            with dying(dies_at):
                commit(self.folder, before, new, kept=kept, at=f"round {self.num_commits}", about={"rows": 0})
        except Killed:
            self.is_open = False
        if manifest.is_file():
            self.saved[number] = Saved(manifest.read_bytes(), contents)
            assert self.is_whole(number)
        else:
            assert not self.is_open
        assert not before or self.is_whole(before.number)
        if self.is_open:
            both = [(number, contents), *([(before.number, self.saved[before.number].contents)] if before else [])]
            expected = {name for n, of in both for name in (f"checkpoint-{n:06d}.json", *of)}
            assert {p.name for p in self.folder.iterdir()} == expected

    @rule(data=st.data(), kind=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        files = sorted(self.folder.glob("[!.]*"))
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        damage(data, file, kind)
        self.is_open = False

    @rule()
    def reopen(self) -> None:
        numbers = self.numbers("checkpoint")
        whole = next((n for n in numbers if self.is_whole(n)), None)
        highest = max((int(p.stem[-6:]) for p in self.folder.glob("[!.]*")), default=0)
        self.is_open = True
        if whole is None:
            if numbers or highest > 1:
                with pytest.raises(BadFile):
                    recover(self.folder, KEYS)
                shutil.rmtree(self.folder)  # as the message says: copies, or another name
                self.folder.mkdir()
            else:
                assert not has_generations(self.folder)
            return
        with redirect_stderr(io.StringIO()) as said:
            generation = recover(self.folder, KEYS)
        assert generation.number == whole
        assert {name: read_file(generation, name) for name in generation.files} == self.saved[whole].contents
        assert said.getvalue().count("\n") == (highest > whole)
        assert self.numbers("checkpoint")[0] == whole

    @precondition(lambda self: self.is_open and self.numbers("checkpoint"))
    @rule()
    def read(self) -> None:
        generation = newest(self.folder, KEYS)
        contents = {name: read_file(generation, name) for name in generation.named("replay")}
        known = self.saved[generation.number].contents
        assert contents == {name: content for name, content in known.items() if name.startswith("replay")}


def test_any_order_of_commits_kills_and_damage() -> None:
    """C01, C02, C05."""
    run_state_machine_as_test(StoreMachine, settings=QUICK)


@pytest.mark.faults
def test_any_order_of_commits_kills_and_damage_for_long() -> None:
    """C01, C02, C05: the long form."""
    run_state_machine_as_test(StoreMachine, settings=settings(QUICK, max_examples=1000, stateful_step_count=40))


ABOUT = About(obs_shape=(1,), stack=1, dtype="uint8", source="a test", preprocessing="none")


def rows(num_rows: int, rows_per_part: int) -> Iterator[Arrays]:
    frames = np.arange(num_rows, dtype=np.uint8)[:, None]
    for first in range(0, num_rows, rows_per_part):
        part = frames[first : first + rows_per_part]
        yield {"frames": part, "pasts": np.zeros(len(part), np.uint8)}


class ImportMachine(RuleBasedStateMachine):
    """Imports, kills and damages a dataset in any order: it ends as the import that was left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = Path(tempfile.mkdtemp())
        self.folder = self.parent / "d"
        with dying(None):
            write_dataset(self.parent / "whole", ABOUT, rows(30, 30), rows_per_shard=4)
        self.whole = contents(self.parent / "whole")
        self.num_shards = 0
        """that were committed and not damaged since"""

    def teardown(self) -> None:
        shutil.rmtree(self.parent)

    @rule(rows_per_part=st.integers(1, 31), dies_at=st.none() | st.integers(0, 110))
    def import_rows(self, rows_per_part: int, dies_at: int | None) -> None:
        refused = ""
        try:
            with dying(dies_at), redirect_stderr(io.StringIO()):
                write_dataset(self.folder, ABOUT, rows(30, rows_per_part), rows_per_shard=4)
        except Killed:
            num_shards = len(read_manifest(self.folder).shards) if (self.folder / MANIFEST).exists() else 0
            assert num_shards >= self.num_shards
            self.num_shards = num_shards
            return
        except ValueError as error:
            refused = str(error)
        assert MANIFEST in refused or "holds a dataset already" in refused or contents(self.folder) == self.whole
        shutil.rmtree(self.folder)
        self.num_shards = 0

    @precondition(lambda self: self.folder.exists())
    @rule(data=st.data(), kind=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        files = sorted(self.folder.glob("[!.]*"))
        if files:
            damage(data, data.draw(st.sampled_from(files)), kind)
            self.num_shards = 0

    @precondition(lambda self: (self.folder / MANIFEST).exists())
    @rule()
    def read(self) -> None:
        files, refused = contents(self.folder), ""
        try:
            dataset = open_dataset(self.folder)
            frames = np.concatenate([arrays["frames"] for _, arrays in dataset.read()])
        except BadFile as error:
            refused = str(error)
        else:
            assert (frames[:, 0] == np.arange(dataset.num_rows)).all()
        bad = {name for name in {*files, *self.whole} if files.get(name) != self.whole.get(name)}
        assert not refused or any(name in refused for name in bad)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*") if p.name != ".lock"}


def test_any_order_of_imports_kills_and_damage() -> None:
    """D02, D04."""
    run_state_machine_as_test(ImportMachine, settings=settings(QUICK, max_examples=15, stateful_step_count=10))


@pytest.mark.faults
def test_any_order_of_imports_kills_and_damage_for_long() -> None:
    """D02, D04: the long form."""
    run_state_machine_as_test(ImportMachine, settings=settings(QUICK, max_examples=300))


COMMITS = """
import sys
from pathlib import Path
from policykd.storage.generations import commit, last, recover, has_generations
folder = Path(sys.argv[1])
if has_generations(folder):
    recover(folder, ())
for _ in range(10**6):
    before = last(folder, ())
    n = before.about["n"] + 1 if before else 1
    new = {"state.safetensors": n.to_bytes(4, "big") * 300_000, "replay.npz": n.to_bytes(4, "big") * 1000}
    kept = list(before.named("replay"))[-20:] if before else ()
    commit(folder, before, new, kept=kept, at=f"round {n}", about={"n": n})
    print(n, flush=True)
"""


def kill_and_reopen(folder: Path, times: int, seed: int) -> None:
    chance, committed = random.Random(seed), 0
    for _ in range(times):
        command = [sys.executable, "-c", COMMITS, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            said = [process.stdout.readline()]
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
            said += process.stdout.readlines()
        committed = max([committed, *(int(line) for line in said if line.endswith("\n"))])
        with redirect_stderr(io.StringIO()):
            generation = newest(folder, ())
        assert generation.about["n"] in (committed, committed + 1)
        committed = generation.about["n"]
        for name in generation.files:
            content = read_file(generation, name)
            assert content == content[:4] * (len(content) // 4)


def test_a_process_that_is_killed_loses_no_commit(tmp_path: Path) -> None:
    """C01: the short form."""
    kill_and_reopen(tmp_path, times=2, seed=0)


@pytest.mark.faults
def test_a_process_that_is_killed_200_times_loses_no_commit(tmp_path: Path) -> None:
    """C01."""
    kill_and_reopen(tmp_path, times=200, seed=1)


IMPORTS = """
import sys
from pathlib import Path
import numpy as np
from policykd.storage.dataset import write_dataset
from policykd.storage.manifest import About
def rows():
    print("begun", flush=True)
    for first in range(0, 6_000, 100):
        frames = np.arange(first, first + 100, dtype=np.float32)[:, None]
        yield {"frames": frames, "pasts": np.zeros(100, np.uint8)}
about = About(obs_shape=(1,), stack=1, dtype="float32", source="a test", preprocessing="none")
write_dataset(Path(sys.argv[1]), about, rows(), rows_per_shard=100)
"""


@pytest.mark.faults
def test_an_import_that_is_killed_until_it_ends_loses_no_shard(tmp_path: Path) -> None:
    """D02."""
    subprocess.run([sys.executable, "-c", IMPORTS, tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
    whole, chance, num_kills, dataset = contents(tmp_path / "whole"), random.Random(0), 0, None
    while not (dataset and dataset.is_complete):
        command = [sys.executable, "-c", IMPORTS, str(tmp_path / "d")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(chance.uniform(0, 1))
            process.kill()
        num_kills += process.returncode != 0
        num_rows = dataset.num_rows if dataset else 0
        if (tmp_path / "d" / MANIFEST).exists():
            dataset = open_dataset(tmp_path / "d")
            assert sum(len(arrays["pasts"]) for _, arrays in dataset.read()) == dataset.num_rows
        assert (dataset.num_rows if dataset else 0) >= num_rows
    assert num_kills > 0
    assert contents(tmp_path / "d") == whole
