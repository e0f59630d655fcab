"""A folder of generations: files, and a manifest, written last, that says by their sha256 which belong together.

`checkpoint-000012.json` is the manifest of the twelfth. A commit keeps the generation that it goes on from, so that
there is one to go back to where the newest is damaged, and removes those before. No file of a whole generation is ever
written over. Nothing in it is a pickle.
"""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from policykd.io.files import BadFile, read_verified, remove_stale_temp_files, replace_file, sync_folder
from policykd.storage.shards import Arrays, unpacked

FORMAT = 2
OLD_MANIFEST = "checkpoint.json"
"""of format 1"""
MANIFEST, DAMAGED = "checkpoint", "damaged"
"""kinds of files: manifests, and those that were set aside"""

_NAME = re.compile(r"([a-z]+)-(\d{6,})\.(json|npz|safetensors)")


class Damaged(BadFile):
    """One generation is not what was saved; the one before may be."""


@dataclass(frozen=True)
class Generation:
    """What a manifest says."""

    folder: Path
    number: int
    at: str
    """where the caller was, such as `round 3`"""
    about: Mapping[str, Any]
    files: Mapping[str, str]
    """name -> sha256"""

    def named(self, kind: str) -> dict[str, str]:
        """Returns the files of one kind, oldest first."""
        found = {name: sha256 for name, sha256 in self.files.items() if _kind(name) == kind}
        return dict(sorted(found.items(), key=lambda item: _number(item[0])))


def has_generations(folder: Path) -> bool:
    """Returns whether a folder holds a generation, whole or damaged.

    Raises:
        BadFile: it holds what is left of generations, or those of an older policykd.
    """
    if _numbers(folder, MANIFEST):
        return True
    if (folder / OLD_MANIFEST).exists():
        raise BadFile(
            f"{folder}: holds a checkpoint of format 1, this policykd reads {FORMAT}; end that run with the policykd"
            " that began it, or give another --name"
        )
    if any(_number(path.name) > 1 for path in _files(folder)):
        raise BadFile(
            f"{folder}: holds files of checkpoints but none of their manifests {MANIFEST}-*.json; copy those back, or"
            " give another --name"
        )
    return False


def newest(folder: Path, keys: Collection[str], *, only: str = "") -> Generation:
    """Returns the newest generation whose files are what was saved, with a line on stderr where a newer one is damaged.

    Args:
        folder: it is only read.
        keys: what its `about` must have.
        only: the kind of files that matter; all by default.

    Raises:
        BadFile: there is none, none is whole, or the newest is none of this kind or of a newer format.
    """
    if not has_generations(folder):
        raise BadFile(f"{folder}: no checkpoint to resume from; start the run without --resume")
    damaged, numbers = list[str](), _numbers(folder, MANIFEST)
    if not only and (lost := max((p for p in _files(folder) if _number(p.name) > max(numbers)), default=None)):
        damaged.append(f"{lost}: of a checkpoint that was not ended, or has lost its manifest")
    for number in numbers:
        try:
            generation = _read(folder, number)
            for name in generation.named(only) if only else generation.files:
                read_file(generation, name)
        except Damaged as error:
            damaged.append(str(error))
            continue
        _check_kind(generation, keys)
        if damaged:
            print(f"warning: {'; '.join(damaged)}: going on from {generation.at}, the one before", file=sys.stderr)
        return generation
    raise BadFile(f"{folder}: no checkpoint is whole: {'; '.join(damaged)}; copy them back, or give another --name")


def recover(folder: Path, keys: Collection[str]) -> Generation:
    """Returns the newest whole generation, from which the next commit goes on.

    Damaged manifests are set aside as `damaged-*.json`, and stay until that commit.

    Raises:
        BadFile: as `newest`.
        OSError: no permission.
    """
    generation = newest(folder, keys)
    for number in _numbers(folder, MANIFEST):
        if number > generation.number:
            (folder / _name(MANIFEST, number)).replace(folder / _name(DAMAGED, number))
    return generation


def last(folder: Path, keys: Collection[str]) -> Generation | None:
    """Returns the last generation that was committed and not set aside; only its manifest is verified.

    Raises:
        BadFile: it is none of this kind or of a newer format.
    """
    for number in _numbers(folder, MANIFEST):
        try:
            generation = _read(folder, number)
        except Damaged:
            continue
        _check_kind(generation, keys)
        return generation
    return None


def commit(
    folder: Path,
    before: Generation | None,
    files: Mapping[str, bytes],
    *,
    kept: Iterable[str],
    at: str,
    about: Mapping[str, Any],
) -> None:
    """Writes files, then the manifest that makes them a generation, then removes all but it and the one before.

    Args:
        folder: made if it is missing.
        before: the one that this one goes on from: the `last`.
        files: what is new: kind and ending (`replay.npz`) -> content.
        kept: names of files of the one before that belong to this one too.
        at: where the caller is, such as `round 3`.
        about: what else the manifest says, JSON.

    Raises:
        OSError: no room or no permission; the generation before stays whole.
    """
    number = 1 + max([*_numbers(folder, MANIFEST), *_numbers(folder, DAMAGED)], default=0)
    hashes = {name: before.files[name] for name in kept} if before else {}
    for name, content in files.items():
        kind, _, ending = name.partition(".")
        replace_file(folder / _name(kind, number, ending), content)
        hashes[_name(kind, number, ending)] = hashlib.sha256(content).hexdigest()
    manifest = {"format": FORMAT, "number": number, "at": at, "about": about, "files": hashes}
    replace_file(folder / _name(MANIFEST, number), _sealed(manifest))
    # Once for all: should a power cut keep the manifest's name without the others', its hashes tell.
    sync_folder(folder)
    stay = {*hashes, _name(MANIFEST, number)}
    if before:
        stay |= {*before.files, _name(MANIFEST, before.number)}
    for path in _files(folder):
        if path.name not in stay:
            path.unlink()
    remove_stale_temp_files(folder)


def read_file(generation: Generation, name: str) -> bytes:
    """Returns one of a generation's files.

    Raises:
        BadFile: missing, or not what was saved.
    """
    try:
        return read_verified(generation.folder / name, generation.files[name], "")
    except BadFile as error:
        raise Damaged(str(error)) from error


def read_arrays(generation: Generation, name: str) -> Arrays:
    """Returns the arrays of one of a generation's `.npz` files.

    Raises:
        BadFile: missing, or not what was saved.
    """
    return unpacked(read_file(generation, name), generation.folder / name)


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns tensors as the content of a safetensors file."""
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Returns JSON whose first line is the sha256 of the others."""
    lines = json.dumps(manifest)[1:].encode()
    return f'{{"sha256": "{hashlib.sha256(lines).hexdigest()}",\n'.encode() + lines


def _read(folder: Path, number: int) -> Generation:
    path = folder / _name(MANIFEST, number)
    try:
        content = path.read_bytes()
        seal, _, lines = content.partition(b"\n")
        if seal.decode() != f'{{"sha256": "{hashlib.sha256(lines).hexdigest()}",':
            raise ValueError("its sha256 differs")
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise BadFile(f"{path}: of format {manifest['format']}, this policykd reads {FORMAT}; update policykd")
        generation = Generation(folder, manifest["number"], manifest["at"], manifest["about"], manifest["files"])
        fields = (generation.number, generation.at, generation.about, generation.files)
        if [type(field) for field in fields] != [int, str, dict, dict] or generation.number != number:
            raise ValueError("it is none, or that of another number")
        if not all(_NAME.fullmatch(name) for name in generation.files):
            raise ValueError("it names other files than a generation has")
    except (BadFile, PermissionError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged ({getattr(error, 'strerror', None) or error})") from error
    return generation


def _check_kind(generation: Generation, keys: Collection[str]) -> None:
    if missing := sorted(set(keys) - generation.about.keys()):
        raise BadFile(
            f"{generation.folder}: holds checkpoints of another kind (no {', '.join(missing)}); give another folder"
        )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _numbers(folder: Path, kind: str) -> list[int]:
    """Returns the numbers of all files of a kind, newest first."""
    return sorted((_number(path.name) for path in _files(folder) if _kind(path.name) == kind), reverse=True)


def _name(kind: str, number: int, ending: str = "json") -> str:
    return f"{kind}-{number:06d}.{ending}"


def _kind(name: str) -> str:
    return name.rpartition("-")[0]


def _number(name: str) -> int:
    return int(name.rpartition("-")[2].partition(".")[0])
