"""Online data mixing for language-model pre-training as a control problem (arXiv 2505.23878).

Importing this package registers the environments and loads neither torch nor transformers.
"""

import gymnasium

from acodm_env.version import __version__

__all__ = ["__version__"]

gymnasium.register(id="acodm/ProxyPretrain-v0", entry_point="acodm_env.proxy_env:ProxyPretrainEnv")
gymnasium.register(
    id="acodm/Surrogate-v0",
    entry_point="acodm_env.surrogate.env:SurrogateEnv",
    vector_entry_point="acodm_env.surrogate.vector:SurrogateVectorEnv",
)
