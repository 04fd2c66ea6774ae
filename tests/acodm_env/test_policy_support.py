"""A policy for any problem in `PolicyMixer`: within its support it drives, outside of it a rule does and it is said."""

from dataclasses import replace

import numpy as np
import pytest
from general_policy import FIELDS, general

from acodm_env.errors import PolicyError
from acodm_env.mixture import ActionMap, Controller
from acodm_env.policy.equivariant import scalings_of
from acodm_env.policy.load import load_policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.trainer import drive
from toy import ToyTrainer


def toy(num_domains=4, horizon=20):
    trainer = ToyTrainer((1 / num_domains,) * num_domains, horizon=horizon, decision_every=2)
    trainer.evaluate = lambda split, sequences=None: np.full(num_domains, trainer.objective)  # type: ignore[method-assign]
    trainer.info = replace(trainer.info, targets=("domain0",), objective=(1.0,))
    return trainer


def played(trainer, mixer, seed=0):
    trainer.evaluate = lambda split, sequences=None: np.full(1, trainer.objective)
    trainer.reset(np.random.default_rng(seed))
    mixer.start(trainer.info)
    return list(drive(trainer, mixer, trainer.info.horizon))


def test_within_its_support_the_policy_drives_and_says_nothing():
    said = []
    mixer = PolicyMixer(general(support={"num_rows": [3, 8]}), say=said.append)
    stats = played(toy(), mixer)
    assert (mixer.rule, said) == ("", [])
    assert np.ptp([one.requested for one in stats], axis=0).max() > 0.01
    assert "clipped_frac" in mixer.diagnostics()
    assert sum(one.eval_losses is not None for one in stats) == 9  # ten decisions, the first before any step


def test_outside_of_it_the_nearest_rule_does_and_it_is_said_once():
    said = []
    mixer = PolicyMixer(
        general(support={"num_rows": [5, 8], "decisions": [20, 40]}), name="generalist", say=said.append
    )
    stats = played(toy(), mixer)
    played(toy(), mixer)
    assert said == [
        "generalist: outside of the policy's training support: 4 domains and targets, it is meant for 5 to 8; "
        "10 decisions, it is meant for 20 to 40; target-share 0.7 drives instead"
    ]
    assert mixer.rule == "target-share 0.7"
    for one in stats:
        np.testing.assert_allclose(one.requested, [0.7, 0.1, 0.1, 0.1])
        assert one.eval_losses is None  # nothing is measured that nobody reads
    assert mixer.diagnostics() == {"fixed_rule": 1.0}
    again = PolicyMixer(mixer.policy, say=said.append)
    again.start(toy().info)
    again.load_state_dict(mixer.state_dict())
    np.testing.assert_array_equal(again.weights(), mixer.weights())


def test_without_a_listener_it_warns():
    mixer = PolicyMixer(general(support={"num_rows": [5, 8]}))
    with pytest.warns(UserWarning, match="outside of the policy's training support"):
        mixer.start(toy().info)


def test_a_mixer_takes_a_folder(tmp_path):
    policy = general(support={"num_rows": [3, 24]})
    assert PolicyMixer(policy.save(tmp_path / "policy")).policy.fingerprint == policy.fingerprint
    assert policy.fingerprint != general().fingerprint  # its support decides where it drives
    assert load_policy(tmp_path / "policy").support == {"num_rows": [3, 24]}


def test_fields_that_are_missing_are_named_before_the_run():
    blind = general(fields=FIELDS[1:])
    with pytest.raises(PolicyError, match=r"must hold objective_weight or marginal_value .* switched off"):
        PolicyMixer(blind).start(toy().info)
    PolicyMixer(blind).start(ToyTrainer((0.25,) * 4, decision_every=2).info)  # all alike: nothing to see
    unheard = general(
        fields=(*FIELDS, ("moon", 1)), scalings={**scalings_of(FIELDS), "moon": scalings_of(FIELDS)["size"]}
    )
    with pytest.raises(PolicyError, match="no field 'moon'"):
        PolicyMixer(unheard).start(toy().info)


def test_a_tilt_of_one_half_halves_the_logarithms():
    """softmax(2·(1, 0, −1)) → α ∝ e^(1, 0, −1)."""
    action = np.array([1.0, 0.0, -1.0])
    plain, half = ActionMap(floor=0.0), ActionMap(floor=0.0, tilt=0.5)
    expected = np.exp([1.0, 0.0, -1.0])
    np.testing.assert_allclose(half.weights(action), expected / expected.sum())
    ratios = np.log(plain.weights(action)[:2] / plain.weights(action)[1:])
    np.testing.assert_allclose(np.log(half.weights(action)[:2] / half.weights(action)[1:]), ratios / 2)
    masked = half.weights(np.stack([action, action]), np.array([[1, 1, 0], [1, 0, 1]]))
    np.testing.assert_allclose(masked.sum(-1), 1.0)
    assert masked[0, 2] == masked[1, 1] == 0


@pytest.mark.parametrize("tilt", [0.25, 0.5, 1.0])
def test_a_tilted_map_is_inverted(tilt):
    action_map = ActionMap(floor=0.1, tilt=tilt)
    weights = action_map.weights(np.array([0.4, -0.3, 0.1]))
    action, error = action_map.action(weights)
    assert error < 1e-12
    np.testing.assert_allclose(action_map.weights(action), weights)


def test_a_tilt_of_one_is_left_out_and_another_survives_saving(tmp_path):
    policy = general()
    assert "tilt" not in policy._contract()["action"]
    half = replace(policy, action=replace(policy.action, tilt=0.5))
    assert load_policy(half.save(tmp_path / "half")).action.tilt == 0.5
    assert half.fingerprint != policy.fingerprint
    with pytest.raises(ValueError, match=r"tilt=0: must be above 0"):
        ActionMap(tilt=0)


def test_a_slow_policy_tilts_what_it_decides():
    controller = Controller(ActionMap(floor=0.0, rate=0.0, tilt=0.5))
    first = controller.take(np.array([1.0, -1.0]))
    second = controller.take(np.array([-1.0, 1.0]))
    np.testing.assert_allclose(first, np.exp([1.0, -1.0]) / np.exp([1.0, -1.0]).sum())
    np.testing.assert_allclose(second, first * 2 / 3 + first[::-1] / 3)
