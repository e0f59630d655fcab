"""Table and picture of what students keep of their teachers' scores on many games; benchmarks/games.py runs them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policykd.evaluation.aggregate import (
    Estimate,
    GameReturns,
    aggregate_iqm,
    aggregate_mean,
    aggregate_median,
    aggregate_optimality_gap,
    bootstrap_scores,
    estimate,
    geometric_mean,
    performance_profile,
    probability_of_improvement,
)
from policykd.evaluation.evaluate import ProtocolName
from policykd.runs.folder import RunResult

TITLES: dict[ProtocolName, str] = {
    "noop_sampled": "no-op starts, sampled",
    "sticky_greedy": "sticky 0.25, greedy",
}
RUSU = {"25%": "108.3%", "7%": "101.7%", "4%": "83.9%"}
"""geometric mean over ten games of the student's return by the teacher's (Rusu et al., 2015)"""
STATISTICS = {
    "IQM": aggregate_iqm,
    "median": aggregate_median,
    "mean": aggregate_mean,
    "optimality gap": aggregate_optimality_gap,
}
THRESHOLDS = np.linspace(0.0, 1.5, 151)
Games = dict[str, GameReturns]


@dataclass(frozen=True)
class Row:
    """The runs of a teacher with one size of student."""

    label: str
    """game and teacher"""
    size: str
    results: list[RunResult | None]
    """per seed; None for a run that is not finished"""

    @property
    def finished(self) -> list[RunResult]:
        """Results of the finished runs."""
        return [result for result in self.results if result]

    def returns(self, protocol: ProtocolName) -> GameReturns:
        """Returns the episodes of the finished runs, and those of teacher and random play."""
        return GameReturns(
            [run.student.protocols[protocol].returns for run in self.finished],
            _once(run.teacher.protocols[protocol].returns for run in self.finished),
            _once(run.random.protocols[protocol].returns for run in self.finished),
        )


def _once(runs: Iterable[tuple[float, ...]]) -> list[float]:
    """Returns the pooled returns; what several runs share, such as the games on a teacher's card, counts once."""
    return [value for returns in dict.fromkeys(runs) for value in returns]


def complete_games(rows: Sequence[Row], size: str, protocol: ProtocolName) -> Games:
    """Returns the games that statistics over games are made of: every seed is finished, and scores are defined."""
    games = {row.label: row.returns(protocol) for row in rows if row.size == size and all(row.results)}
    return {game: returns for game, returns in games.items() if _attempt(_mean_score, {game: returns})}


def _mean_score(games: Games) -> Estimate:
    return estimate(aggregate_mean, bootstrap_scores(games))


def _geometric_mean_ratio(games: Games) -> Estimate:
    """Returns the geometric mean of the student's return by the teacher's, as Rusu et al. compute it."""
    ratios = bootstrap_scores({game: replace(returns, random=[0.0]) for game, returns in games.items()})
    return estimate(geometric_mean, ratios)


def _improvement(games: Games, others: Games) -> Estimate:
    """Returns the probability of improvement of the first over the second, on the games that both have."""
    shared = [game for game in games if game in others]
    return probability_of_improvement({game: games[game] for game in shared}, {game: others[game] for game in shared})


def _attempt(compute: Callable[..., Estimate], *games: Games) -> Estimate | None:
    """Returns an estimate, or None if it is not defined for these games."""
    try:
        return compute(*games)
    except ValueError:
        return None


def table(rows: Sequence[Row]) -> str:
    """Returns every game and size with a finished run, and then the statistics over games, as Markdown."""
    header = ["game (teacher)", "student", "runs", "games per run"]
    for title in TITLES.values():
        header += [title, "distinct returns"]
    lines = [_line(header), "|---|" + "---:|" * (len(header) - 1)]
    lines += [_line(_columns(row)) for row in rows if row.finished]
    for protocol, title in TITLES.items():
        lines += [f"\nAll games, {title}\n", *_statistics_over_games(rows, protocol)]
    return "\n".join(lines)


def _columns(row: Row) -> list[str]:
    num_episodes = min(run.num_episodes for run in row.finished)
    columns = [row.label, row.size, f"{len(row.finished)} of {len(row.results)}", str(num_episodes)]
    for protocol in TITLES:
        returns = row.returns(protocol)
        pooled = [value for run in returns.runs for value in run]
        columns.append(_percent(_attempt(_mean_score, {row.label: returns})))
        columns.append(f"{len(set(pooled))} of {len(pooled)}")
    return columns


def _statistics_over_games(rows: Sequence[Row], protocol: ProtocolName) -> list[str]:
    header = ["student", "games", *STATISTICS, "geometric mean of return by teacher's", "Rusu et al. (2015)"]
    header.append("better than the next smaller")
    lines: list[str] = []
    smaller: Games = {}
    for size in reversed(sizes_of(rows)):
        if games := complete_games(rows, size, protocol):
            scores = bootstrap_scores(games)
            columns = [size, f"{len(games)} of {len({row.label for row in rows})}"]
            columns += [_percent(estimate(statistic, scores)) for statistic in STATISTICS.values()]
            columns += [_percent(_attempt(_geometric_mean_ratio, games)), RUSU.get(size, "")]
            columns.append(_percent(_attempt(_improvement, games, smaller)))
            lines.insert(0, _line(columns))
        smaller = games
    return [_line(header), "|" + "---:|" * len(header), *lines]


def sizes_of(rows: Sequence[Row]) -> list[str]:
    """Returns the sizes of the rows, the largest first."""
    return sorted({row.size for row in rows}, key=lambda size: -float(size.removesuffix("%")))


def _line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _percent(found: Estimate | None) -> str:
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]" if found else "not defined"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the performance profile of every size under each protocol as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The hash salt and the missing date make the same results the same file.
    with mpl.rc_context({"svg.hashsalt": "policykd"}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for ax, (protocol, title) in zip(panels, TITLES.items(), strict=True):
            for number, size in enumerate(sizes_of(rows)):
                if games := complete_games(rows, size, protocol):
                    profile = estimate(lambda s: performance_profile(s, THRESHOLDS), bootstrap_scores(games))
                    ax.plot(THRESHOLDS, profile.value, color=f"C{number}", label=f"{size}, {len(games)} games")
                    ax.fill_between(THRESHOLDS, profile.low, profile.high, color=f"C{number}", alpha=0.15, lw=0)
            ax.axvline(1.0, color="black", ls="--", lw=1)
            ax.set_title(title)
            ax.set_xlabel("teacher-normalised score")
            if ax.lines[1:]:
                ax.legend(frameon=False, loc="lower left")
        panels[0].set_ylabel("fraction of runs above it")
        figure.savefig(path, format="svg", metadata={"Date": None})
