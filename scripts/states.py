"""Imports states that others recorded into a dataset, and exports a dataset to Minari."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from policykd.cli.command import exit_with_one_line
from policykd.importers.importers import import_states
from policykd.importers.minari import export_to_minari


@dataclass(frozen=True)
class Import:
    """Writes recorded states as a dataset: every frame once, to distil from with --states dataset:FOLDER.

    An import that was interrupted goes on behind its last shard: run the same command again.
    """

    source: tyro.conf.Positional[Path]
    """SB3's replay_buffer.pkl, the folder of a lossless Minari dataset, or a folder of the DQN Replay Dataset."""
    folder: tyro.conf.Positional[Path]
    """of the new dataset."""
    game: str | None = None
    """what was played, where the source does not say it."""
    num_states: int | None = None
    """stop after so many; all by default."""
    trust_pickle: bool = False
    """read a pickle, which EXECUTES whatever code is in it: only for a file that you made yourself."""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(frozen=True)
class Export:
    """Writes a dataset, or the states of a run, as a lossless Minari dataset."""

    dataset: tyro.conf.Positional[Path]
    """folder of a dataset or of a run."""
    folder: tyro.conf.Positional[Path]
    """of the new Minari dataset; its name, such as pong-v0, is the dataset's id."""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Import | Export) -> None:
    """Imports or exports."""
    if isinstance(args, Export):
        num_episodes = export_to_minari(args.dataset, args.folder)
        print(f"{args.folder}: {num_episodes:,} episodes")
        return
    if args.num_states is not None and args.num_states < 1:
        raise ValueError(f"--num-states must be at least 1, not {args.num_states}")
    dataset = import_states(
        args.source, args.folder, game=args.game, trust_pickle=args.trust_pickle, num_states=args.num_states
    )
    megabytes = sum((args.folder / name).stat().st_size for name in dataset.shards) / 1e6
    game = dataset.info.origin.game or "an unnamed game"
    print(f"{args.folder}: {dataset.num_states:,} states of {game}, {megabytes:.1f} MB")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(tyro.cli(Import | Export)))
