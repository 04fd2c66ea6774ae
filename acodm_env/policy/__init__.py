"""Exported policies: the folder of JSON and safetensors, what it decides, and the mixer that drives a run by it."""

from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy, open_policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval

__all__ = ["Policy", "PolicyMixer", "load_policy", "open_policy", "scaled_interval"]
