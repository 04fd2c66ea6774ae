"""`acodm benchmark --suite`: many mixing problems at once."""
