"""One row of a comparison, made and judged: fitted, stored, measured, played; what is finished is never done again."""

import hashlib
import json
import shlex
import sys
import time
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policykd.agents.card import Provenance
from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.policy import Policy
from policykd.agents.student import Student, load_student, read_student_card, save_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.compression.compressors import Fit, teacher_as_student
from policykd.compression.rows import TEACHER, Row, Store
from policykd.compression.sparse import load_sparse, pack_sparse
from policykd.envs.atari import make_atari
from policykd.evaluation.evaluate import PROTOCOLS
from policykd.evaluation.results import FinishedGames, judgement, judgement_of_card
from policykd.export.compiled import compile_net, compile_policy
from policykd.export.layers import Layer, layers_of
from policykd.export.onnx import to_onnx
from policykd.io.files import BadFile, write_atomically
from policykd.legacy.replay import Replay
from policykd.legacy.states import DatasetStates
from policykd.storage.dataset import label, load_dataset
from policykd.storage.manifest import open_dataset

CALIBRATION = 2000
"""states that int8's ranges are taken from"""
DONE, ONNX, INT8, SPARSE = "row.json", "policy.onnx", "policy.int8.onnx", "policy.sparse.npz"


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison have in common."""

    folder: Path
    """of the comparison"""
    game: str
    teacher: str
    """a reference"""
    states: DatasetStates
    updates: int
    batch_size: int
    episodes: int
    seed: int

    def load(self) -> Fit:
        """Returns teacher, labelled states and budget.

        Raises:
            ValueError, BadFile: no such teacher or dataset, or one of another game.
        """
        teacher = load_teacher(self.teacher, game=self.game)
        envs = make_atari(self.game, 1, self.seed)
        how: dict[str, Any] = {"num_actions": teacher.num_actions, "obs_shape": teacher.obs_shape, "game": self.game}
        how["num_held_out"] = max(1, round(self.states.held_out * open_dataset(self.states.path).num_rows))
        replay = load_dataset(self.states.path, **how, teacher_sha256=teacher.sha256)
        label(replay, compile_policy(teacher, envs.reset()))
        return Fit(teacher, envs, replay, self.updates, self.batch_size, self.seed)


def make_row(row: Row, setting: Setting) -> dict[str, Any]:
    """Returns a row's results, made anew unless they are there: `row.json` in its folder.

    Raises:
        ValueError: the folder holds a row of this name that was made in another way.
        FloatingPointError: numbers that are not finite.
        KeyboardInterrupt: a signal has come.
    """
    folder = setting.folder / row.name
    if done := results_of(row, setting):
        return done
    fit = setting.load()
    with closing(fit.envs):
        student, seconds = _student(row, setting, fit)
        policy, costs = stored(row.store, student, folder, fit.replay)
        kl, agreement = fit.measure(policy)
        own = {"agreement_with_float": fit.agreement(policy, student)} if "int8" in row.store else {}
    results = {
        "name": row.name,
        "label": row.label,
        "family": row.family,
        "made_by": row.made_by,
        "shape": {"widths": student.shape.widths, "hidden": student.shape.hidden, "rank": student.shape.rank},
        **costs,
        "kl": kl,
        "agreement": agreement,
        **own,
        "fit_seconds": seconds,
        "protocols": _played(row, policy, costs["sha256"], fit.teacher, setting),
        "from_card": _on_card(row, fit.teacher),
        "command": shlex.join(sys.argv),
    }
    write_atomically(folder / DONE, (json.dumps(results, indent=1) + "\n").encode())
    return results


def results_of(row: Row, setting: Setting) -> dict[str, Any] | None:
    """Returns what a finished row wrote, or None where it is not finished or has fewer games than are asked for.

    Games of the teacher's card are as many as there are.

    Raises:
        ValueError: it was made in another way.
        BadFile: damaged.
    """
    if (results := kept_results(row, setting.folder)) is None:
        return None
    played = [p["num_episodes"] for name, p in results["protocols"].items() if name not in results["from_card"]]
    return results if min(played, default=setting.episodes) >= setting.episodes else None


def kept_results(row: Row, comparison: Path) -> dict[str, Any] | None:
    """Returns what a row wrote into a comparison's folder, with however many games, or None.

    Raises:
        ValueError: it was made in another way.
        BadFile: damaged.
    """
    path = comparison / row.name / DONE
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        made_by, games = results["made_by"], [results["protocols"][p]["num_episodes"] + 0 for p in PROTOCOLS]
        if min(games) < 1:
            raise ValueError("no games")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFile(f"{path}: damaged ({error!r}); remove it, the row is measured anew") from error
    _check_same(made_by, row, path.parent)
    if "from_card" not in results:  # of older versions, whose teacher kept no games where all were its card's
        is_of_card = row.name == TEACHER and not (path.parent / "games.json").is_file()
        results["from_card"] = list(PROTOCOLS) if is_of_card else []
    return results


def _check_same(made_by: object, row: Row, folder: Path) -> None:
    if made_by != row.made_by:
        raise ValueError(f"{folder}: made by {made_by}, not by {row.made_by}; remove it, or give another --name")


def _student(row: Row, setting: Setting, fit: Fit) -> tuple[Student, float]:
    """Returns the row's network and the seconds that it took, from its folder if it was fitted before."""
    folder = setting.folder / row.name
    if (folder / "student.json").is_file():
        card = read_student_card(folder / "student.json", next_step=f"remove {folder} to make the row again")
        _check_same(card.made_by, row, folder)
        return load_student(folder), card.fit_seconds or 0.0
    begin = teacher_as_student(fit.teacher) if row.name == TEACHER else load_student(setting.folder / row.begins_with)
    print(f"{row.name}: begins", flush=True)
    began = time.perf_counter()
    student = row.make(begin, fit)
    seconds = time.perf_counter() - began
    print(f"{row.name}: made in {seconds:.0f} s", flush=True)
    record = fit.teacher.record
    provenance = Provenance(game=setting.game, teacher=record, made_by=row.made_by, fit_seconds=seconds)
    save_student(student, folder, provenance)
    return student, seconds


def stored(store: Store, student: Student, folder: Path, replay: Replay) -> tuple[Policy, dict[str, Any]]:
    """Writes a student's file in one of the ways; returns the policy that is read back from it, and what it costs.

    Args:
        store: the way.
        student: as `save_student` wrote it into the folder.
        folder: the row's.
        replay: of the states that int8 is calibrated on.
    """
    onnx = to_onnx(student.folded_net())
    num_bytes = (folder / "student.safetensors").stat().st_size
    if "int8" in store:
        return _as_int8(store, student, folder, onnx, replay)
    if store == "sparse":
        content = pack_sparse(student)
        write_atomically(folder / SPARSE, content)
        num_bytes, student = len(content), load_sparse(folder / SPARSE)
    write_atomically(folder / ONNX, onnx)
    policy = compile_net(student.folded_net(), calibration_states(replay, 64))
    return policy, _costs(student, num_bytes) | {"file": ONNX, "sha256": hashlib.sha256(onnx).hexdigest()}


def _as_int8(
    store: Store, student: Student, folder: Path, onnx: bytes, replay: Replay
) -> tuple[Policy, dict[str, Any]]:
    from policykd.export.int8 import quantise, quantise_weights

    rounded = quantise_weights if store == "int8-weights" else quantise
    content = rounded(onnx, calibration_states(replay, CALIBRATION).numpy())
    write_atomically(folder / INT8, content)
    num_bytes = len(content)
    if store == "sparse-int8":
        packed = zlib.compress(content, 9)
        write_atomically(folder / f"{INT8}.zlib", packed)
        num_bytes = len(packed)
        write_atomically(folder / INT8, zlib.decompress((folder / f"{INT8}.zlib").read_bytes()))
    costs = _costs(student, num_bytes) | {"file": INT8, "sha256": hashlib.sha256(content).hexdigest()}
    return OnnxPolicy(folder / INT8), costs


def calibration_states(replay: Replay, num: int) -> Tensor:
    """Returns states of a replay, none of those held out, always the same ones."""
    rows = replay.batches(1, num, len(replay) - replay.num_held_out, torch.Generator().manual_seed(0))
    return replay.gather(next(rows))


def _costs(student: Student, num_bytes: int) -> dict[str, Any]:
    """Returns parameters that are not zero, multiply-accumulates with and without those by zeros, bytes."""
    zeros = sum(int((p == 0.0).sum()) for p in student.parameters() if p.dim() > 1)
    net = student.folded_net()
    return {
        "num_parameters": num_parameters(student) - zeros,
        "num_macs": macs_without_zeros(layers_of(net), student.shape.obs_shape),
        "num_macs_dense": num_macs(student, student.shape.obs_shape),
        "num_bytes": num_bytes,
    }


def macs_without_zeros(layers: list[Layer], obs_shape: tuple[int, ...]) -> int:
    """Returns the multiply-accumulates of one observation by weights that are not zero."""
    sides, total = {"obs": obs_shape[-1]}, 0
    for layer in layers:
        side = sides[layer.takes[0]]
        kernel = layer.weight.shape[-1] if layer.operator == "conv" and layer.weight is not None else layer.kernel
        if layer.operator in ("conv", "average_pool", "max_pool"):
            side = (side + 2 * layer.padding - kernel) // layer.stride + 1
        sides[layer.gives] = side
        if layer.weight is not None:
            total += int(layer.weight.count_nonzero()) * (side * side if layer.operator == "conv" else 1)
    return total


def _played(row: Row, policy: Policy, sha256: str, teacher: Teacher, setting: Setting) -> dict[str, Any]:
    """Returns every game of the row under each protocol; the teacher's from its card, where that has them."""
    finished = FinishedGames(setting.folder / row.name / "games.json")
    played: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        if protocol in _on_card(row, teacher):
            played[protocol] = judgement_of_card(teacher.card["protocols"][protocol])
            continue
        games = finished.play(policy, sha256, setting.game, protocol, setting.episodes, seed=setting.seed)
        played[protocol] = judgement(games)
        low, high = played[protocol]["interval"]
        print(f"{row.name}: {protocol} {played[protocol]['mean']:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    return played


def _on_card(row: Row, teacher: Teacher) -> list[str]:
    """Returns the protocols whose games stand on the teacher's card, if the row is the teacher's."""
    return [p for p in PROTOCOLS if row.name == TEACHER and p in teacher.card.get("protocols", {})]
