"""The tasks of lm-eval, from local files."""
