"""A run in its folder: loop, checkpoints, results, cost, what interrupts and overrides it."""
