"""SIGINT and SIGTERM as a question that every loop asks, so that nothing is cut in the middle."""

_interrupted = False


def check_interrupted() -> None:
    """Raises KeyboardInterrupt once SIGINT or SIGTERM has come."""
    if _interrupted:
        raise KeyboardInterrupt
