"""For scripts that still say `torchrun -m acodm_env.experiments.cotrain`; gone after the next release."""

import warnings

from acodm_env.experiments.cli import main

if __name__ == "__main__":
    warnings.warn("-m acodm_env.experiments.cotrain: say -m acodm_env cotrain", FutureWarning, stacklevel=1)
    main(command="cotrain")
