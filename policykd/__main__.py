"""`python -m policykd`: the `policykd` command."""

from policykd.cli.main import main

main()
