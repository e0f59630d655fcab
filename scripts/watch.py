"""Shows policies playing: the same as `policykd watch`."""

import sys

from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line
from policykd.cli.watch import WatchArgs, run

if __name__ == "__main__":
    exit_with_one_line(lambda: run(parse_args(WatchArgs, sys.argv[1:])))
