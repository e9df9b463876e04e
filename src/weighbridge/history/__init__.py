"""What is remembered of every run: one row each, an index over them that can be made again, and what changed over time."""
