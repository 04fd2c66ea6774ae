"""Learning, tuning, exporting and judging policies."""
