"""Films and windows that show a policy play."""
