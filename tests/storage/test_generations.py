"""Whatever is killed, flipped, cut or removed: the newest intact generation is opened, and nothing is lost silently."""

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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from policykd.io.files import BadFile
from policykd.io.typed import Arrays, pack_arrays
from policykd.storage.dataset import open_dataset, write_dataset
from policykd.storage.generations import Manifest, Origin, StatesInfo, commit, has_generations, last, newest, recover

CALLS = ((io, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"))
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25, stateful_step_count=20)
MANIFEST = "manifest-000001.json"


class Killed(BaseException):
    """Raised where a process is killed; no code may catch it."""


@contextmanager
def dying(at: int | None) -> Iterator[list[str]]:
    """Kills at the `at`-th call, counted from 0, and at all that follow, so that nothing is tidied up.

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


def rows(content: bytes) -> Arrays:
    return {"x": np.frombuffer(content, np.uint8)} if content else {}


def add(folder: Path, content: bytes, new_rows: bytes = b"") -> int:
    """Commits a model and new rows, and returns the number of the generation."""
    previous = last(folder, "round")
    number = previous.manifest.number + 1 if previous else 1
    manifest = Manifest(unit="round", position=number, shards=previous.manifest.shards if previous else {})
    return commit(folder, previous, manifest, {"model.safetensors": content}, rows(new_rows)).manifest.number


def test_what_is_committed_is_read(tmp_path: Path) -> None:
    assert not has_generations(tmp_path / "none")
    assert last(tmp_path, "round") is None
    arrays: Arrays = {"x": np.arange(3), "y": np.ones((3, 2), np.uint8)}
    files = {"model.safetensors": b"weights", "progress.json": b"{}"}
    commit(tmp_path, None, Manifest(unit="round", position=1), files, arrays, first_row=5)
    generation = newest(tmp_path, "round")
    assert (generation.manifest.number, str(generation)) == (1, "round 1")
    assert generation.read_kind("model") == b"weights"
    ((name, found),) = generation.read_shards()
    assert all((found[key] == array).all() and found[key].dtype == array.dtype for key, array in arrays.items())
    shard = generation.manifest.shards[name]
    assert (shard.first_row, shard.num_rows, shard.num_states) == (5, 3, 3)


def test_a_commit_that_is_killed_at_any_call_keeps_the_previous_generation(tmp_path: Path) -> None:
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
            generation = recover(folder, "round")
        number = generation.manifest.number
        assert (number, generation.read_kind("model")) in ((2, b"two"), (3, b"three"))
        with dying(None):
            assert add(folder, b"four") == number + 1
        kept = {p.name for p in folder.iterdir() if not p.name.startswith("states")}
        assert kept == {
            f"{name}-{n:06d}.{ending}"
            for name, ending in (("manifest", "json"), ("model", "safetensors"))
            for n in (number, number + 1)
        }
    assert at == len(names) > 12
    assert {"open", "fsync", "replace", "unlink"} == set(names)


def test_a_first_commit_that_was_killed_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "model-000001.safetensors").write_bytes(b"cut")
    assert not has_generations(tmp_path)
    with pytest.raises(BadFile, match="no checkpoint to resume from"):
        newest(tmp_path, "round")
    add(tmp_path, b"one")
    assert newest(tmp_path, "round").read_kind("model") == b"one"


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    """C05."""
    add(tmp_path, b"one")
    manifest = tmp_path / MANIFEST
    content = manifest.read_bytes()
    entry = json.loads(content)["files"]["model-000001.safetensors"]
    assert entry == {"sha256": hashlib.sha256(b"one").hexdigest(), "num_bytes": 3}
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        with pytest.raises(BadFile, match=r"manifest-000001\.json: damaged"):
            newest(tmp_path, "round")


def edit_manifest(path: Path, **changes: object) -> None:
    """Changes fields of a manifest, and seals it again as an attacker would."""
    manifest = {**json.loads(path.read_bytes()), **changes}
    del manifest["sha256"]
    lines = b"\n" + json.dumps(manifest, indent=1).encode()[1:]
    path.write_bytes(b'{"sha256": "%s",' % hashlib.sha256(lines).hexdigest().encode() + lines)


ENTRY = {"sha256": "ab" * 32, "num_bytes": 3}
FOREIGN: dict[str, tuple[dict[str, object], str]] = {
    "newer": ({"format": 4, "unit": "?"}, "of format 4, this policykd reads 3; update policykd"),
    "another kind": ({"unit": "step"}, "expected a count of rounds, found one of steps"),
    "another number": ({"number": 7}, "the manifest of generation 7"),
    "a path": ({"files": {"../../secret-000001.npz": ENTRY}}, "should match pattern"),
    "a size": ({"files": {"model-000001.json": {**ENTRY, "num_bytes": 1 << 50}}}, "less than or equal"),
    "files of another type": ({"files": [1]}, "should be an object"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_manifest_is_one_line(case: str, tmp_path: Path) -> None:
    changes, reason = FOREIGN[case]
    add(tmp_path, b"one")
    edit_manifest(tmp_path / MANIFEST, **changes)
    with pytest.raises(BadFile, match=re.escape(reason)) as error:
        newest(tmp_path, "round")
    assert "\n" not in str(error.value)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        add(tmp_path, content)
    (tmp_path / "model-000003.safetensors").write_bytes(b"damaged")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert newest(tmp_path, "round").manifest.number == 2
    assert newest(tmp_path).manifest.number == 3  # its states are intact
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@dataclass
class Saved:
    """What the model knows of a generation: its manifest, and every file's content."""

    manifest: bytes
    contents: dict[str, bytes]


def damage(data: st.DataObject, file: Path, kind: str) -> None:
    """Changes a file as a bad disk or a careless hand does."""
    content = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)


class GenerationsMachine(RuleBasedStateMachine):
    """Commits, kills and damages a folder in any order, and compares it with a model of what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saved: dict[int, Saved] = {}
        self.is_open = True
        """whether this process has opened the folder since it was killed or the folder damaged"""
        self.num_commits = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def numbers(self) -> list[int]:
        return sorted((int(p.stem[-6:]) for p in self.folder.glob("manifest-*")), reverse=True)

    def is_intact(self, number: int) -> bool:
        name = f"manifest-{number:06d}.json"
        files = {name: self.saved[number].manifest, **self.saved[number].contents} if number in self.saved else {}
        return bool(files) and all(
            (self.folder / name).is_file() and (self.folder / name).read_bytes() == content
            for name, content in files.items()
        )

    @precondition(lambda self: self.is_open)
    @rule(
        content=st.binary(min_size=1, max_size=9),
        new_rows=st.binary(max_size=9),
        drop=st.booleans(),
        dies_at=st.none() | st.integers(0, 22),
    )
    def commit(self, content: bytes, new_rows: bytes, drop: bool, dies_at: int | None) -> None:
        previous = last(self.folder, "round")
        number = 1 + max(self.numbers(), default=0)
        shards = dict(list(previous.manifest.shards.items())[drop:]) if previous else {}
        contents = {name: self.saved[previous.manifest.number].contents[name] for name in shards} if previous else {}
        contents[f"model-{number:06d}.safetensors"] = content
        if new_rows:
            contents[f"states-{number:06d}.npz"] = pack_arrays(rows(new_rows))
        manifest = self.folder / f"manifest-{number:06d}.json"
        self.num_commits += 1
        try:
            with dying(dies_at):
                new = Manifest(unit="round", position=self.num_commits, shards=shards)
                commit(self.folder, previous, new, {"model.safetensors": content}, rows(new_rows))
        except Killed:
            self.is_open = False
        if manifest.is_file():
            self.saved[number] = Saved(manifest.read_bytes(), contents)
            assert self.is_intact(number)
        else:
            assert not self.is_open
        assert not previous or self.is_intact(previous.manifest.number)
        if self.is_open:
            kept = [number, previous.manifest.number] if previous else [number]
            expected = {name for n in kept for name in (f"manifest-{n:06d}.json", *self.saved[n].contents)}
            assert {p.name for p in self.folder.iterdir()} == expected

    @rule(data=st.data(), kind=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        if files := sorted(self.folder.glob("[!.]*")):
            damage(data, data.draw(st.sampled_from(files)), kind)
            self.is_open = False

    @rule()
    def reopen(self) -> None:
        numbers = self.numbers()
        intact = next((n for n in numbers if self.is_intact(n)), None)
        highest = max((int(p.stem[-6:]) for p in self.folder.glob("[!.]*")), default=0)
        self.is_open = True
        if intact is None:
            if numbers or highest > 1:
                with pytest.raises(BadFile):
                    recover(self.folder, "round")
                shutil.rmtree(self.folder)  # as the message says: copies, or another folder
                self.folder.mkdir()
            else:
                assert not has_generations(self.folder)
            return
        with redirect_stderr(io.StringIO()) as printed:
            generation = recover(self.folder, "round")
        assert generation.manifest.number == intact
        assert {name: generation.read(name) for name in generation.files} == self.saved[intact].contents
        assert printed.getvalue().count("\n") == (highest > intact)
        assert self.numbers()[0] == intact

    @precondition(lambda self: self.is_open and self.numbers())
    @rule()
    def read(self) -> None:
        generation = newest(self.folder)
        known = self.saved[generation.manifest.number].contents
        assert {name: generation.read(name) for name in generation.files} == known


def test_any_order_of_commits_kills_and_damage() -> None:
    """C01, C02, C05."""
    run_state_machine_as_test(GenerationsMachine, settings=QUICK)


@pytest.mark.faults
def test_any_order_of_commits_kills_and_damage_for_long() -> None:
    """C01, C02, C05: the long form."""
    run_state_machine_as_test(GenerationsMachine, settings=settings(QUICK, max_examples=1000, stateful_step_count=40))


INFO = StatesInfo(obs_shape=(1,), dtype="uint8", origin=Origin("a test"))


def parts(num_rows: int, rows_per_part: int) -> Iterator[Arrays]:
    frames = np.arange(num_rows, dtype=np.uint8)[:, None]
    for first in range(0, num_rows, rows_per_part):
        part = frames[first : first + rows_per_part]
        yield {"frames": part, "num_past_frames": np.zeros(len(part), np.uint8)}


class ImportMachine(RuleBasedStateMachine):
    """Imports, kills and damages a dataset in any order: it ends as the import that was left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = Path(tempfile.mkdtemp())
        self.folder = self.parent / "d"
        with dying(None):
            self.sha256 = write_dataset(self.parent / "whole", INFO, parts(30, 30), rows_per_shard=4).sha256
        self.num_shards = 0
        """that were committed and not damaged since"""

    def teardown(self) -> None:
        shutil.rmtree(self.parent)

    @rule(rows_per_part=st.integers(1, 31), dies_at=st.none() | st.integers(0, 200))
    def import_rows(self, rows_per_part: int, dies_at: int | None) -> None:
        refused = ""
        try:
            with dying(dies_at), redirect_stderr(io.StringIO()):
                write_dataset(self.folder, INFO, parts(30, rows_per_part), rows_per_shard=4)
        except Killed:
            generation = last(self.folder, "row")
            num_shards = len(generation.manifest.shards) if generation else 0
            assert num_shards >= self.num_shards
            self.num_shards = num_shards
            return
        except ValueError as error:
            refused = str(error)
        allowed = ("holds a dataset already", "its manifests are damaged", "but no manifest")
        assert any(reason in refused for reason in allowed) or open_dataset(self.folder).sha256 == self.sha256
        shutil.rmtree(self.folder)
        self.num_shards = 0

    @precondition(lambda self: self.folder.exists())
    @rule(data=st.data(), kind=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        if files := sorted(self.folder.glob("[!.]*")):
            damage(data, data.draw(st.sampled_from(files)), kind)
            self.num_shards = 0

    @precondition(lambda self: self.folder.exists())
    @rule()
    def read(self) -> None:
        try:
            with redirect_stderr(io.StringIO()):
                dataset = open_dataset(self.folder)
        except BadFile:
            return
        frames = np.concatenate([arrays["frames"] for _, arrays in dataset.generation.read_shards()])
        assert (frames[:, 0] == np.arange(dataset.num_rows)).all()


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
import numpy as np
from policykd.storage.generations import commit, has_generations, last, recover
from policykd.storage.generations import Manifest
folder = Path(sys.argv[1])
if has_generations(folder):
    recover(folder, "round")
for _ in range(10**6):
    previous = last(folder, "round")
    n = previous.manifest.position + 1 if previous else 1
    kept = dict(list(previous.manifest.shards.items())[-20:]) if previous else {}
    content = n.to_bytes(4, "big") * 300_000
    commit(folder, previous, Manifest(unit="round", position=n, shards=kept), {"model.safetensors": content},
           {"x": np.full(1000, n)})
    print(n, flush=True)
"""


def kill_and_reopen(folder: Path, times: int, seed: int) -> None:
    chance, committed = random.Random(seed), 0
    for _ in range(times):
        command = [sys.executable, "-c", COMMITS, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            printed = [process.stdout.readline()]
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
            printed += process.stdout.readlines()
        committed = max([committed, *(int(line) for line in printed if line.endswith("\n"))])
        with redirect_stderr(io.StringIO()):
            generation = newest(folder, "round")
        assert generation.manifest.position in (committed, committed + 1)
        committed = generation.manifest.position
        content = generation.read_kind("model")
        assert content == committed.to_bytes(4, "big") * 300_000
        assert [arrays["x"][0] for _, arrays in generation.read_shards()][-1] == committed


@pytest.mark.faults
def test_a_process_that_is_killed_200_times_loses_no_commit(tmp_path: Path) -> None:
    """C01."""
    kill_and_reopen(tmp_path, times=200, seed=1)
