"""Published methods that are more than a divergence of two policies; each plugs into the loop as a loss function."""
