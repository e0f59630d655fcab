"""What the finished rows of a comparison's folder say together: compression.json, compression.md and pareto.svg."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from policykd.cli.command import versions
from policykd.compression.collection import Collection
from policykd.compression.comparison import Setting, kept_results
from policykd.compression.pareto import draw_pareto
from policykd.compression.row_latencies import LATENCIES
from policykd.compression.rows import TEACHER, Row, lineage, origin, updates_in_all
from policykd.compression.table import at_equal_bytes, compared, report
from policykd.evaluation.evaluate import PROTOCOLS, RandomPolicy
from policykd.evaluation.results import FinishedGames, judgement
from policykd.io.files import BadFile, write_atomically


def finished_rows(setting: Setting, rows: Mapping[str, Row], asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the results of every row that the folder holds, asked for now or not, with what it descends from.

    Args:
        setting: the comparison's.
        rows: all that there may be, by name.
        asked: those that must not have been made in another way; such others are left out, with a warning.

    Raises:
        ValueError: a row that was asked for was made in another way.
        BadFile: damaged results.
    """
    finished: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        try:
            results = kept_results(row, setting.folder)
        except ValueError as error:
            if name in asked or isinstance(error, BadFile):
                raise
            print(f"warning: not in the table: {error}", file=sys.stderr, flush=True)
            continue
        if results:
            descent = {"begins_with": lineage(row, rows), "origin": origin(row, rows)}
            finished[name] = {**results, **descent, "updates_in_all": updates_in_all(row, rows, setting.updates)}
    return finished


def write_findings(
    setting: Setting,
    finished: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    num_actions: int,
    missing: Sequence[str],
    collect: Collection | None,
) -> None:
    """Writes compression.json, compression.md and pareto.svg, and prints the table.

    Args:
        setting: the comparison's.
        finished: rows by name; their latencies are known.
        settings: what the folder was started with.
        num_actions: of the game, for random play.
        missing: names of rows that were asked for and are not finished.
        collect: how the states were visited, if they were not given.
    """
    run = setting.folder
    kept = json.loads((run / LATENCIES).read_text())
    rows: dict[str, Mapping[str, Any]] = {
        name: {**row, **{k: v for k, v in kept["rows"][name].items() if k != "sha256"}}
        for name, row in finished.items()
    }
    played = _random_play(setting, finished, num_actions)
    rows["random"] = {"name": "random", "label": "random play", "family": "random", "protocols": played}
    against = compared(rows)
    content = {
        **{k: settings[k] for k in ("game", "teacher", "states", "updates", "batch_size", "seed")},
        "episodes": setting.episodes,
        "collect": asdict(collect) if collect else None,
        "missing": list(missing),
        "rows": {name: {**row, "comparison": against[name]} for name, row in rows.items()},
        "equal_bytes": at_equal_bytes(rows),
        "latency": {k: v for k, v in kept.items() if k != "rows"},
        "command": shlex.join(sys.argv),
        "versions": versions(),
    }
    text = report(rows, missing)
    write_atomically(run / "compression.md", text.encode())
    draw_pareto(rows, run / "pareto.svg")
    write_atomically(run / "compression.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"\n{text}\n{run}/ holds compression.json, compression.md, pareto.svg")


def _random_play(setting: Setting, finished: Mapping[str, Mapping[str, Any]], num_actions: int) -> dict[str, Any]:
    """Returns as many games of random play as the rows have, so that a later command for fewer plays none anew."""
    counted = [
        row["protocols"][p]["num_episodes"] for name, row in finished.items() if name != TEACHER for p in PROTOCOLS
    ]
    num, games = max([setting.episodes, *counted]), FinishedGames(setting.folder / "random.json")
    random = RandomPolicy(num_actions)
    return {p: judgement(games.play(random, "random", setting.game, p, num, seed=setting.seed)) for p in PROTOCOLS}
