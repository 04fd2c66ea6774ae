from dataclasses import replace
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DDPG, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from acodm_env.agents.equivariant import EquivariantTD3, EquivariantTD3Policy
from acodm_env.agents.export import export, parity, to_policy
from acodm_env.agents.penalty import LogitPenalty
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.mixture import ActionMap, softmax
from acodm_env.policy.equivariant import EquivariantPolicy
from acodm_env.policy.load import load_policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.reward import RewardConfig
from acodm_env.trainer import drive
from toy import ToyTrainer

FIELDS = ("loss", "delta_loss", "sample_share", "epochs", "progress")


class LevelsTrainer(ToyTrainer):
    """Every run has other losses, and the best mixture is softmax(losses / 2): what to do can be seen."""

    def __init__(self, num_domains, horizon=5):
        super().__init__((1 / num_domains,) * num_domains, horizon=horizon)

    def reset(self, rng):
        super().reset(rng)
        self.levels = rng.uniform(2, 6, size=self.info.num_domains)
        self.best = softmax(self.levels / 2)

    def step(self, weights, loss_weights=None):
        return replace(super().step(weights), losses=self.levels.copy())


def levels_env(num_domains, fields=("loss", "progress")):
    return MixtureEnv(LevelsTrainer(num_domains), fields=list(fields), reward=RewardConfig(terms={"progress": 1.0}))


def layout(num_domains, fields=FIELDS):
    return [(name, 1 if name == "progress" else num_domains) for name in fields]


def make_policy(num_domains, fields=(*FIELDS, "mask"), seed=0, **options):
    """The SB3 policy, its last layer enlarged: a fresh actor hardly tells domains apart."""
    torch.manual_seed(seed)
    shape = layout(num_domains, fields)
    spaces = gym.spaces.Box(-9, 9, (sum(size for _, size in shape),)), gym.spaces.Box(-1, 1, (num_domains,))
    policy = EquivariantTD3Policy(*spaces, lambda _: 1e-3, layout=shape, **options)
    with torch.no_grad():
        policy.actor.mu[0].head.layers[-1].weight.mul_(10)
    return policy


def observe(num_domains, rows=32, seed=0, fields=FIELDS):
    """Blocks {name: (rows, K)} of plausible observations, without a mask."""
    rng = np.random.default_rng(seed)
    draw = {"loss": (1, 9), "delta_loss": (-1, 1)}
    return {
        name: torch.tensor(rng.uniform(*draw.get(name, (0, 1)), (rows, size)), dtype=torch.float32)
        for name, size in layout(num_domains, fields)
    }


def flat(blocks, mask=None):
    parts = list(blocks.values()) + ([] if mask is None else [mask])
    return torch.cat(parts, 1)


def reorder(blocks, order):
    return {name: block if name == "progress" else block[:, order] for name, block in blocks.items()}


# --- symmetries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_domains", [2, 7, 24])
def test_actor_is_equivariant_and_critics_are_invariant(num_domains):
    policy = make_policy(num_domains, FIELDS)
    blocks, order = observe(num_domains), torch.randperm(num_domains)
    actions = policy.actor(flat(blocks))
    assert actions.std() > 0.05
    torch.testing.assert_close(policy.actor(flat(reorder(blocks, order))), actions[:, order], atol=1e-6, rtol=0)
    values = policy.critic(flat(blocks), actions)
    permuted = policy.critic(flat(reorder(blocks, order)), actions[:, order])
    assert len(values) == 2
    for value, other in zip(values, permuted, strict=True):
        assert value.shape == (32, 1)
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5)


def test_padding_is_seen_by_no_domain_and_no_critic():
    """A policy for 9 entries with 4 of them padding, and one for 5, with the same weights."""
    padded, plain = make_policy(9), make_policy(5, FIELDS)
    plain.load_state_dict(padded.state_dict())
    blocks, places = observe(9), torch.tensor([0, 2, 3, 6, 8])
    mask = torch.zeros(32, 9)
    mask[:, places] = 1
    actions = padded.actor(flat(blocks, mask))
    assert (actions[:, [1, 4, 5, 7]] == -1).all()
    alone = flat(reorder(blocks, places))
    torch.testing.assert_close(actions[:, places], plain.actor(alone), atol=1e-6, rtol=0)
    chosen = torch.rand(32, 9) * 2 - 1
    for value, other in zip(
        padded.critic(flat(blocks, mask), chosen), plain.critic(alone, chosen[:, places]), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_padding_has_no_gradient(strength):
    policy = make_policy(6, logit_penalty=strength)
    assert isinstance(policy.actor.mu[1], LogitPenalty) == (strength > 0)
    blocks = {name: block.requires_grad_() for name, block in observe(6).items()}
    mask = (torch.arange(6) < 4).float().expand(32, 6)
    actions = policy.actor(flat(blocks, mask))
    actions.retain_grad()
    policy.critic.q1_forward(flat(blocks, mask), actions).sum().backward()
    assert (actions.grad[:, 4:] == 0).all()
    assert (actions.grad[:, :4] != 0).any()
    for name in ("loss", "sample_share"):
        assert (blocks[name].grad[:, 4:] == 0).all()
        assert (blocks[name].grad[:, :4] != 0).any()
    gradients = [parameter.grad for parameter in policy.actor.parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any((gradient != 0).any() for gradient in gradients)


def test_masked_actions_have_no_weight():
    actions = make_policy(6).actor(flat(observe(6), (torch.arange(6) < 4).float().expand(32, 6)))
    weights = ActionMap().weights(actions.detach().numpy(), np.arange(6) < 4)
    assert (weights[:, 4:] == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert weights[:, :4].min() >= 0.1 / 4


def test_common_shift_of_the_logits_is_taken_out():
    policy = make_policy(5, FIELDS)
    before = policy.actor(flat(observe(5)))
    with torch.no_grad():
        policy.actor.mu[0].head.layers[-1].bias.add_(50.0)  # would saturate every tanh
    torch.testing.assert_close(policy.actor(flat(observe(5))), before, atol=1e-5, rtol=0)


# --- export ------------------------------------------------------------------------------------------------


def agent(kind=EquivariantTD3, num_domains=7, fields=(*FIELDS, "mask"), policy="MlpPolicy", venv=None, **options):
    """An agent after a few updates, its environments and one of them."""
    env = levels_env(num_domains, fields)
    venv = venv(DummyVecEnv([lambda: env])) if venv else DummyVecEnv([lambda: env])
    if issubclass(kind, TD3 | DDPG):
        options = {"learning_starts": 10, "batch_size": 8, "buffer_size": 100, "gradient_steps": 2} | options
    model = kind(policy, venv, seed=0, device="cpu", **options)
    model.learn(20)
    return model, venv, env


@pytest.mark.parametrize("fields", [FIELDS, (*FIELDS, "mask"), ("mask", "progress", "loss"), ("loss",)])
def test_exported_policy_does_what_the_agent_does(fields, tmp_path):
    model, venv, env = agent(fields=fields, policy_kwargs={"net_arch": [16], "scaling": {"loss": {"scale": 3.0}}})
    policy = to_policy(model, venv, env, {"note": "test"})
    assert export(policy, tmp_path / "policy", model, venv) <= 1e-5
    loaded = load_policy(tmp_path / "policy")
    assert isinstance(loaded, EquivariantPolicy)
    assert [name for name, _ in loaded.fields] == [name for name in fields if name != "mask"]
    assert loaded.scalings["loss"].scale == 3.0
    assert loaded.provenance == {"trained_on": {"num_domains": 7}, "note": "test"}
    assert parity(loaded.untrained(np.random.default_rng(0)), model, venv) > 1e-3


def test_policy_learned_on_seven_domains_runs_on_twenty_two_with_other_names():
    model, venv, env = agent(num_domains=7)
    policy = to_policy(model, venv, env, {})
    trainer = LevelsTrainer(22, horizon=20)
    trainer.info = replace(trainer.info, domains=tuple(f"corpus{i}" for i in range(22)), decision_every=4)
    trainer.reset(np.random.default_rng(0))
    mixer = PolicyMixer(policy)
    mixer.start(trainer.info)
    requested = np.array([stats.requested for stats in drive(trainer, mixer, 20)])
    assert requested.shape == (20, 22)
    np.testing.assert_allclose(requested.sum(1), 1, rtol=1e-12)
    assert len(np.unique(requested, axis=0)) == 5


def test_normalised_observations_are_refused():
    model, venv, env = agent(fields=FIELDS, venv=VecNormalize)
    with pytest.raises(PolicyError, match=r"norm_obs=True: .*VecNormalize\(norm_obs=False\)"):
        to_policy(model, venv, env, {})


def test_reward_alone_may_be_normalised(tmp_path):
    model, venv, env = agent(venv=lambda inner: VecNormalize(inner, norm_obs=False))
    assert export(to_policy(model, venv, env, {}), tmp_path / "policy", model, venv) <= 1e-5


@pytest.mark.parametrize("kind", [TD3, DDPG])
def test_policy_class_works_with_the_algorithms_themselves(kind, tmp_path):
    options = {"layout": layout(7, (*FIELDS, "mask")), "num_domains": 7, "n_critics": 1}
    model, venv, env = agent(kind, policy=EquivariantTD3Policy, policy_kwargs=options)
    assert export(to_policy(model, venv, env, {}), tmp_path / "policy", model, venv) <= 1e-5


def test_saved_and_loaded_agent_is_the_same_and_goes_on(tmp_path):
    model, venv, _ = agent(policy_kwargs={"logit_penalty": 0.1})
    model.save(tmp_path / "agent")
    loaded = EquivariantTD3.load(tmp_path / "agent", env=venv)
    observation = np.random.default_rng(0).uniform(0, 1, (4, 36)).astype(np.float32)
    np.testing.assert_array_equal(model.predict(observation)[0], loaded.predict(observation)[0])
    assert loaded.policy.logit_penalty == 0.1
    loaded.learn(20)
    model.policy.save(str(tmp_path / "policy.pt"))
    again = EquivariantTD3Policy.load(str(tmp_path / "policy.pt"))
    np.testing.assert_array_equal(model.predict(observation)[0], again.predict(observation)[0])


def layer_norm(policy, units):
    """The paper's shape: Linear → LayerNorm → ReLU."""
    for actor in (policy.actor, policy.actor_target):
        first, squash, last, tanh = actor.mu
        norm = torch.nn.LayerNorm(units)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, units))
            norm.bias.copy_(torch.linspace(-1, 1, units))
        actor.mu = torch.nn.Sequential(first, norm, squash, last, tanh)


@pytest.mark.parametrize("venv", [None, VecNormalize, lambda inner: VecNormalize(inner, norm_obs=False)])
def test_layer_normalised_actors_are_exported(venv, tmp_path):
    model, venv, env = agent(TD3, fields=FIELDS, venv=venv, policy_kwargs={"net_arch": [24]})
    layer_norm(model.policy, 24)
    policy = to_policy(model, venv, env, {})
    assert export(policy, tmp_path / "policy", model, venv) <= 1e-5
    assert [weight.shape for weight, _, _ in load_policy(tmp_path / "policy").layers] == [(24, 29), (24,), (7, 24)]


def test_layer_normalisation_with_another_epsilon_is_refused():
    model, venv, env = agent(TD3, fields=FIELDS, policy_kwargs={"net_arch": [24]})
    layer_norm(model.policy, 24)
    model.actor.mu[1].eps = 1e-3
    with pytest.raises(PolicyError, match=r"LayerNorm with eps=0\.001"):
        to_policy(model, venv, env, {})


CONTRIB = {
    "TQC": {"learning_starts": 10},
    "CrossQ": {"learning_starts": 10},
    "TRPO": {"n_steps": 10, "batch_size": 10},
    "ARS": {},
}


@pytest.mark.skipif(find_spec("sb3_contrib") is None, reason="sb3-contrib is not installed: the extra `contrib`")
@pytest.mark.parametrize("name", CONTRIB)
def test_contrib_agents_are_exported(name, tmp_path):
    import sb3_contrib

    for policy in ("MlpPolicy", "LinearPolicy") if name == "ARS" else ("MlpPolicy",):
        model, venv, env = agent(getattr(sb3_contrib, name), fields=FIELDS, policy=policy, **CONTRIB[name])
        exported = to_policy(model, venv, env, {})
        assert export(exported, tmp_path / policy, model, venv) <= 1e-5
        assert np.abs(exported.act(np.zeros(29, dtype=np.float32))).max() > 0 or policy == "LinearPolicy"


@pytest.mark.skipif(find_spec("sb3_contrib") is None, reason="sb3-contrib is not installed: the extra `contrib`")
def test_policies_with_a_memory_are_refused():
    from sb3_contrib import RecurrentPPO

    venv = DummyVecEnv([lambda: levels_env(3)])
    model = RecurrentPPO("MlpLstmPolicy", venv, n_steps=8, device="cpu")
    with pytest.raises(PolicyError, match="algo=RecurrentPPO: its actor cannot be exported; those of td3, ddpg"):
        to_policy(model, venv, levels_env(3), {})


def test_unknown_layers_are_refused():
    model, venv, env = agent(TD3, fields=FIELDS, policy_kwargs={"activation_fn": torch.nn.ELU, "net_arch": [8]})
    with pytest.raises(PolicyError, match="a ELU layer cannot be exported; use Linear layers with ReLU or Tanh"):
        to_policy(model, venv, env, {})


# --- learning ----------------------------------------------------------------------------------------------


def excess(policy, num_domains, episodes=10):
    """Squared distance from the best mixture once the losses were seen, against that of the even mixture."""
    env, found, even = levels_env(num_domains), 0.0, 0.0
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        for decision in range(5):
            observation, *_, info = env.step(policy.act(observation))
            if decision > 0:
                found += float(np.square(info["weights"] - env.trainer.best).sum())
                even += float(np.square(1 / num_domains - env.trainer.best).sum())
    return found / even


def test_td3_learns_on_five_domains_what_holds_for_any_number():
    venv = VecNormalize(DummyVecEnv([lambda: Monitor(levels_env(5))]), norm_obs=False, gamma=0.0)
    model = EquivariantTD3(
        "MlpPolicy",
        venv,
        gamma=0.0,
        learning_rate=3e-3,
        batch_size=64,
        learning_starts=200,
        buffer_size=2000,
        action_noise=NormalActionNoise(np.zeros(5), np.full(5, 0.3)),
        policy_kwargs={"net_arch": [32, 32]},
        seed=0,
        device="cpu",
    )
    model.learn(800)
    policy = to_policy(model, venv, levels_env(5), {})
    assert excess(policy.untrained(np.random.default_rng(0)), 5) > 0.8
    for num_domains in (2, 5, 9, 16):
        assert excess(policy, num_domains) < 0.2


# --- bad inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": [("loss", 7)]}, r"layout=\[\('loss', 7\)\], num_domains=7: must fit the spaces"),
        ({"num_domains": 6}, "num_domains=6: must fit the spaces"),
        ({"net_arch": []}, r"net_arch=\[\]: must be the units"),
        ({"net_arch": {"pi": [8], "qf": [8]}}, "net_arch={.*must be the units"),
        ({"scaling": {"los": {}}}, "did you mean 'loss'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        agent(policy_kwargs={"layout": layout(7, (*FIELDS, "mask"))} | options)


def test_fields_that_are_not_of_domains_are_refused_by_name():
    with pytest.raises(ConfigError, match="fields='layer_norm': must have one entry per domain"):
        agent(fields=("loss", "layer_norm"))


def test_without_environment_the_layout_must_be_given():
    with pytest.raises(ConfigError, match="env=None: must be a MixtureEnv"):
        EquivariantTD3("MlpPolicy", None)
