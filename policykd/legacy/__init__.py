"""The previous core, until every area has moved to the new one. To be deleted."""
