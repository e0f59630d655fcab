"""Films and windows that show policies playing."""
