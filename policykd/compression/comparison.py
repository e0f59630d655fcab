"""Comparison of compression methods with one teacher, one set of states and one budget: one folder per row, one table.

A row's folder holds a student, its ONNX file and `row.json`; whatever a row has finished is not repeated. The table,
the picture and `compression.json` are made of all rows in the comparison's folder.
"""

import hashlib
import io
import shlex
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from policykd.agents.card import Provenance
from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.onnx_session import open_session
from policykd.agents.student import Student, load_student, packed_weights, save_student
from policykd.compression.fine_tuning import ComparisonSettings, FineTuning
from policykd.compression.recipes import (
    Quantization,
    apply_recipe,
    check_recipe,
    family,
    num_trainings,
    parent,
    quantization,
)
from policykd.evaluation.costs import measure_latencies
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName, RandomPolicy
from policykd.evaluation.results import (
    FinishedGames,
    PolicyResult,
    ProtocolResult,
    protocols_of_card,
    summarise_episodes,
)
from policykd.evaluation.statistics import RESAMPLES, difference_interval, teacher_normalised_score
from policykd.export.int8 import quantize_static, quantize_weights
from policykd.export.onnx import to_onnx
from policykd.io.files import lock_folder, read_verified, write_atomically
from policykd.io.machine import versions
from policykd.io.typed import read_json, write_json

COMPARISON_FILE = "compression.json"
ROW_FILE = "row.json"
CALIBRATION_STATES = 2000
"""training states that the ranges of int8 activations are taken from"""
RANDOM = "random"
"""name of the row of random play"""


@dataclass(frozen=True, kw_only=True)
class Row(PolicyResult):
    """Costs, fidelity and episodes of one network.

    Zeros do not count as parameters, but as multiply-accumulates, since a runtime computes them. The bytes are those of
    the file that is shipped, the latency is ONNX Runtime's on one thread.
    """

    recipe: str
    family: str
    settings: ComparisonSettings
    file: str = ""
    """the ONNX file that was measured, played and timed"""
    sha256: str = ""
    updates: int = 0
    """gradient steps behind the network, those of the networks that it starts from included"""
    kl: float = 0.0
    """KL(teacher || policy) on held-out states, nats"""
    agreement: float = 0.0
    """fraction of held-out states with the teacher's greedy action"""


@dataclass(frozen=True)
class Comparison:
    """The content of `compression.json`."""

    settings: ComparisonSettings
    rows: dict[str, Row]
    """recipe -> row; random play is `RANDOM`"""
    command: str
    versions: dict[str, str]


def compare(folder: Path, recipes: Sequence[str], student: Student, tuning: FineTuning, episodes: int) -> Comparison:
    """Makes the rows that are missing in a folder and returns all finished rows of that folder, timed side by side.

    Args:
        folder: gets one subfolder per row; several processes may work on different rows.
        recipes: rows to make; those that they start from are made too.
        student: the run's student.
        tuning: teacher, states and budget.
        episodes: full episodes per row and protocol; 0 plays none.

    Raises:
        ValueError: an invalid recipe, or a row that was made with other settings.
        BadFile: a file of a row is damaged.
    """
    # Check all recipes first: an error must not come after hours of training.
    for recipe in recipes:
        check_recipe(recipe)
    for recipe in _with_parents(recipes):
        # A lock per row, so that several processes can share the work on one comparison.
        with lock_folder(_row_folder(folder, recipe)):
            _make_row(folder, recipe, student, tuning, episodes)

    # All rows of the folder, those of earlier commands too, from large to small.
    rows = [_read_row(path, tuning.settings) for path in sorted(folder.glob(f"*/{ROW_FILE}"))]
    # Rows whose games another process is still playing are left out.
    finished = [row for row in rows if len(row.protocols) == len(PROTOCOLS) or not episodes]
    finished = _with_latencies(folder, sorted(finished, key=lambda row: -row.num_bytes))
    if episodes:
        finished.append(_random_play(folder, tuning, episodes))
    by_recipe = {row.recipe: row for row in finished}
    comparison = Comparison(tuning.settings, by_recipe, shlex.join(sys.argv), versions())
    write_json(folder / COMPARISON_FILE, comparison)
    return comparison


def read_comparison(folder: Path) -> Comparison:
    """Returns what `compare` wrote into a folder.

    Raises:
        BadFile: missing or damaged.
    """
    return read_json(Comparison, folder / COMPARISON_FILE, next_step="run policykd compress --compare again")


def _row_folder(folder: Path, recipe: str) -> Path:
    return folder / recipe.replace("%", "pct").replace(":", "-")


def _with_parents(recipes: Sequence[str]) -> list[str]:
    """Returns recipes, the teacher first, each after the one that it starts from, without repetitions."""
    each = (accumulate(recipe.split("+"), "{}+{}".format) for recipe in ("teacher", *recipes))
    return list(dict.fromkeys(chain.from_iterable(each)))


def _read_row(path: Path, settings: ComparisonSettings) -> Row:
    row = read_json(Row, path, next_step=f"remove {path.parent}, the row is made again")
    # Rows of different budgets, teachers or states must not appear in one table.
    if row.settings != settings:
        raise ValueError(f"{path.parent}: made with {row.settings}; remove it, or use another --name")
    return row


def _make_row(folder: Path, recipe: str, student: Student, tuning: FineTuning, episodes: int) -> None:
    """Trains, stores, measures and plays one row, each step unless `row.json` has it already."""
    row_folder = _row_folder(folder, recipe)
    path = row_folder / ROW_FILE
    # `row.json` is written last, so that a row whose training was interrupted is trained again.
    if path.is_file():
        row = _read_row(path, tuning.settings)
    else:
        row = _train_row(folder, recipe, student, tuning)
        write_json(path, row)

    policy = OnnxPolicy(row_folder / row.file)
    games = FinishedGames(row_folder / "games.json")
    # The teacher's episodes are those of its card, if it has any.
    on_card = protocols_of_card(tuning.teacher) if recipe == "teacher" else {}
    for protocol in PROTOCOLS:
        known = row.protocols.get(protocol)
        if not episodes or (known and (known.num_episodes >= episodes or protocol in on_card)):
            continue
        result = on_card.get(protocol)
        if result is None:
            game, seed = tuning.settings.game, tuning.settings.seed
            result = summarise_episodes(games.play(policy, row.sha256, game, protocol, episodes, seed=seed))
        # Written after every protocol, so that an interrupted row continues with the next one.
        row = replace(row, protocols={**row.protocols, protocol: result})
        write_json(path, row)
        print(f"{recipe}: {protocol} {_with_interval(result.mean, result.interval, '.2f')}", flush=True)


def _train_row(folder: Path, recipe: str, student: Student, tuning: FineTuning) -> Row:
    """Makes a row's network from its parent's, exports it and measures its costs and fidelity."""
    row_folder = _row_folder(folder, recipe)
    began = time.perf_counter()
    # Read from the parent's folder: an interrupted command gives the same network as one that was not.
    previous = load_student(_row_folder(folder, parent(recipe))) if parent(recipe) else student
    made = apply_recipe(recipe, previous, tuning)
    seconds = time.perf_counter() - began

    settings = tuning.settings
    record = tuning.teacher.record
    save_student(made, row_folder, Provenance(game=settings.game, teacher=record, made_by=recipe, fit_seconds=seconds))
    exported = export_student(made, row_folder, quantization(recipe), tuning)
    # What is measured, like what is played, is the exported file and not the student in memory.
    kl, agreement = tuning.measure(OnnxPolicy(exported))
    print(f"{recipe}: made in {seconds:.0f} s, KL {kl:.4f} nats, agreement {agreement:.1%}", flush=True)
    is_quantized = quantization(recipe) is not None
    # Biases are not pruned: one that happens to be 0 counts.
    num_zeros = sum(int((weight == 0.0).sum()) for weight in made.parameters() if weight.dim() > 1)
    return Row(
        recipe=recipe,
        family=family(recipe),
        settings=settings,
        num_parameters=num_parameters(made) - num_zeros,
        num_macs=num_macs(made, made.shape.obs_shape),
        num_bytes=shipped_bytes(made, exported, is_quantized=is_quantized, is_sparse="magnitude" in recipe),
        file=exported.name,
        sha256=hashlib.sha256(exported.read_bytes()).hexdigest(),
        updates=num_trainings(recipe) * settings.updates,
        kl=kl,
        agreement=agreement,
        protocols={},
    )


def export_student(student: Student, folder: Path, quantization: Quantization | None, tuning: FineTuning) -> Path:
    """Writes a student as `policy.onnx` or, post-training quantized, as `policy.int8.onnx`, and returns the path.

    Raises:
        ValueError: the packages onnx and onnxruntime are not installed.
    """
    # The temperature is folded into the last layer, so that the file gives logits.
    path = folder / ("policy.int8.onnx" if quantization else "policy.onnx")
    content = to_onnx(student.folded_net())
    if quantization:
        to_int8 = quantize_weights if quantization == "int8" else quantize_static
        content = to_int8(content, tuning.calibration_states(CALIBRATION_STATES).numpy())
    write_atomically(path, content)
    return path


def shipped_bytes(student: Student, exported: Path, *, is_quantized: bool, is_sparse: bool) -> int:
    """Returns the size of the file that a student would be shipped as: safetensors, or ONNX if it is quantized.

    Sparse networks are compressed first, into a file next to the exported one, or their zeros would not count.
    """
    content = exported.read_bytes() if is_quantized else packed_weights(student)
    if is_sparse:
        content = zlib.compress(content, 9) if is_quantized else pack_sparse(student)
        write_atomically(exported.with_name(f"{exported.name}.zlib" if is_quantized else "sparse.npz"), content)
    return len(content)


def pack_sparse(student: Student) -> bytes:
    """Returns a sparse network as a compressed `.npz`: a bit per weight, then the weights that are not zero.

    `mask` holds the packed bits of all tensors in the order of their names, `values` the float32 numbers whose bits are
    set. The same weights give the same bytes.
    """
    # By name: a removed parametrization leaves its weight at another place of the state dict.
    flat = np.concatenate([tensor.detach().numpy().ravel() for _, tensor in sorted(student.state_dict().items())])
    mask = flat != 0.0
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=np.packbits(mask), values=flat[mask])
    return buffer.getvalue()


def _with_latencies(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Returns rows with their batch-1 latencies, measured in turns, so that ratios are of the same minutes."""
    # Latency does not depend on the pixels.
    obs = np.random.default_rng(0).integers(0, 256, (1, 4, 84, 84), np.uint8)
    calls = {}
    for row in rows:
        path = _row_folder(folder, row.recipe) / row.file
        # The file that was played, by its hash.
        session = open_session(read_verified(path, row.sha256, f"; remove {path.parent}, the row is made again"), 1)
        calls[row.recipe] = lambda session=session: session.run(None, {"obs": obs})
    latencies = measure_latencies(calls)
    return [
        replace(row, latency_microseconds=latency.median_us, latency_min_microseconds=latency.min_us)
        for row, latency in zip(rows, latencies.values(), strict=True)
    ]


def _random_play(folder: Path, tuning: FineTuning, episodes: int) -> Row:
    # As many games as the rows have: the normalised scores divide by its mean.
    games = FinishedGames(folder / "random.json")
    settings = tuning.settings
    policy = RandomPolicy(tuning.teacher.num_actions)
    protocols: dict[ProtocolName, ProtocolResult] = {
        protocol: summarise_episodes(games.play(policy, RANDOM, settings.game, protocol, episodes, seed=settings.seed))
        for protocol in PROTOCOLS
    }
    return Row(recipe=RANDOM, family=RANDOM, settings=settings, protocols=protocols)


def comparison_table(comparison: Comparison) -> str:
    """Returns a comparison as a Markdown table: costs, fidelity and returns of every row."""
    heads = ["row", "family", "parameters", "MACs", "bytes", "batch 1, median (min)", "updates", "KL, nats"]
    heads += ["agreement", "games"]
    for protocol in PROTOCOLS:
        heads += [protocol.replace("_", " "), "minus teacher", "teacher-normalised"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in comparison.rows.values():
        cells = [row.recipe, row.family, *_cost_cells(row)]
        for protocol in PROTOCOLS:
            cells += _return_cells(row, comparison, protocol)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cost_cells(row: Row) -> list[str]:
    games = " / ".join(sorted({str(result.num_episodes) for result in row.protocols.values()}))
    if row.recipe == RANDOM:
        return [*["-"] * 7, games]
    return [
        f"{row.num_parameters:,}",
        f"{(row.num_macs or 0) / 1e6:.2f} M",
        f"{row.num_bytes:,}",
        f"{row.latency_microseconds:.0f} us ({row.latency_min_microseconds:.0f})",
        f"{row.updates:,}",
        f"{row.kl:.4f}",
        f"{row.agreement:.1%}",
        games,
    ]


def _return_cells(row: Row, comparison: Comparison, protocol: ProtocolName) -> list[str]:
    """Returns a row's mean return, its difference to the teacher and its teacher-normalised score, with intervals."""
    rows = comparison.rows
    if RANDOM not in rows:
        return ["-"] * 3
    ours, teacher, random = (rows[name].protocols[protocol] for name in (row.recipe, "teacher", RANDOM))
    mean, low, high = difference_interval(ours.returns, teacher.returns)
    score = teacher_normalised_score(ours.mean, teacher.mean, random.mean)
    interval = normalised_interval(ours.returns, teacher.returns, random.returns)
    return [
        _with_interval(ours.mean, ours.interval, ".2f"),
        "" if row.recipe == "teacher" else _with_interval(mean, (low, high), "+.2f"),
        "-" if score is None or interval is None else _with_interval(score, interval, ".1%"),
    ]


def normalised_interval(*returns: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % bootstrap interval of a score, from the returns of row, teacher and random play.

    None if the teacher may be no better than random play.
    """
    # All three means are resampled independently, since all three were estimated.
    generator = np.random.default_rng(0)
    row, teacher, random = (generator.choice(np.array(x), (RESAMPLES, len(x))).mean(axis=1) for x in returns)
    # Where a resampled teacher is no better than random play, the ratio means nothing.
    if (teacher <= random).any():
        return None
    low, high = np.quantile((row - random) / (teacher - random), [0.025, 0.975])
    return float(low), float(high)


def _with_interval(mean: float, interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
