"""Teachers on the Hugging Face Hub: files of one commit, downloaded by huggingface_hub into its own cache."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from httpx2 import HTTPError
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from policykd.agents.archive import MAX_FILE
from policykd.io.files import BadFile
from policykd.io.typed import one_line, parse_json

_ZOO_FILES = ("args.yml", "config.yml", "env_kwargs.yml", "results.json")


@dataclass(frozen=True)
class Snapshot:
    """A teacher's files at one commit, in the local cache."""

    folder: Path
    """the repository's files"""
    archive: Path
    """the unpacked folder with policy.pth and data, or the .zip"""
    revision: str
    """commit, 40 hexadecimal digits"""


@dataclass(frozen=True)
class _RepoFile:
    rfilename: str
    size: int | None = None


@dataclass(frozen=True)
class _RepoInfo:
    """The Hub's answer to a question about a revision."""

    siblings: tuple[_RepoFile, ...] = ()


def fetch(repo: str, revision: str = "") -> Snapshot:
    """Returns a repository's teacher, downloaded unless that very commit is in the cache.

    Args:
        repo: `owner/name`; the archive has the same name, `name/policy.pth` + `name/data` or `name.zip`.
        revision: branch, tag or commit; the default branch if empty.

    Raises:
        ValueError: repository or revision not found, or not readable for this user.
        BadFile: no archive, or one that is too large.
        OSError: the Hub cannot be reached and the cache has no copy, or a file is damaged.
    """
    name = repo.split("/")[1]
    layouts = ((f"{name}/policy.pth", f"{name}/data"), (f"{name}.zip",))  # the unpacked files are a third of the size
    snapshot = _from_cache(repo, revision, layouts)
    if snapshot is None or snapshot.revision != revision:  # a branch may have moved, a commit cannot
        try:
            snapshot = _download(repo, revision, layouts, max_retries=5 if snapshot is None else 0)
        except (HTTPError, OSError, RuntimeError) as error:
            explained = _explained(error, repo, revision, layouts[0][0])
            if snapshot is None or not isinstance(explained, OSError):
                raise explained from error
            # Whoever sets HF_HUB_OFFLINE knows that the cache is used.
            if not constants.HF_HUB_OFFLINE:
                reason = f"hub:{repo}: {_reason(error)}; using commit {snapshot.revision[:12]} of the cache"
                warnings.warn(reason, stacklevel=5)
    archive = snapshot.archive
    for file in (archive, archive / "policy.pth", archive / "data", *(snapshot.folder / name for name in _ZOO_FILES)):
        if file.is_file():
            _check_content(repo, file)
    return snapshot


def _from_cache(repo: str, revision: str, layouts: Sequence[Sequence[str]]) -> Snapshot | None:
    # A layout is cached only if all its files are.
    for layout in layouts:
        paths = [try_to_load_from_cache(repo, file, revision=revision or None) for file in layout]
        if all(isinstance(path, str) for path in paths):
            return _snapshot(str(paths[0]), layout[0], layout)
    return None


def _snapshot(path: str, file: str, layout: Sequence[str]) -> Snapshot:
    """Returns the snapshot that `path` belongs to, which is `file` of the repository."""
    folder = Path(path).parents[file.count("/")]
    return Snapshot(folder, folder / layout[0].removesuffix("/policy.pth"), folder.name)


def _download(repo: str, revision: str, layouts: Sequence[Sequence[str]], *, max_retries: int) -> Snapshot:
    sizes = _file_sizes(repo, revision, max_retries=max_retries)
    layout = next((layout for layout in layouts if sizes.keys() >= set(layout)), None)
    if layout is None:
        tried = " or ".join(" + ".join(layout) for layout in layouts)
        found = ", ".join(sorted(file for file in sizes if file.endswith(".zip"))[:3]) or "no .zip"
        raise BadFile(
            f"hub:{repo}: expected {tried}, found {one_line(found)}; download the archive and give --teacher FILE.zip"
        )
    # The archive comes last, so that everything is in the cache where the archive is.
    files = [*(file for file in _ZOO_FILES if file in sizes), *layout]
    for file in files:
        size = sizes[file]
        if size is None or size > MAX_FILE:
            found = "unknown" if size is None else f"{size:,}"
            raise BadFile(
                f"hub:{repo}: {file}: size {found}, expected at most {MAX_FILE:,} bytes; give another teacher"
            )
    # The first file is requested by the branch's name, which makes the cache record the branch's commit.
    snapshot = _snapshot(hf_hub_download(repo, files[0], revision=revision or None), files[0], layout)
    for file in files[1:]:
        hf_hub_download(repo, file, revision=snapshot.revision)
    return snapshot


def _file_sizes(repo: str, revision: str, *, max_retries: int) -> dict[str, int | None]:
    """Returns the size in bytes of every file of a revision."""
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    response = http_backoff(
        "GET",
        f"{constants.ENDPOINT}/api/models/{repo}{at}",
        headers=build_hf_headers(),
        params={"blobs": True},
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
        max_retries=max_retries,
    )
    hf_raise_for_status(response)
    info = parse_json(_RepoInfo, response.content, f"hub:{repo}")
    return {file.rfilename: file.size for file in info.siblings}


def _explained(error: Exception, repo: str, revision: str, file: str) -> Exception:
    """Returns an error of one line with the reference, the reason and the next step."""
    ref = f"hub:{repo}@{revision}" if revision else f"hub:{repo}"
    if isinstance(error, GatedRepoError):
        return ValueError(f"{ref}: access is restricted by its owner; ask for it on its page, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(f"{ref}: not on the Hub, or private; check the name, or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{ref}: revision {revision!r} not found; check it, or leave it out")
    command = f"hf download {repo}{f' --revision {revision}' if revision else ''}"
    return OSError(
        f"{ref}: {file} is not in the cache and cannot be downloaded ({_reason(error)}); try again later, or run"
        f" `{command}` on a machine with a network and copy the cache"
    )


def _reason(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    # huggingface_hub hides the failed request behind "not in the cache".
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers HTTP {error.response.status_code}"
    return f"{type(error).__name__}: {one_line(str(error))}"


def _check_content(repo: str, path: Path) -> None:
    """Compares a file with the hash in its name in the cache; huggingface_hub itself only compares sizes.

    Raises:
        OSError: they differ; the file is removed from the cache.
    """
    # The cache links names to files that are called by their hash.
    if not path.is_symlink():  # a cache without links, as on Windows, has no hashes in its names
        return
    etag = path.readlink().name
    content = path.read_bytes()
    hashes = {64: hashlib.sha256(content), 40: hashlib.sha1(b"blob %d\0" % len(content) + content)}  # LFS, git
    if len(etag) in hashes and hashes[len(etag)].hexdigest() != etag:
        (path.parent / path.readlink()).unlink()
        path.unlink()
        raise OSError(f"hub:{repo}: {path.name} arrived damaged and was removed from the cache; run the command again")
