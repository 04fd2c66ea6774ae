"""`python -m acodm_env COMMAND` is `acodm COMMAND`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("acodm_env.experiments", run_name="__main__")
