"""An environment whose dynamics come from measured pre-training runs, thousands of times faster than a real one."""
