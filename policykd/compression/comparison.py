"""Comparison of compression methods from one teacher, one set of states and one budget: one folder per row, one table.

Each row is a folder with a student, its ONNX file and `row.json`. Whatever a row has finished is not repeated. The
table, the picture and `compression.json` are made from every row in the comparison's folder.
"""

import hashlib
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from policykd.agents.card import Provenance
from policykd.agents.networks import num_macs
from policykd.agents.onnx_policy import OnnxPolicy, open_session
from policykd.agents.student import Student, load_student, save_student
from policykd.compression.fine_tuning import FineTuning
from policykd.compression.quantization import export_student, stored_size
from policykd.compression.recipes import Recipe, apply_last_step, parse_recipe, start_student
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
from policykd.io.files import read_verified
from policykd.io.machine import versions
from policykd.io.typed import read_json, write_json
from policykd.runs.folder import lock

COMPARISON_FILE = "compression.json"
ROW_FILE = "row.json"
RANDOM = "random"
"""name of the row of random play"""


@dataclass(frozen=True)
class Settings:
    """Settings that all rows of a comparison share; a row of other settings is refused."""

    game: str
    teacher_sha256: str
    states: str
    """path of the run or dataset whose states are used"""
    updates: int
    batch_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(PolicyResult):
    """Costs, fidelity and episodes of one network.

    Zeros are not counted as parameters, but in the multiply-accumulates, as a runtime computes them. The bytes are
    those of the file that is shipped, the latency is ONNX Runtime's on one thread.
    """

    recipe: str
    family: str
    settings: Settings
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

    settings: Settings
    rows: dict[str, Row]
    """by recipe, and random play as `RANDOM`"""
    command: str
    versions: dict[str, str]


@dataclass(frozen=True)
class ComparisonOptions:
    """Settings of `compare`."""

    game: str
    states: Path
    """run or dataset whose states are in `FineTuning.replay`; recorded with every row"""
    episodes: int = 100
    """full episodes per row and protocol; 0 plays none"""


def compare(
    folder: Path, recipes: Sequence[str], student: Student, tuning: FineTuning, options: ComparisonOptions
) -> Comparison:
    """Makes the rows that are missing in a folder and returns all finished rows of that folder, timed side by side.

    Args:
        folder: one subfolder per row is made in it; several processes may work on different rows.
        recipes: rows to make; those that they start from are made too.
        student: the run's student.
        tuning: teacher, states and budget.
        options: game, states and number of episodes.

    Raises:
        ValueError: an invalid recipe, or a row that was made with other settings.
        BadFile: a file of a row is damaged.
    """
    settings = Settings(
        options.game,
        tuning.teacher.sha256,
        str(options.states.resolve()),
        tuning.updates,
        tuning.batch_size,
        tuning.seed,
    )
    for recipe in _with_parents(recipes):
        with lock(folder / row_name(recipe)):
            _make_row(folder, recipe, student, tuning, settings, options.episodes)
    rows = {}
    for path in sorted(folder.glob(f"*/{ROW_FILE}")):
        row = _read_row(path, settings)
        if len(row.protocols) == len(PROTOCOLS) or not options.episodes:
            rows[row.recipe] = row
    rows = _with_latencies(folder, rows)
    if options.episodes:
        rows[RANDOM] = _random_play(folder, tuning.teacher.num_actions, settings, options.episodes)
    comparison = Comparison(settings, rows, shlex.join(sys.argv), versions())
    write_json(folder / COMPARISON_FILE, comparison)
    return comparison


def row_name(recipe: Recipe) -> str:
    """Returns the name of a row's folder."""
    return str(recipe).replace("%", "pct").replace(":", "-")


def read_comparison(folder: Path) -> Comparison:
    """Returns what `compare` wrote into a folder.

    Raises:
        BadFile: missing or damaged.
    """
    return read_json(Comparison, folder / COMPARISON_FILE, next_step="run policykd compress --compare again")


def _with_parents(recipes: Sequence[str]) -> list[Recipe]:
    """Returns recipes, the teacher first, each after the one that it starts from, without repetitions."""
    ordered: dict[str, Recipe] = {}
    for text in ("teacher", *recipes):
        chain = [parse_recipe(text)]
        while (parent := chain[0].parent) is not None:
            chain.insert(0, parent)
        ordered |= {str(recipe): recipe for recipe in chain if str(recipe) not in ordered}
    return list(ordered.values())


def _read_row(path: Path, settings: Settings) -> Row:
    row = read_json(Row, path, next_step=f"remove {path.parent}, the row is made again")
    if row.settings != settings:
        raise ValueError(f"{path.parent}: made with {row.settings}; remove it, or use another --name")
    return row


def _make_row(
    folder: Path, recipe: Recipe, student: Student, tuning: FineTuning, settings: Settings, episodes: int
) -> None:
    """Trains, stores, measures and plays one row, each unless `row.json` holds it already."""
    row_folder = folder / row_name(recipe)
    path = row_folder / ROW_FILE
    if path.is_file():
        row = _read_row(path, settings)
    else:
        row = _train_row(folder, recipe, student, tuning, settings)
        write_json(path, row)
    policy = OnnxPolicy(row_folder / row.file)
    finished = FinishedGames(row_folder / "games.json")
    on_card = protocols_of_card(tuning.teacher) if str(recipe) == "teacher" else {}
    for protocol in PROTOCOLS:
        known = row.protocols.get(protocol)
        if known and (known.num_episodes >= episodes or protocol in on_card):
            continue
        if protocol in on_card:
            played = on_card[protocol]
        elif episodes:
            games = finished.play(policy, row.sha256, settings.game, protocol, episodes, seed=settings.seed)
            played = summarise_episodes(games)
        else:
            continue
        row = replace(row, protocols={**row.protocols, protocol: played})
        write_json(path, row)
        print(f"{recipe}: {protocol} {with_interval(played.mean, played.interval, '.2f')}", flush=True)


def _train_row(folder: Path, recipe: Recipe, student: Student, tuning: FineTuning, settings: Settings) -> Row:
    """Trains a row's network from its parent's, exports it and measures its costs and fidelity."""
    row_folder = folder / row_name(recipe)
    began = time.perf_counter()
    if recipe.parent is None:
        made = start_student(recipe, student, tuning)
    else:
        parent = load_student(folder / row_name(recipe.parent))
        made = apply_last_step(recipe, parent, tuning)
    seconds = time.perf_counter() - began
    teacher = tuning.teacher.record
    save_student(
        made, row_folder, Provenance(game=settings.game, teacher=teacher, made_by=str(recipe), fit_seconds=seconds)
    )
    path = export_student(made, row_folder, recipe.precision, tuning)
    kl, agreement = tuning.measure(OnnxPolicy(path))
    print(f"{recipe}: made in {seconds:.0f} s, KL {kl:.4f} nats, agreement {agreement:.1%}", flush=True)
    return Row(
        recipe=str(recipe),
        family=recipe.family,
        settings=settings,
        num_parameters=sum(int(p.count_nonzero()) for p in made.parameters()),
        num_macs=num_macs(made, made.shape.obs_shape),
        num_bytes=stored_size(made, row_folder, recipe.precision, is_sparse="magnitude" in str(recipe)),
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        updates=recipe.num_trainings * tuning.updates,
        protocols={},
        kl=kl,
        agreement=agreement,
    )


def _with_latencies(folder: Path, rows: dict[str, Row]) -> dict[str, Row]:
    """Returns rows with their batch-1 latencies, measured in turns, so that ratios are of the same minutes."""
    obs = np.random.default_rng(0).integers(0, 256, (1, 4, 84, 84), np.uint8)
    calls = {}
    for name, row in rows.items():
        path = folder / row_name(parse_recipe(name)) / row.file
        session = open_session(read_verified(path, row.sha256, f"; remove {path.parent}, the row is made again"), 1)
        calls[name] = lambda session=session: session.run(None, {"obs": obs})
    measured = measure_latencies(calls)
    return {
        name: replace(
            row,
            latency_microseconds=measured[name].median_us,
            latency_min_microseconds=measured[name].min_us,
        )
        for name, row in rows.items()
    }


def _random_play(folder: Path, num_actions: int, settings: Settings, episodes: int) -> Row:
    games = FinishedGames(folder / "random.json")
    protocols: dict[ProtocolName, ProtocolResult] = {}
    for protocol in PROTOCOLS:
        played = games.play(RandomPolicy(num_actions), RANDOM, settings.game, protocol, episodes, seed=settings.seed)
        protocols[protocol] = summarise_episodes(played)
    return Row(recipe=RANDOM, family=RANDOM, settings=settings, protocols=protocols)


@cache
def difference(ours: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[float, float, float]:
    """Returns the difference of two means of returns and its 95 % bootstrap interval."""
    return difference_interval(ours, theirs)


@cache
def normalised_interval(
    row: tuple[float, ...], teacher: tuple[float, ...], random: tuple[float, ...]
) -> tuple[float, float] | None:
    """Returns the 95 % percentile bootstrap interval of a teacher-normalised score.

    None if the teacher may be no better than random play.
    """
    generator = np.random.default_rng(0)
    means = [generator.choice(np.array(x), (RESAMPLES, len(x))).mean(axis=1) for x in (row, teacher, random)]
    if (means[1] <= means[2]).any():
        return None
    low, high = np.quantile((means[0] - means[2]) / (means[1] - means[2]), [0.025, 0.975])
    return float(low), float(high)


def comparison_table(comparison: Comparison) -> str:
    """Returns a comparison as a Markdown table: costs, fidelity and returns of every row."""
    heads = ["row", "family", "parameters", "MACs", "bytes", "batch 1, median (min)", "updates"]
    heads += ["KL, nats", "agreement", "games"]
    for protocol in PROTOCOLS:
        heads += [protocol.replace("_", " "), "minus teacher", "teacher-normalised", "ratio of means"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in comparison.rows.values():
        cells = [row.recipe, row.family, *_cost_cells(row)]
        for protocol in PROTOCOLS:
            cells += _return_cells(row, comparison, protocol)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cost_cells(row: Row) -> list[str]:
    games = " / ".join(str(played.num_episodes) for played in row.protocols.values())
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
    """Returns a row's mean return, its difference to the teacher, its normalised score and its ratio of means."""
    played = [comparison.rows[name].protocols.get(protocol) for name in (row.recipe, "teacher", RANDOM)]
    ours, teacher, random = played
    if not ours or not teacher or not random:
        return [""] * 4
    score = teacher_normalised_score(ours.mean, teacher.mean, random.mean)
    interval = normalised_interval(ours.returns, teacher.returns, random.returns)
    mean, low, high = difference(ours.returns, teacher.returns)
    return [
        with_interval(ours.mean, ours.interval, ".2f"),
        "" if row.recipe == "teacher" else with_interval(mean, (low, high), "+.2f"),
        "-" if score is None or interval is None else with_interval(score, interval, ".1%"),
        f"{ours.mean / teacher.mean:.1%}" if teacher.mean > 0.0 else "-",
    ]


def with_interval(mean: float, interval: tuple[float, float], form: str) -> str:
    """Returns a mean with its interval in brackets."""
    low, high = interval
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
