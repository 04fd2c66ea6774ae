"""Runs against runs: paired differences, intervals, crossings."""
