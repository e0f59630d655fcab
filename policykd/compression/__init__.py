"""Ways to make a network small, and their comparison."""
