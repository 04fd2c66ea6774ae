"""`python -m acodm_env.experiments COMMAND`, also behind `torchrun -m` and `accelerate launch -m`."""

from acodm_env.experiments.cli import main

if __name__ == "__main__":
    main()
