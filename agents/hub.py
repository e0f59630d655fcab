"""Teachers on the Hugging Face Hub: files of one commit, in huggingface_hub's own cache, checked and never executed."""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from policykd.agents.archive import MAX_FILE
from policykd.io.files import BadFile
from policykd.io.signals import interruptible

T = TypeVar("T")

_PAUSES = (1.0, 2.0, 4.0)
"""seconds before asking again"""
_LONGEST_PAUSE = 60.0
_BESIDE = ("args.yml", "config.yml", "env_kwargs.yml", "results.json")


@dataclass(frozen=True)
class Snapshot:
    """A teacher's files at one commit, in the local cache."""

    folder: Path
    """of the repository's files"""
    archive: Path
    """the unpacked folder with policy.pth and data, or the .zip"""
    revision: str
    """the commit, 40 hexadecimal digits"""


def fetch(repo: str, revision: str = "") -> Snapshot:
    """Returns a repository's teacher, downloaded unless that very commit is in the cache.

    Args:
        repo: `owner/name`; the archive is named like it, `name/policy.pth` + `name/data` or `name.zip`.
        revision: branch, tag or commit; the default branch if empty.

    Raises:
        ValueError: no such repository or revision, or none that may be read.
        BadFile: a repository without an archive, or with one that is too large.
        OSError: the Hub cannot be reached and the cache has no copy, or a file is damaged.
    """
    from httpx2 import HTTPError

    name = repo.split("/")[1]
    layouts = [(f"{name}/policy.pth", f"{name}/data"), (f"{name}.zip",)]  # the first is a third of the size
    snapshot = _cached(repo, revision, layouts)
    if snapshot is None or snapshot.revision != revision:  # a branch may have moved, a commit cannot
        try:
            snapshot = _download(repo, revision, layouts, pauses=() if snapshot else _PAUSES)
        except (HTTPError, OSError, RuntimeError) as error:
            explained = _explained(error, repo, revision, layouts[0][0])
            if snapshot is None or not isinstance(explained, OSError):
                raise explained from error
            if not _is_offline():
                warnings.warn(
                    f"hub:{repo}: {_reason(error)}; using commit {snapshot.revision[:12]} of the cache", stacklevel=5
                )
    archive = snapshot.archive
    for file in (archive, archive / "policy.pth", archive / "data", *(snapshot.folder / name for name in _BESIDE)):
        if file.is_file():
            _check_content(repo, file)
    return snapshot


def _cached(repo: str, revision: str, layouts: Sequence[Sequence[str]]) -> Snapshot | None:
    from huggingface_hub import try_to_load_from_cache

    for layout in layouts:
        paths = [try_to_load_from_cache(repo, file, revision=revision or None) for file in layout]
        if all(isinstance(path, str) for path in paths):
            return _snapshot(str(paths[0]), layout[0], layout)
    return None


def _snapshot(path: str, file: str, layout: Sequence[str]) -> Snapshot:
    folder = Path(path).parents[file.count("/")]
    return Snapshot(folder, folder / layout[0].removesuffix("/policy.pth"), folder.name)


def _download(repo: str, revision: str, layouts: Sequence[Sequence[str]], *, pauses: Sequence[float]) -> Snapshot:
    from huggingface_hub import HfApi, constants, hf_hub_download

    ask = partial(HfApi().model_info, repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    about = _insist(partial(ask, revision=revision or None), pauses)
    sizes = {file.rfilename: file.size for file in about.siblings or ()}
    layout = next((layout for layout in layouts if sizes.keys() >= set(layout)), None)
    if layout is None:
        tried = " or ".join(" + ".join(layout) for layout in layouts)
        found = ", ".join(sorted(file for file in sizes if file.endswith(".zip"))[:3]) or "no .zip at all"
        raise BadFile(f"hub:{repo}: expected {tried}, found {found}; download the archive and give --teacher FILE.zip")
    # the archive last: where it is cached, all is; the first by the branch's name: the cache notes where that stood
    files = [*(file for file in _BESIDE if file in sizes), *layout]
    for file in files:
        if (size := sizes[file]) is None:
            raise BadFile(f"hub:{repo}: the Hub does not say how large {file} is; give --teacher FILE.zip instead")
        if size > MAX_FILE:
            raise BadFile(f"hub:{repo}: {file} has {size:,} bytes, more than a policy can need; do not use it")
    first = _insist(partial(hf_hub_download, repo, files[0], revision=revision or None), pauses)
    snapshot = _snapshot(first, files[0], layout)
    for file in files[1:]:
        _insist(partial(hf_hub_download, repo, file, revision=snapshot.revision), pauses)
    return snapshot


def _insist(question: Callable[[], T], pauses: Sequence[float]) -> T:
    """Returns the Hub's answer; asks again after each pause while the trouble may pass."""
    from httpx2 import HTTPError

    for pause in pauses:
        try:
            with interruptible():
                return question()
        except (HTTPError, OSError, RuntimeError) as error:
            if (seconds := _seconds_to_wait(error, pause)) is None:
                raise
        with interruptible():
            time.sleep(seconds)
    with interruptible():
        return question()


def _seconds_to_wait(error: Exception, pause: float) -> float | None:
    """Returns how long to wait before asking again, or None where it is of no use."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not isinstance(error, HfHubHTTPError):
        # not cached: huggingface_hub has asked six times by then; an errno: the trouble is this machine's disk
        final = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or getattr(error, "errno", None)
        return None if final else pause
    if error.response.status_code < 500 and error.response.status_code not in (408, 429):
        return None
    wanted = error.response.headers.get("Retry-After", "")
    seconds = max(pause, float(wanted)) if wanted.isdigit() else pause
    return seconds if seconds <= _LONGEST_PAUSE else None


def _explained(error: Exception, repo: str, revision: str, file: str) -> Exception:
    """Returns what a user is told: one line with the name, the reason and the next step."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    ref = f"hub:{repo}@{revision}" if revision else f"hub:{repo}"
    if isinstance(error, GatedRepoError):
        return ValueError(f"{ref}: only for those whom its owner accepts; ask on its page, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(f"{ref}: not on the Hub, or private; check the name, or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{ref}: the repository has no revision {revision!r}; check it, or leave it out")
    command = f"hf download {repo}{f' --revision {revision}' if revision else ''}"
    return OSError(
        f"{ref}: {file} is not in the cache and cannot be fetched ({_reason(error)}); try again later, or run"
        f" `{command}` where there is a network and carry the cache over"
    )


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers HTTP {error.response.status_code}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _check_content(repo: str, path: Path) -> None:
    """Compares a file with the hash that the cache names it by; huggingface_hub itself only compares sizes.

    Raises:
        OSError: they differ; the file is gone from the cache then.
    """
    if not path.is_symlink():  # a cache without links, as on Windows, names its files by nothing
        return
    etag, content = path.readlink().name, path.read_bytes()
    hashes = {64: hashlib.sha256(content), 40: hashlib.sha1(b"blob %d\0" % len(content) + content)}  # LFS, git
    if len(etag) in hashes and hashes[len(etag)].hexdigest() != etag:
        (path.parent / path.readlink()).unlink()
        path.unlink()
        raise OSError(f"hub:{repo}: {path.name} arrived damaged and was removed from the cache; run the same again")
