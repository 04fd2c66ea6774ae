"""For scripts that still say `torchrun -m acodm_env.experiments.transfer`; gone after the next release."""

import warnings

from acodm_env.experiments.cli import main

if __name__ == "__main__":
    warnings.warn("-m acodm_env.experiments.transfer: say -m acodm_env transfer", FutureWarning, stacklevel=1)
    main(command="transfer")
