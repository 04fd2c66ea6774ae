"""An agent in a folder, exactly: networks, optimisers, replay, noise, normaliser, counters and every generator.

SB3's own zip holds pickles that execute on load; this is tensors (`torch.load(weights_only=True)`), safetensors and
JSON. Taken at an episode's end it lets learning go on as if never interrupted, bit for bit. `agent_state` is the same
as one nested dictionary, for a checkpoint that holds the environment in mid-episode too.
"""

import io
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from acodm_env.errors import DataError
from acodm_env.files import atomic_folder, read_json, read_state, sha256, write_json, write_state
from acodm_env.pretrain.checkpoint import int_keys, to_numpy, to_torch

_COUNTERS = (
    "num_timesteps", "_n_updates", "_episode_num", "_total_timesteps", "_current_progress_remaining",
    "learning_starts",  # a warm-up by a teacher sets it to 0
)  # fmt: skip
_REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_HEADS = "head_rewards"
"""Kept by the replay buffer of agents with one critic head per domain."""


def save_checkpoint(folder: Path, model: BaseAlgorithm, venv: VecNormalize, extra: Mapping[str, Any]) -> None:
    """Write everything at once, with checksums; an older checkpoint in `folder` is replaced only when whole.

    Call it between episodes only (the language model inside the environment is not saved).
    """
    state = _run_state(model, venv) | {"environment": venv.env_method("episode_state")[0], "extra": dict(extra)}
    with atomic_folder(folder) as fresh:
        networks = io.BytesIO()  # torch hides "disk full" behind an error of its own
        torch.save(_tensors(model), networks)
        (fresh / "networks.pt").write_bytes(networks.getvalue())
        write_state(fresh / "state.safetensors", state)
        write_json(fresh / "manifest.json", {p.name: sha256(p) for p in sorted(fresh.iterdir())})


def load_checkpoint(folder: Path, model: BaseAlgorithm, venv: VecNormalize, *, resume: bool = True) -> dict[str, Any]:
    """Load into a freshly made agent and return the `extra` it was saved with.

    Args:
        folder: a checkpoint.
        model: made with the same recipe and environment.
        venv: its environment.
        resume: also restore generators and start the interrupted episode; False restores the agent alone.

    Raises:
        DataError: a file is missing, cut short or edited.
    """
    load_networks(folder, model)
    state = read_state(folder / "state.safetensors")
    _restore_counters(model, state["counters"])
    if resume:
        venv.unwrapped._reset_seeds()  # a seed given at construction would start another episode
        venv.env_method("load_episode_state", state["environment"])
        venv.training = False
        venv.reset()
        venv.training = True
        _restore_run(model, venv, state)
    _restore_normaliser(venv, state["normaliser"])
    extra: dict[str, Any] = state["extra"]
    return extra


def load_networks(folder: Path, model: BaseAlgorithm) -> None:
    """Load networks and optimisers alone, after checking the checkpoint's checksums."""
    for name, checksum in read_json(folder / "manifest.json").items():
        if not (folder / name).is_file() or sha256(folder / name) != checksum:
            raise DataError(f"{folder / name}: missing or edited (checksum); use another checkpoint")
    _restore_tensors(model, torch.load(folder / "networks.pt", weights_only=True))


def agent_state(model: BaseAlgorithm, venv: VecNormalize) -> dict[str, Any]:
    """Everything about an agent but its environment, as numpy arrays and JSON values (`files.write_state`)."""
    return _run_state(model, venv) | {"networks": to_numpy(_tensors(model))}


def load_agent_state(model: BaseAlgorithm, venv: VecNormalize, state: Mapping[str, Any]) -> None:
    """Go on from `agent_state`'s value, the global generators included; the environment must be where it was."""
    tensors = to_torch(state["networks"])
    for value in tensors.values():
        if isinstance(value, dict) and value.keys() == {"state", "param_groups"}:
            value.update(int_keys(value))
    _restore_tensors(model, tensors)
    _restore_counters(model, state["counters"])
    _restore_run(model, venv, state)
    _restore_normaliser(venv, state["normaliser"])


def _tensors(model: BaseAlgorithm) -> dict[str, Any]:
    """State dictionaries of networks and optimisers, and loose tensors, by name."""
    return model.get_parameters() | {name: _attribute(model, name) for name in _variables(model)}


def _restore_tensors(model: BaseAlgorithm, tensors: dict[str, Any]) -> None:
    for name in _variables(model):
        with torch.no_grad():
            _attribute(model, name).copy_(tensors.pop(name))
    model.set_parameters(tensors, exact_match=True)


def _run_state(model: BaseAlgorithm, venv: VecNormalize) -> dict[str, Any]:
    """All of an agent but its tensors."""
    return {
        "counters": {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)},
        "normaliser": _normaliser(venv),
        "last": _last(model, venv),
        "replay": _replay(model),
        "noise": _noise(model),
        "episodes": [dict(row) for row in model.ep_info_buffer or ()],
        "generators": _generators(model),
    }


def _restore_counters(model: BaseAlgorithm, counters: Mapping[str, Any]) -> None:
    for name, value in counters.items():
        setattr(model, name, value)


def _restore_run(model: BaseAlgorithm, venv: VecNormalize, state: Mapping[str, Any]) -> None:
    model._last_obs = state["last"]["observation"]
    model._last_original_obs = venv.old_obs = state["last"]["original"]
    model._last_episode_starts = np.ones(1, dtype=bool)
    model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    if isinstance(model, OffPolicyAlgorithm) and model.replay_buffer is not None:
        replay = state["replay"]
        for name in _replay_arrays(model.replay_buffer):
            getattr(model.replay_buffer, name)[: len(replay[name])] = replay[name]
        model.replay_buffer.pos, model.replay_buffer.full = replay["pos"], replay["full"]
    noise = getattr(model, "action_noise", None)
    for name, value in state["noise"].items():
        setattr(noise, name, value)
    generators = state["generators"]
    version, internal, gauss = generators["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(generators["numpy"]))  # noqa: NPY002 (SB3 draws from the global generator)
    torch.set_rng_state(torch.from_numpy(generators["torch"]))
    model.action_space.np_random.bit_generator.state = generators["action_space"]


def _generators(model: BaseAlgorithm) -> dict[str, Any]:
    """SB3 draws from the global generators; they are part of its state."""
    return {
        "python": random.getstate(),
        "numpy": list(np.random.get_state()),  # noqa: NPY002
        "torch": torch.get_rng_state().numpy(),
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _normaliser(venv: VecNormalize) -> dict[str, Any]:
    obs_rms = cast(RunningMeanStd, venv.obs_rms)  # a dict only for dict spaces
    return {
        name: {"mean": rms.mean, "var": rms.var, "count": rms.count}
        for name, rms in (("obs_rms", obs_rms), ("ret_rms", venv.ret_rms))
    } | {"returns": venv.returns}


def _restore_normaliser(venv: VecNormalize, state: Mapping[str, Any]) -> None:
    for name in ("obs_rms", "ret_rms"):
        rms = getattr(venv, name)
        rms.mean, rms.var, rms.count = (np.array(state[name][key]) for key in ("mean", "var", "count"))
        rms.count = float(rms.count)
    venv.returns = np.array(state["returns"])


def _last(model: BaseAlgorithm, venv: VecNormalize) -> dict[str, Any]:
    return {"observation": model._last_obs, "original": venv.get_original_obs()}


def _replay(model: BaseAlgorithm) -> dict[str, Any]:
    if not isinstance(model, OffPolicyAlgorithm) or model.replay_buffer is None:
        return {}
    buffer = model.replay_buffer
    size = buffer.size()
    arrays = {name: getattr(buffer, name)[:size] for name in _replay_arrays(buffer)}
    return arrays | {"pos": buffer.pos, "full": buffer.full}


def _replay_arrays(buffer: ReplayBuffer) -> tuple[str, ...]:
    return (*_REPLAY, _HEADS) if hasattr(buffer, _HEADS) else _REPLAY


def _noise(model: BaseAlgorithm) -> dict[str, Any]:
    noise = getattr(model, "action_noise", None)
    previous = getattr(noise, "noise_prev", None)
    return {} if previous is None else {"noise_prev": previous}


def _variables(model: BaseAlgorithm) -> list[str]:
    """Names of loose tensors, such as SAC's log entropy coefficient."""
    return [name for name in model._get_torch_save_params()[1] if name]


def _attribute(model: BaseAlgorithm, name: str) -> torch.Tensor:
    value = getattr(model, name)
    assert isinstance(value, torch.Tensor)
    return value
