import hashlib
import json

import numpy as np
import pytest

from acodm_env.errors import ConfigError, DataError, PolicyError
from acodm_env.files import read_json
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.trainer import drive
from toy import ToyTrainer


def make_policy(info, fields=("loss", "progress"), layers=None, **options):
    layout = Observer(info, fields).layout
    width = sum(size for _, size in layout)
    if layers is None:
        rng = np.random.default_rng(0)
        weight = rng.normal(size=(info.num_domains, width)).astype(np.float32)
        layers = ((weight, np.zeros(info.num_domains, dtype=np.float32), "tanh"),)
    settings = {
        "domains": info.domains,
        "fields": layout,
        "mean": np.zeros(width),
        "scale": np.ones(width),
        "clip": 10.0,
        "layers": layers,
        "action": ActionMap(),
        "bounds": Bounds(),
        "interaction": InteractionConfig(),
        "decision_every": info.decision_every,
        "horizon": info.horizon,
        "provenance": {"config": {"algo": "td3"}},
    }
    return Policy(**settings | options)


@pytest.fixture
def trainer():
    trainer = ToyTrainer((0.5, 0.3, 0.2), horizon=12, decision_every=3)
    trainer.reset(np.random.default_rng(0))
    return trainer


def test_act_by_hand():
    """Normalise (3−1)/2 = 1 and (9−1)/2 = 4 → clipped to 2; relu layer; tanh layer."""
    info = ToyTrainer((0.5, 0.5)).info
    hidden = (np.array([[1.0, -1.0], [1.0, 1.0]], dtype=np.float32), np.array([0.0, 1.0], dtype=np.float32), "relu")
    out = (np.array([[1.0, 0.5], [0.0, -0.25]], dtype=np.float32), np.zeros(2, dtype=np.float32), "tanh")
    policy = make_policy(info, ("loss",), (hidden, out), mean=np.ones(2), scale=np.full(2, 2.0), clip=2.0)
    # hidden: relu(1·1 − 1·2) = 0, relu(1 + 2 + 1) = 4; out: tanh(0.5·4) and tanh(−0.25·4)
    np.testing.assert_allclose(policy.act(np.array([3.0, 9.0], dtype=np.float32)), np.tanh([2.0, -1.0]), rtol=1e-6)


def normalised_policy(info):
    """Dense → layer normalisation → relu → dense → tanh."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    width, num_domains = 2 * info.num_domains + 1, info.num_domains
    layers = (
        (draw(8, width), draw(8), "identity"),
        (draw(8), draw(8), "relu"),
        (draw(num_domains, 8), draw(num_domains), "tanh"),
    )
    return make_policy(info, ("loss", "epochs", "progress"), layers)


def test_layer_normalisation_by_hand():
    """(1, 3) has mean 2 and variance 1: normalised to ∓1, times the weight (2, 3), plus the bias (1, −1)."""
    info = ToyTrainer((0.5, 0.5)).info
    identity = (np.eye(2, dtype=np.float32), np.zeros(2, dtype=np.float32), "identity")
    norm = (np.array([2.0, 3.0], dtype=np.float32), np.array([1.0, -1.0], dtype=np.float32), "relu")
    policy = make_policy(info, ("loss",), (identity, norm))
    assert policy.act(np.array([1.0, 3.0], dtype=np.float32)) == pytest.approx([0.0, 2.0], abs=1e-4)
    three = policy.act(np.array([[1, 3], [3, 1], [5, 5]], dtype=np.float32))
    np.testing.assert_allclose(three, [[0, 2], [3, 0], [1, 0]], atol=1e-4)  # equal inputs: the bias alone


def test_layer_normalisation_is_saved_and_checked(trainer, tmp_path):
    policy = normalised_policy(trainer.info)
    loaded = load_policy(policy.save(tmp_path / "policy"))
    observation = np.linspace(0, 1, 7, dtype=np.float32)
    np.testing.assert_array_equal(policy.act(observation), loaded.act(observation))
    assert loaded.fingerprint == policy.fingerprint
    short = (policy.layers[0], (np.ones(7, np.float32), np.zeros(7, np.float32), "relu"), policy.layers[2])
    folder = make_policy(trainer.info, ("loss", "epochs", "progress"), short).save(tmp_path / "short")
    with pytest.raises(PolicyError, match=r"layer \(7,\) does not follow 8 inputs"):
        load_policy(folder)


def test_untrained_layer_normalisation_is_the_identity(trainer):
    untrained = normalised_policy(trainer.info).untrained(np.random.default_rng(1))
    assert (untrained.layers[1][0] == 1).all()
    assert (untrained.layers[1][1] == 0).all()
    assert np.abs(untrained.layers[0][0]).max() <= 1 / np.sqrt(7)


def test_saved_and_loaded_policy_is_the_same(trainer, tmp_path):
    policy = make_policy(trainer.info)
    loaded = load_policy(policy.save(tmp_path / "policy"))
    observation = np.linspace(0, 1, 4, dtype=np.float32)
    np.testing.assert_array_equal(policy.act(observation), loaded.act(observation))
    assert (loaded.domains, loaded.fields, loaded.action) == (policy.domains, policy.fields, policy.action)
    assert loaded.provenance == {"config": {"algo": "td3"}}
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["policy.json", "policy.safetensors"]


def test_fingerprint_is_what_the_policy_does_not_where_it_comes_from(trainer):
    policy = make_policy(trainer.info)
    assert policy.fingerprint == make_policy(trainer.info, provenance={"git_commit": "other"}).fingerprint
    assert policy.fingerprint != make_policy(trainer.info, clip=9.0).fingerprint


def test_fingerprint_is_the_same_in_every_version(trainer):
    """A golden value: benchmarks know their cells by it."""
    assert make_policy(trainer.info).fingerprint == "3e062676751a399ef7e17573e28a9ab33ed1c455195c13d72944c4e0967dff6d"


def edit_json(folder, **changes):
    file = folder / "policy.json"
    file.write_text(json.dumps(read_json(file) | changes))


def test_edited_json_is_refused(trainer, tmp_path):
    folder = make_policy(trainer.info).save(tmp_path / "policy")
    edit_json(folder, decision_every=7)
    with pytest.raises(PolicyError, match="checksum does not match"):
        load_policy(folder)


def seal(folder, **changes):
    """Edit the contract, as a version that knows no better would have written it."""
    contract = read_json(folder / "policy.json") | changes
    contract = {name: value for name, value in contract.items() if value is not None and name != "contract_sha256"}
    digest = hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()
    (folder / "policy.json").write_text(json.dumps(contract | {"contract_sha256": digest}))


def test_policies_from_before_there_were_architectures_are_dense(trainer, tmp_path):
    folder = make_policy(trainer.info).save(tmp_path / "policy")
    assert read_json(folder / "policy.json")["architecture"] == "dense"
    seal(folder, architecture=None)
    assert load_policy(folder).fingerprint == make_policy(trainer.info).fingerprint


def test_unknown_architecture_is_refused(trainer, tmp_path):
    folder = make_policy(trainer.info).save(tmp_path / "policy")
    seal(folder, architecture="transformer")
    with pytest.raises(PolicyError, match="architecture='transformer': must be dense or equivariant"):
        load_policy(folder)


def test_other_format_version_is_refused(trainer, tmp_path):
    folder = make_policy(trainer.info).save(tmp_path / "policy")
    edit_json(folder, format_version=99)
    with pytest.raises(PolicyError, match="format_version=99"):
        load_policy(folder)


def test_edited_or_truncated_weights_are_refused(trainer, tmp_path):
    folder = make_policy(trainer.info).save(tmp_path / "policy")
    weights = folder / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(PolicyError, match="cut short or edited"):
        load_policy(folder)


def test_missing_policy_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_policy(tmp_path)


def test_other_domains_are_refused_by_name(trainer):
    policy = make_policy(trainer.info, domains=("domain0", "domain1", "poetry"))
    with pytest.raises(PolicyError, match=r"only in the policy: \['poetry'\]; only in the corpus: \['domain2'\]"):
        PolicyMixer(policy).start(trainer.info)


def test_domains_in_another_order_are_refused(trainer):
    policy = make_policy(trainer.info, domains=("domain1", "domain0", "domain2"))
    with pytest.raises(PolicyError, match="another order"):
        PolicyMixer(policy).start(trainer.info)


def test_other_field_sizes_are_refused_by_name(trainer):
    policy = make_policy(trainer.info, fields=("loss", "layer_norm"))
    policy = make_policy(trainer.info, fields=("loss",), layers=policy.layers, mean=policy.mean, scale=policy.scale)
    object.__setattr__(policy, "fields", (("loss", 3), ("layer_norm", 9)))
    with pytest.raises(PolicyError, match="'layer_norm' has 3 entries here, 9 in the policy"):
        PolicyMixer(policy).start(trainer.info)


def test_transfer_computes_only_what_the_policy_reads(trainer):
    mixer = PolicyMixer(make_policy(trainer.info, ("progress", "sample_share")))
    assert mixer.needs == frozenset()
    mixer.start(trainer.info)
    list(drive(trainer, mixer, 3))
    assert trainer.measure == frozenset()
    assert PolicyMixer(make_policy(trainer.info, ("interaction",))).needs == frozenset({"gram"})


def test_policy_sees_in_a_target_run_what_the_environment_showed(trainer):
    """Training and serving must not drift: the same observer, the same windows, the same mixtures."""
    from acodm_env.env import MixtureEnv

    fields = ("loss", "delta_loss", "interaction", "gradient_norm", "progress", "layer_change")
    policy = make_policy(trainer.info, fields)
    env = MixtureEnv(ToyTrainer((0.5, 0.3, 0.2), horizon=12, decision_every=3), fields=fields)
    observation, _ = env.reset(seed=5)
    from_env = []
    for _ in range(4):
        observation, *_, info = env.step(policy.act(observation))
        from_env.append(info["weights"])
    env.reset(seed=5)  # the same generator again, for the same run outside of the environment
    served = ToyTrainer((0.5, 0.3, 0.2), horizon=12, decision_every=3)
    served.reset(np.random.default_rng(int(np.random.Generator(np.random.PCG64(5)).integers(2**63))))
    mixer = PolicyMixer(policy)
    mixer.start(served.info)
    requested = [stats.requested for stats in drive(served, mixer, 12)]
    np.testing.assert_array_equal(requested[::3], from_env)


@pytest.mark.parametrize(
    ("cut", "fields"),
    [(6, ("loss", "interaction", "progress")), (7, ("loss", "progress")), (8, ("loss", "progress"))],
    ids=["at a decision", "a step after it", "two steps after it"],
)
def test_resumed_mixer_equals_the_uninterrupted_one(trainer, cut, fields):
    policy = make_policy(trainer.info, fields)
    whole = PolicyMixer(policy)
    whole.start(trainer.info)
    expected = [stats.requested for stats in drive(trainer, whole, 12)]
    trainer.reset(np.random.default_rng(0))
    first = PolicyMixer(policy)
    first.start(trainer.info)
    got = [stats.requested for stats in drive(trainer, first, cut)]
    second = PolicyMixer(policy)
    second.start(trainer.info)
    second.load_state_dict(first.state_dict())
    got += [stats.requested for stats in drive(trainer, second, 12 - cut)]
    np.testing.assert_array_equal(got, expected)


def test_gradients_of_an_unknown_kind_cannot_be_saved_inside_a_window(trainer):
    mixer = PolicyMixer(make_policy(trainer.info, ("loss", "interaction")))
    mixer.start(trainer.info)
    list(drive(trainer, mixer, 2))
    with pytest.raises(ValueError, match="ToyGradients: cannot be saved between two decisions, only at one"):
        mixer.state_dict()


def test_interval_scales_with_the_horizon(trainer):
    policy = make_policy(trainer.info)
    assert [scaled_interval(policy, horizon) for horizon in (12, 120, 30, 1)] == [3, 30, 8, 1]


def test_unknown_observation_field_is_refused(trainer):
    with pytest.raises(ConfigError, match="did you mean 'progress'"):
        Observer(trainer.info, ["progres"])
