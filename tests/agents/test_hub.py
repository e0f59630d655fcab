"""The Hub as huggingface_hub really asks it: an HTTP server on loopback, its troubles, and a hand-made cache."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import gymnasium as gym
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN

from policykd.agents import hub
from policykd.agents.teacher import load_teacher

NAME = "dqn-PongNoFrameskip-v4"
REPO = f"sb3/{NAME}"
TOKEN = "hf_averysecrettoken"
ZOO = {
    "args.yml": b"!!python/object/apply:collections.OrderedDict\n- - - algo\n    - dqn\n"
    b"  - - env\n    - PongNoFrameskip-v4\n",
    "config.yml": b"!!python/object/apply:collections.OrderedDict\n- - - env_wrapper\n"
    b"    - - stable_baselines3.common.atari_wrappers.AtariWrapper\n  - - frame_stack\n    - 4\n",
    "env_kwargs.yml": b"{}\n",
    "results.json": b'{"mean_reward": 20.7, "std_reward": 0.45, "is_deterministic": false, "n_eval_episodes": 10}',
    "README.md": b"never requested",
}


class Hub(ThreadingHTTPServer):
    """One repository at one commit, behind the Hub's API; large files are on another host, as the Hub's are."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.commit, self.declared = files, "a" * 40, dict[str, int | None]()
        self.troubles: list[tuple[str, str | int, int]] = []
        """pattern of "METHOD path" -> HTTP status or what else goes wrong, how many times"""
        self.requests: list[str] = []
        self.tokens: dict[str, set[str | None]] = {}
        """host -> the Authorization headers that came there"""
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def trouble(self, request: str) -> str | int | None:
        for i, (pattern, what, times) in enumerate(self.troubles):
            if re.search(pattern, request) and times:
                self.troubles[i] = (pattern, what, times - 1)
                return what
        return None


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # huggingface_hub's telemetry, once a day
            return self.reply(404)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        host = (self.headers["Host"] or "").split(":")[0]
        self.hub.tokens.setdefault(host, set()).add(self.headers["Authorization"])
        trouble = self.hub.trouble(request)
        if isinstance(trouble, int):
            gated = {"X-Error-Code": "GatedRepo"} if trouble == 403 and "/api/" in path else {}
            return self.reply(trouble, headers={"Retry-After": "0", **gated})
        if host == "localhost":
            return self.send_file(path.removeprefix("/cdn/"), trouble)
        if path.startswith(f"/api/models/{REPO}"):
            return self.send_about(path)
        if resolved := re.fullmatch(f"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self.send_file(resolved[2], trouble)
        return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def send_about(self, path: str) -> None:
        server = self.hub
        if path.rpartition("/revision/")[2] not in (f"/api/models/{REPO}", path, "main", server.commit):
            return self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": f, "size": server.declared.get(f, len(c))} for f, c in server.files.items()]
        return self.reply(200, json.dumps({"id": REPO, "sha": server.commit, "siblings": files}).encode())

    def send_file(self, file: str, trouble: str | int | None) -> None:
        if file not in self.hub.files:
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        content, size = self.hub.files[file], len(self.hub.files[file])
        headers = {"X-Repo-Commit": self.hub.commit}
        if size > 100_000 and (self.headers["Host"] or "").startswith("127."):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size)}
            return self.reply(
                302, headers={**headers, "Location": f"http://localhost:{self.hub.server_port}/cdn/{file}"}
            )
        blob = b"blob %d\0" % size + content
        headers["ETag"] = f'"{hashlib.sha1(blob).hexdigest()}"'
        if trouble == "wrong":
            content = bytes(size)
        first = int((self.headers["Range"] or "bytes=0-")[6:-1])
        headers |= {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if first else {}
        return self.reply(206 if first else 200, content[first:], headers, cut=trouble == "cut")

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Atari, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sb3") / f"{NAME}.zip"
    DQN("CnnPolicy", Frames(), buffer_size=1, seed=0, device="cpu").save(path)
    return path


@pytest.fixture
def repository(archive: Path) -> dict[str, bytes]:
    """What rl_zoo3.push_to_hub writes: the zip, the same unpacked, and the zoo's files."""
    with zipfile.ZipFile(archive) as unpacked:
        members = {f"{NAME}/{member}": unpacked.read(member) for member in unpacked.namelist()}
    return {f"{NAME}.zip": archive.read_bytes(), **members, **ZOO}


@pytest.fixture
def server(repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The loopback Hub, an empty cache, and short pauses; huggingface_hub is configured as its environment would."""
    with Hub(repository) as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # huggingface_hub's retries wait
        yield server
        server.shutdown()


def test_the_unpacked_files_come_first_and_from_one_commit(server: Hub) -> None:
    snapshot = hub.fetch(REPO)
    assert (snapshot.archive.name, snapshot.revision) == (NAME, server.commit)
    assert (snapshot.archive / "policy.pth").read_bytes() == server.files[f"{NAME}/policy.pth"]
    assert sorted(p.name for p in snapshot.folder.iterdir()) == sorted([NAME, *(f for f in ZOO if f != "README.md")])
    assert not any(".zip" in request or "optimizer" in request for request in server.requests)
    assert [request.rpartition("/")[2] for request in server.requests[-3:]] == ["policy.pth", "data", "data"]
    server.requests.clear()
    assert hub.fetch(REPO, server.commit) == snapshot
    assert server.requests == []  # a commit cannot change: what is cached is not requested again


def test_the_zip_is_the_fall_back(server: Hub) -> None:
    del server.files[f"{NAME}/policy.pth"]
    snapshot = hub.fetch(REPO)
    assert snapshot.archive.read_bytes() == server.files[f"{NAME}.zip"]
    assert snapshot.archive.name == f"{NAME}.zip"


def test_a_branch_that_moved_is_fetched_again_and_a_hub_that_is_gone_is_not_needed(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fetch(REPO)
    server.commit = "b" * 40
    assert hub.fetch(REPO).revision == "b" * 40
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=r"ConnectError: .*; using commit bbbbbbbbbbbb of the cache"):
        assert hub.fetch(REPO).revision == "b" * 40
    with pytest.raises(OSError, match=rf"cannot be downloaded \(ConnectError.*run `hf download {REPO} --revision v2`"):
        hub.fetch(REPO, "v2")


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("sb3/dqn-Nothing", "", r"hub:sb3/dqn-Nothing: not on the Hub, or private; check the name, or set HF_TOKEN"),
        (REPO, "v9", rf"hub:{REPO}@v9: revision 'v9' not found; check it, or leave it out"),
    ],
)
def test_what_is_not_there_is_named(server: Hub, repo: str, revision: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        hub.fetch(repo, revision)
    assert len(server.requests) == 1


def test_a_repository_without_an_archive_of_its_name_says_which_were_tried(server: Hub) -> None:
    server.files = {"README.md": b"", "other.zip": b""}
    message = rf"expected {NAME}/policy.pth \+ {NAME}/data or {NAME}.zip, found other.zip; download"
    with pytest.raises(ValueError, match=message):
        hub.fetch(REPO)


def test_a_gated_repository_says_whom_to_ask(server: Hub) -> None:
    server.troubles = [("GET /api/models", 403, 9)]
    with pytest.raises(ValueError, match="access is restricted by its owner"):
        hub.fetch(REPO)


@pytest.mark.parametrize(("size", "found"), [(200 << 30, "214,748,364,800"), (None, "unknown")])
@pytest.mark.parametrize("file", [f"{NAME}/policy.pth", f"{NAME}/data", f"{NAME}.zip"])
def test_a_file_of_unknown_or_large_size_is_not_downloaded(
    server: Hub, file: str, size: int | None, found: str
) -> None:
    if file.endswith(".zip"):
        del server.files[f"{NAME}/policy.pth"]
    server.declared[file] = size
    with pytest.raises(ValueError, match=f"^hub:{REPO}: {file}: size {found}, expected at most 67,108,864 bytes"):
        hub.fetch(REPO)
    assert not any("resolve" in request for request in server.requests)


@pytest.mark.parametrize(
    "trouble",
    [
        ("GET /api/models", 429, 1),
        ("GET /api/models", 500, 3),
        ("HEAD .*policy.pth", 503, 1),
        ("HEAD .*policy.pth", 429, 1),
        ("GET /cdn/.*policy.pth", 429, 2),
        ("GET /cdn/.*policy.pth", "cut", 1),
    ],
    ids=str,
)
def test_a_trouble_that_passes_is_waited_out(server: Hub, trouble: tuple[str, str | int, int]) -> None:
    server.troubles = [trouble]
    snapshot = hub.fetch(REPO)
    assert server.troubles[0][2] == 0  # it did happen
    for file in ("policy.pth", "data"):
        assert (snapshot.archive / file).read_bytes() == server.files[f"{NAME}/{file}"]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (("GET /api/models", 429, 99), "the Hub answers HTTP 429"),
        (("GET /api/models", 500, 99), "the Hub answers HTTP 500"),
        (("HEAD .*policy.pth", 429, 99), "the Hub answers HTTP 429"),
        (("GET .*policy.pth", 500, 99), "the Hub answers HTTP 500"),
        (("GET .*policy.pth", 403, 99), "the Hub answers HTTP 403"),
    ],
    ids=str,
)
def test_a_trouble_that_stays_ends_in_one_line(server: Hub, trouble: tuple[str, str | int, int], reason: str) -> None:
    server.troubles = [trouble]
    with pytest.raises(OSError, match=rf"^hub:{REPO}: {NAME}/policy.pth is not in the cache and .*{reason}") as caught:
        hub.fetch(REPO)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    server.troubles = []
    assert (hub.fetch(REPO).archive / "data").is_file()  # nothing half-written is in the way


def test_a_file_that_is_always_cut_leaves_the_cache_valid(server: Hub, tmp_path: Path) -> None:
    server.files[f"{NAME}/data"] = b"{}"
    server.troubles = [("GET .*/data", "cut", 99)]
    with pytest.raises(OSError, match="cannot be downloaded"):
        hub.fetch(REPO)
    assert not list(tmp_path.rglob("*.incomplete"))
    server.troubles = []
    assert (hub.fetch(REPO).archive / "data").read_bytes() == b"{}"


@pytest.mark.parametrize("file", ["policy.pth", "data"])
def test_wrong_content_of_the_right_size_is_noticed_and_removed(server: Hub, file: str) -> None:
    server.troubles = [(f"GET (/cdn)?.*/{file}$", "wrong", 1)]
    with pytest.raises(OSError, match=f"hub:{REPO}: {file} arrived damaged and was removed from the cache"):
        hub.fetch(REPO)
    assert (hub.fetch(REPO).archive / file).read_bytes() == server.files[f"{NAME}/{file}"]


def test_the_token_stays_with_the_hub(server: Hub) -> None:
    hub.fetch(REPO)
    assert server.tokens == {"127.0.0.1": {f"Bearer {TOKEN}"}, "localhost": {None}}


def run(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_teacher_comes_through_the_environments_endpoint(server: Hub, archive: Path, tmp_path: Path) -> None:
    code = (
        "from policykd.agents.teacher import load_teacher; import torch; t = load_teacher('hub:dqn', game='Pong');"
        "print(t.ref, t.revision, t.sha256, t.algorithm, t.temperature, t.reported_return);"
        "print(t(torch.full((1, 4, 84, 84), 128, dtype=torch.uint8)).tolist())"
    )
    result = run(code, tmp_path, HF_ENDPOINT=server.endpoint)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bars where nobody looks, no token
    identity, outputs = result.stdout.splitlines()
    local = load_teacher(archive, game="Pong")
    sums = "".join(f"{hashlib.sha256(server.files[f'{NAME}/{f}']).hexdigest()}  {f}\n" for f in ("policy.pth", "data"))
    sha256 = hashlib.sha256(sums.encode()).hexdigest()
    assert identity == f"hub:{REPO} {server.commit} {sha256} DQN 0.01 20.7"
    expected = local(torch.full((1, 4, 84, 84), 128, dtype=torch.uint8))
    torch.testing.assert_close(torch.tensor(json.loads(outputs)), expected)


def test_a_hand_made_cache_is_enough_without_a_network(repository: dict[str, bytes], tmp_path: Path) -> None:
    commit = "0123456789" * 4
    model = tmp_path / "hub" / f"models--sb3--{NAME}"
    for file in (f"{NAME}/policy.pth", f"{NAME}/data", "config.yml"):
        path = model / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(repository[file])
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    code = (
        "from policykd.agents.teacher import load_teacher\n"
        "t = load_teacher('hub:dqn', game='Pong'); print(t.revision, t.reported_return)\n"
        "t = load_teacher(f'{t.ref}@{t.revision}', game='Pong'); print(t.revision)\n"
        "try: load_teacher('hub:ppo@v1', game='Breakout')\n"
        "except OSError as error: print(error)\n"
    )
    result = run(code, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{commit} 20.6", commit]  # the zoo's benchmark, no results.json
    assert lines[2] == (
        "hub:sb3/ppo-BreakoutNoFrameskip-v4@v1: ppo-BreakoutNoFrameskip-v4/policy.pth is not in the cache and cannot be"
        " downloaded (HF_HUB_OFFLINE is set); try again later, or run `hf download sb3/ppo-BreakoutNoFrameskip-v4"
        " --revision v1` on a machine with a network and copy the cache"
    )
