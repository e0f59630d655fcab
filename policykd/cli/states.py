"""`policykd states`: imports states that other tools recorded, or exports states to Minari."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from policykd.cli.errors import needs_extra
from policykd.importers.importers import import_states
from policykd.importers.minari import export_to_minari
from policykd.runs.config import DebugArgs


@dataclass(frozen=True, kw_only=True)
class Import(DebugArgs):
    """Writes recorded states as a dataset, to distil from with --states dataset:FOLDER.

    Each frame is stored once. The same command continues an import that was interrupted.
    """

    source: tyro.conf.Positional[Path]
    """SB3's replay_buffer.pkl, the folder of a lossless Minari dataset, or a folder of the DQN Replay Dataset"""
    folder: tyro.conf.Positional[Path]
    """folder of the new dataset"""
    game: str | None = None
    """game that was played, where the source does not record it"""
    num_states: int | None = None
    """maximum number of states; all by default"""
    trust_pickle: bool = False
    """read a pickle, which EXECUTES whatever code is in it: only for a file that you made yourself"""


@dataclass(frozen=True, kw_only=True)
class Export(DebugArgs):
    """Writes a dataset, or the states of a run, as a lossless Minari dataset."""

    dataset: tyro.conf.Positional[Path]
    """folder of a dataset or of a run"""
    folder: tyro.conf.Positional[Path]
    """folder of the new Minari dataset; its name, such as pong-v0, is the dataset's id"""


def run(args: Import | Export) -> None:
    """Imports or exports, and prints what was written."""
    # Minari is needed to export, and to import from a folder of its own.
    if isinstance(args, Export):
        with needs_extra("minari"):
            num_episodes = export_to_minari(args.dataset, args.folder)
        print(f"{args.folder}: {num_episodes:,} episodes")
        return
    with needs_extra("minari"):
        dataset = import_states(
            args.source, args.folder, game=args.game, trust_pickle=args.trust_pickle, num_states=args.num_states
        )
    megabytes = sum(shard.num_bytes for shard in dataset.shards.values()) / 1e6
    game = dataset.info.origin.game or "an unnamed game"
    print(f"{args.folder}: {dataset.num_states:,} states of {game}, {megabytes:.1f} MB")
