"""States that other tools recorded, as datasets."""
