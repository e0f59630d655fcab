"""The ground floor, which everything may import: files, typed JSON, signals."""
