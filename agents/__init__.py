"""Who decides: actor-critic agents on Stable-Baselines3, their export, and the baselines.

Importing this package imports neither Stable-Baselines3 nor torch; `agents.sb3` does.
"""
