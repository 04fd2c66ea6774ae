import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.errors import PolicyError
from acodm_env.files import read_json
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import PER_DOMAIN, EquivariantPolicy, Scaling, num_features, scalings_of
from acodm_env.policy.load import load_policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.trainer import drive
from toy import ToyTrainer

NAMES = ("loss", "delta_loss", "sample_share", "epochs", "gradient_norm", "interaction", "progress")


def any_domains(names):
    return tuple((name, 1 if name == "progress" else PER_DOMAIN) for name in names)


def make_policy(names=NAMES, hidden=16, seed=0, **options):
    fields = any_domains(names)
    scalings = scalings_of(fields)
    rng = np.random.default_rng(seed)
    local, whole = num_features(fields, scalings)
    shapes = [(hidden, local + whole), (hidden, hidden), (hidden, 3 * hidden + whole), (1, hidden)]
    weights = [(rng.normal(size=shape) / math.sqrt(shape[1])).astype(np.float32) for shape in shapes]
    biases = [rng.normal(size=shape[0]).astype(np.float32) for shape in shapes]
    settings = {
        "fields": fields,
        "scalings": scalings,
        "encoder": 2,
        "layers": tuple(zip(weights, biases, ("relu", "relu", "relu", "identity"), strict=True)),
        "action": ActionMap(),
        "bounds": Bounds(),
        "interaction": InteractionConfig(),
        "decision_every": 3,
        "horizon": 12,
        "provenance": {"trained_on": {"num_domains": [3, 24]}},
    }
    return EquivariantPolicy(**settings | options)


def observe(rng, num_domains, rows=(), names=NAMES):
    """Per-domain blocks {name: (…, K)} of a plausible observation."""
    ranges = {"loss": (1, 9), "delta_loss": (-2, 1), "interaction": (-9, 9), "gradient_norm": (-3, 3)}
    return {
        name: rng.uniform(*ranges.get(name, (0, 1)), (*rows, 1 if name == "progress" else num_domains)).astype(
            np.float32
        )
        for name in names
    }


def flat(blocks):
    return np.concatenate(list(blocks.values()), axis=-1)


def reorder(blocks, order):
    return {name: block if name == "progress" else block[..., order] for name, block in blocks.items()}


POLICY = make_policy()


# --- what it computes --------------------------------------------------------------------------------------


def by_hand_policy():
    """φ passes x on; ρ is 2·relu(h_i − mean + ½·max − g)."""
    array = lambda *rows: np.array(rows, dtype=np.float32)  # noqa: E731
    layers = (
        (array([1, 0]), array(0), "relu"),
        (array([1, -1, 0.5, -1]), array(0), "relu"),
        (array([2]), array(0.25), "identity"),
    )
    plain = {"loss": Scaling(), "progress": Scaling()}
    return make_policy(("loss", "progress"), layers=layers, encoder=1, scalings=plain)


def test_act_by_hand():
    """x = (0, 1, 2), g = 0.5: mean 1, max 2 → relu(x − 1 + 1 − 0.5) = (0, 0.5, 1.5) → logits (0, 1, 3) + ¼, less
    their mean 4/3 + ¼."""
    action = by_hand_policy().act(np.array([0, 1, 2, 0.5], dtype=np.float32))
    np.testing.assert_allclose(action, np.tanh([-4 / 3, -1 / 3, 5 / 3]), rtol=1e-6)
    assert action.dtype == np.float32


def test_padding_by_hand():
    """Without the middle domain: mean 1, max 2 → (0, 1.5) → (0, 3) less their mean."""
    action = by_hand_policy().act(np.array([0, 99, 2, 0.5], dtype=np.float32), mask=np.array([1, 0, 1]))
    np.testing.assert_allclose(action, [math.tanh(-1.5), -1.0, math.tanh(1.5)], rtol=1e-6)


def slow_act(policy, blocks):
    """The formula, one domain at a time, in float64 matrix products."""
    num_domains = len(blocks["loss"])
    rows = []
    whole = [policy.scalings["progress"].apply(float(blocks["progress"][0]), num_domains, np)]
    for name, block in blocks.items():
        if name != "progress":
            scaled = policy.scalings[name].apply(block.astype(np.float64), num_domains, np)
            rows.append(scaled)
            if policy.scalings[name].relative:
                rows.append(scaled - scaled.mean())
    inputs = np.clip(np.array(rows).T, -10, 10)  # (K, F)

    def run(layers, row):
        for weight, bias, activation in layers:
            row = weight.astype(np.float64) @ row + bias
            row = np.maximum(row, 0) if activation == "relu" else row
        return row

    hidden = [run(policy.layers[:2], np.concatenate([row, whole])) for row in inputs]
    pooled = np.concatenate([np.mean(hidden, axis=0), np.max(hidden, axis=0), whole])
    logits = np.array([run(policy.layers[2:], np.concatenate([h, pooled]))[0] for h in hidden])
    return np.tanh(logits - logits.mean())


@pytest.mark.parametrize("num_domains", [2, 7, 22])
def test_act_equals_a_slow_reference(num_domains):
    rng = np.random.default_rng(num_domains)
    for _ in range(10):
        blocks = observe(rng, num_domains)
        np.testing.assert_allclose(POLICY.act(flat(blocks)), slow_act(POLICY, blocks), rtol=1e-5, atol=1e-6)


# --- symmetries, bit for bit -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 24), st.integers(0, 2**32 - 1))
def test_permuting_the_domains_permutes_the_action_exactly(num_domains, seed):
    rng = np.random.default_rng(seed)
    blocks = observe(rng, num_domains)
    order = rng.permutation(num_domains)
    np.testing.assert_array_equal(POLICY.act(flat(reorder(blocks, order))), POLICY.act(flat(blocks))[order])


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 24), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_padding_anywhere_changes_nothing_exactly(num_domains, padding, seed):
    rng = np.random.default_rng(seed)
    padded = observe(rng, num_domains + padding)
    places = np.sort(rng.permutation(num_domains + padding)[:num_domains])
    mask = np.isin(np.arange(num_domains + padding), places)
    action = POLICY.act(flat(padded), mask)
    np.testing.assert_array_equal(action[places], POLICY.act(flat(reorder(padded, places))))
    assert (action[~mask] == -1).all()
    weights = ActionMap().weights(action.astype(np.float64), mask)
    alone = ActionMap().weights(action[places].astype(np.float64))
    np.testing.assert_allclose(weights[places], alone, rtol=1e-14)
    assert (weights[~mask] == 0).all()


def test_batches_equal_single_observations_exactly():
    rng = np.random.default_rng(3)
    batch = flat(observe(rng, 9, rows=(20,)))
    mask = np.arange(9) < rng.integers(2, 10, 20)[:, None]
    for row, present, action in zip(batch, mask, POLICY.act(batch, mask), strict=True):
        np.testing.assert_array_equal(action, POLICY.act(row, present))


def test_equal_domains_get_equal_actions():
    blocks = observe(np.random.default_rng(4), 1)
    action = POLICY.act(flat({name: np.repeat(b, 1 if name == "progress" else 13) for name, b in blocks.items()}))
    assert len(np.unique(action)) == 1
    assert np.abs(action).max() < 1e-14  # one logit, less itself


def test_twice_the_domains_with_half_the_share_get_the_same_actions():
    """What the policy sees does not depend on K."""
    blocks = observe(np.random.default_rng(5), 7)
    twice = {name: b if name == "progress" else np.tile(b, 2) for name, b in blocks.items()}
    twice["sample_share"] = twice["sample_share"] / 2
    np.testing.assert_allclose(POLICY.act(flat(twice)), np.tile(POLICY.act(flat(blocks)), 2), atol=1e-6)


# --- the artifact ------------------------------------------------------------------------------------------


def test_saved_and_loaded_policy_is_the_same(tmp_path):
    folder = POLICY.save(tmp_path / "policy")
    loaded = load_policy(folder)
    assert isinstance(loaded, EquivariantPolicy)
    observation = flat(observe(np.random.default_rng(6), 11))
    np.testing.assert_array_equal(loaded.act(observation), POLICY.act(observation))
    assert (loaded.fields, loaded.scalings, loaded.encoder) == (POLICY.fields, POLICY.scalings, POLICY.encoder)
    assert loaded.fingerprint == POLICY.fingerprint
    assert loaded.save(tmp_path / "again").joinpath("policy.json").read_text() == (folder / "policy.json").read_text()


def test_the_artifact_says_that_it_fits_any_domains(tmp_path):
    contract = read_json(POLICY.save(tmp_path / "policy") / "policy.json")
    assert (contract["architecture"], contract["format_version"]) == ("equivariant", 1)
    assert (contract["domains"], contract["any_domains"]) == (None, True)
    assert contract["provenance"]["trained_on"] == {"num_domains": [3, 24]}
    assert contract["fields"][2] == {
        "name": "sample_share",
        "size": "per_domain",
        "scaling": {"shift": 1.0, "scale": 1.0, "squash": "none", "times_domains": True, "relative": False},
    }
    assert contract["fields"][6]["size"] == 1


def test_edited_artifact_is_refused(tmp_path):
    folder = POLICY.save(tmp_path / "policy")
    file = folder / "policy.json"
    file.write_text(json.dumps(read_json(file) | {"encoder": 3}))
    with pytest.raises(PolicyError, match="checksum does not match"):
        load_policy(folder)
    weights = POLICY.save(tmp_path / "other") / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(PolicyError, match="cut short or edited"):
        load_policy(tmp_path / "other")


def test_layers_that_do_not_fit_are_refused(tmp_path):
    for encoder, message in ((1, r"\(16, 16\) does not follow 49"), (3, "does not follow")):
        with pytest.raises(PolicyError, match=message):
            load_policy(replace(POLICY, encoder=encoder).save(tmp_path / "policy"))
    two = (np.zeros((2, 16), np.float32), np.zeros(2, np.float32), "identity")
    with pytest.raises(PolicyError, match="one logit per domain"):
        load_policy(replace(POLICY, layers=(*POLICY.layers[:3], two)).save(tmp_path / "policy"))


def test_fingerprint_is_what_the_policy_does_not_where_it_comes_from():
    assert replace(POLICY, provenance={}).fingerprint == POLICY.fingerprint
    other = dict(POLICY.scalings) | {"loss": Scaling(shift=3.0)}
    assert replace(POLICY, scalings=other).fingerprint != POLICY.fingerprint
    assert replace(POLICY, decision_every=4).fingerprint != POLICY.fingerprint


def test_untrained_control_has_the_same_shape_and_other_weights():
    untrained = POLICY.untrained(np.random.default_rng(0))
    assert isinstance(untrained, EquivariantPolicy)
    assert untrained.provenance["checkpoint"] == "untrained"
    observation = flat(observe(np.random.default_rng(7), 5))
    assert np.abs(untrained.act(observation) - POLICY.act(observation)).max() > 1e-3
    assert np.abs(untrained.layers[0][0]).max() <= 1 / math.sqrt(untrained.layers[0][0].shape[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": ActionMap(prior=(0.5, 0.5))}, r"prior=\(0.5, 0.5\): must be None"),
        ({"bounds": Bounds(minimum=(0.1, 0.1))}, "minimum="),
        ({"bounds": Bounds(maximum=(0.9, 0.9))}, "maximum="),
    ],
)
def test_limits_of_particular_domains_are_refused(options, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(**options)


# --- on runs -----------------------------------------------------------------------------------------------


def toy(num_domains, **options):
    trainer = ToyTrainer((1 / num_domains,) * num_domains, horizon=12, decision_every=3, **options)
    trainer.reset(np.random.default_rng(0))
    return trainer


@pytest.mark.parametrize("num_domains", [2, 7, 22])
def test_it_drives_runs_of_any_number_of_domains_under_any_names(num_domains):
    trainer = toy(num_domains)
    trainer.info = replace(trainer.info, domains=tuple(f"corpus{i}" for i in range(num_domains)))
    mixer = PolicyMixer(POLICY)
    assert mixer.needs == frozenset({"losses", "gram"})
    mixer.start(trainer.info)
    requested = np.array([stats.requested for stats in drive(trainer, mixer, 12)])
    assert requested.shape == (12, num_domains)
    np.testing.assert_allclose(requested.sum(1), 1, atol=1e-12)
    assert len(np.unique(requested, axis=0)) == 4  # one mixture per decision; the first is even
    np.testing.assert_allclose(requested[0], 1 / num_domains, rtol=1e-12)
    assert scaled_interval(POLICY, 120) == 30


def test_run_with_padding_draws_nothing_from_it():
    trainer = toy(9)
    trainer.info = replace(trainer.info, padding=4)
    mixer = PolicyMixer(POLICY)
    mixer.start(trainer.info)
    for stats in drive(trainer, mixer, 12):
        assert (stats.requested[5:] == 0).all()
        assert stats.requested[:5].min() >= 0.1 / 5


def test_policy_of_fixed_domains_refuses_others_still():
    layout = (("loss", 7),)
    layer = (np.zeros((7, 7), np.float32), np.zeros(7, np.float32), "tanh")
    common = {name: getattr(POLICY, name) for name in ("action", "bounds", "interaction", "decision_every", "horizon")}
    fixed = Policy(
        domains=toy(7).info.domains,
        fields=layout,
        mean=np.zeros(7),
        scale=np.ones(7),
        clip=10.0,
        layers=(layer,),
        **common,
    )
    PolicyMixer(fixed).start(toy(7).info)
    with pytest.raises(PolicyError, match="does not fit this corpus"):
        PolicyMixer(fixed).start(toy(22).info)


def test_run_of_one_domain_is_refused():
    with pytest.raises(PolicyError, match="leaves nothing to choose"):
        POLICY.check_fits(toy(1).info)


def test_fields_of_another_size_are_refused_by_name():
    policy = make_policy(("loss", "target_loss"))
    policy.check_fits(toy(4).info)
    info = replace(toy(4).info, targets=("one", "two"))
    with pytest.raises(PolicyError, match=r"'target_loss' has 2 entries here, the policy reads 4 \(one per domain\)"):
        policy.check_fits(info)
    late = make_policy(("loss", "pending"), lag=3)
    with pytest.raises(PolicyError, match=r"'pending' has 0 entries here.*lag=3"):
        late.check_fits(toy(4).info)


def test_gradients_measured_otherwise_are_refused():
    with pytest.raises(PolicyError, match=r"'gradient_norm' was learned with gradients measured as \[exact\]"):
        make_policy(gradients="exact").check_fits(toy(4).info)


def test_whole_and_sketched_gradients_are_the_same_quantity():
    """Policies of earlier versions recorded the sketch; its inner products are right in expectation."""
    info = replace(toy(4).info, gradients="depths=None precondition=False")
    for sketch in ("", "sketch=None ", "sketch=64 "):
        make_policy(gradients=f"depths=None {sketch}precondition=False").check_fits(info)
    with pytest.raises(PolicyError, match="precondition=True"):
        make_policy(gradients="depths=None sketch=None precondition=True").check_fits(info)


@pytest.mark.parametrize("width", [1, 7, 12, 6 * 4])
def test_observation_of_no_number_of_domains_is_refused(width):
    with pytest.raises(PolicyError, match="are not 6 per domain, for 2 domains or more, and 1 for the run"):
        POLICY.act(np.zeros(width, dtype=np.float32))
