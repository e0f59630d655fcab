"""The `policykd` command: one module per subcommand."""
