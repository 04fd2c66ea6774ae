"""Target runs: `acodm transfer` and `acodm cotrain`."""
