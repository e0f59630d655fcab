"""The folder of a run: its config, its results, and the job that makes them."""
