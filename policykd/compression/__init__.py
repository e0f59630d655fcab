"""Compression of trained policies: pruning, low-rank factorization and int8, alone or one after the other."""
