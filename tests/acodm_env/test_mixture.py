import math

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.mixture import ActionMap, Bounds, check_weights

# --- check_weights -----------------------------------------------------------------------------------------


def test_weights_are_normalised():
    weights = check_weights([1, 2, 5], 3)
    assert weights.tolist() == [0.125, 0.25, 0.625]
    assert weights.dtype == np.float64


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.5, 0.5], r"must hold 3 numbers.*shape \(2,\)"),
        ([[0.2, 0.3, 0.5]], r"shape \(1, 3\)"),
        (1.0, r"shape \(\)"),
        ([0.5, math.nan, 0.5], "must be finite"),
        ([0.5, math.inf, 0.5], "must be finite"),
        ([0.5, -0.1, 0.6], "must be non-negative"),
        ([0.0, 0.0, 0.0], "positive sum"),
        (["a", "b", "c"], "must be 3 numbers"),
        ({"a": 1.0}, "must be 3 numbers"),
        ([[1.0], [1.0, 2.0], [3.0]], "must be 3 numbers"),
    ],
)
def test_bad_weights_are_refused_by_name(bad, message):
    with pytest.raises(ConfigError, match=f"^mine=.*{message}"):
        check_weights(bad, 3, "mine")


# --- ActionMap ---------------------------------------------------------------------------------------------


def test_action_to_mixture_by_hand():
    weights = ActionMap().weights(np.array([0.5, -0.5]))  # softmax(1, −1) = 0.880797, 0.119203
    assert weights == pytest.approx([0.9 * 0.880797 + 0.05, 0.9 * 0.119203 + 0.05], abs=1e-6)
    assert ActionMap(scale=1.0, floor=0.0).weights(np.array([1.0, -1.0])) == pytest.approx([0.880797, 0.119203])


def test_zero_action_gives_the_prior_with_its_floor():
    prior = (0.7, 0.2, 0.1)
    assert ActionMap(prior=prior, floor=0.0).weights(np.zeros(3)) == pytest.approx(prior)
    assert ActionMap(prior=(7, 2, 1), floor=0.3).weights(np.zeros(3)) == pytest.approx([0.59, 0.24, 0.17])


def test_prior_and_action_by_hand():
    action_map = ActionMap(prior=(0.5, 0.25, 0.25), scale=1.0, floor=0.0)
    weights = action_map.weights(np.array([0.0, math.log(2), 0.0]))  # ∝ 0.5, 0.5, 0.25
    assert weights == pytest.approx([0.4, 0.4, 0.2])


def test_floor_is_the_smallest_weight_and_actions_are_clipped():
    action_map = ActionMap(scale=50.0, floor=0.1)
    weights = action_map.weights(np.array([1.0, -1.0, -1.0, -1.0]))
    assert weights == pytest.approx([0.925, 0.025, 0.025, 0.025])
    np.testing.assert_array_equal(
        ActionMap().weights(np.array([9.0, -9.0])), ActionMap().weights(np.array([1.0, -1.0]))
    )


@pytest.mark.parametrize("num_domains", [2, 7, 22])
@pytest.mark.parametrize("prior", [False, True])
def test_inverse_of_reachable_mixtures_is_exact(num_domains, prior):
    rng = np.random.default_rng(num_domains)
    action_map = ActionMap(prior=tuple(rng.dirichlet([5.0] * num_domains)) if prior else None)
    for _ in range(50):
        weights = action_map.weights(rng.uniform(-1, 1, num_domains))
        action, error = action_map.action(weights)
        assert error < 1e-12
        assert np.abs(action).max() <= 1
        np.testing.assert_allclose(action_map.weights(action), weights, atol=1e-12)


def test_inverse_is_centred():
    action, error = ActionMap().action(np.array([0.5, 0.3, 0.2]))
    assert action.max() == pytest.approx(-action.min())
    assert error < 1e-12
    # 0.9·softmax + 1/30 of (0.5, 0.2): the log-ratio of 14/30 and 5/30 over 2c = 4
    assert action[0] == pytest.approx(math.log(14 / 5) / 4)


def test_inverse_out_of_range_reports_the_error_of_its_clipping():
    action, error = ActionMap().action(np.array([1.0, 0.0]))
    assert action.tolist() == [1.0, -1.0]
    assert error == pytest.approx(1 - (0.9 / (1 + math.exp(-4)) + 0.05))  # 0.0662


def test_inverse_of_a_missing_domain_keeps_the_ratio_of_the_others():
    action_map = ActionMap()
    action, error = action_map.action(np.array([0.0, 0.3, 0.7]))
    assert action[0] == -1.0
    assert action[2] == pytest.approx(1.0)
    assert action[2] - action[1] == pytest.approx(math.log((0.7 - 0.1 / 3) / (0.3 - 0.1 / 3)) / 2)
    best = min(np.abs(action_map.weights(np.array([-1, x, 1])) - [0, 0.3, 0.7]).max() for x in np.linspace(-1, 1, 401))
    assert error < best + 2e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": math.nan}, "scale=nan"),
        ({"floor": 1.0}, "floor=1.0"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"floor": math.nan}, "floor=nan"),
        ({"prior": (0.5, 0.0)}, "prior"),
    ],
)
def test_bad_action_map_is_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        ActionMap(**options)


def test_prior_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"prior=.*must hold 3 numbers"):
        ActionMap(prior=(0.5, 0.5)).weights(np.zeros(3))


def by_hand(action, mask, scale, floor):
    """The definition, domain by domain."""
    exponentials = [math.exp(scale * min(max(a, -1), 1)) if m else 0.0 for a, m in zip(action, mask, strict=True)]
    present = sum(bool(m) for m in mask)
    return [
        (1 - floor) * e / sum(exponentials) + (floor / present if m else 0.0)
        for e, m in zip(exponentials, mask, strict=True)
    ]


def test_masked_action_by_hand():
    weights = ActionMap().weights(np.array([0.5, 1.0, -0.5]), mask=np.array([1, 0, 1]))
    assert weights == pytest.approx([0.9 * 0.880797 + 0.05, 0.0, 0.9 * 0.119203 + 0.05], abs=1e-6)
    assert weights[1] == 0.0


def test_mask_leaves_the_prior_of_the_others():
    action_map = ActionMap(prior=(0.2, 0.5, 0.3), floor=0.0)
    assert action_map.weights(np.zeros(3), mask=np.array([True, False, True])) == pytest.approx([0.4, 0.0, 0.6])


@pytest.mark.parametrize("scale", [2.0, 50.0])  # beyond 20 the largest logit is subtracted, row by row
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_batches_equal_single_actions_and_the_definition(scale, dtype):
    rng = np.random.default_rng(0)
    action_map = ActionMap(scale=scale)
    actions = rng.uniform(-1.2, 1.2, (40, 17)).astype(dtype)
    actions[0] = -1.0
    mask = (np.arange(17) < rng.integers(1, 18, 40)[:, None]).astype(dtype)
    mask[0] = np.arange(17) != 3
    actions[0, 3] = 1.0  # padding with by far the largest logit
    for given, told in ((None, np.ones_like(mask)), (mask, mask), (mask[0], np.tile(mask[0], (40, 1)))):
        weights = action_map.weights(actions, given)
        assert weights.dtype == dtype
        assert (weights[told == 0] == 0.0).all()
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6 if dtype == np.float32 else 1e-14)
        for action, row, present in zip(actions, weights, told, strict=True):
            np.testing.assert_allclose(row, by_hand(action, present, scale, 0.1), rtol=2e-5, atol=1e-7)
            single = action_map.weights(action, None if given is None else present)
            np.testing.assert_allclose(row, single, rtol=1e-5 if dtype == np.float32 else 1e-13)
    three = action_map.weights(actions.reshape(4, 10, 17), mask.reshape(4, 10, 17))
    np.testing.assert_allclose(three.reshape(40, 17), action_map.weights(actions, mask), rtol=1e-6)


def test_padding_takes_nothing_from_the_others():
    rng = np.random.default_rng(1)
    for num_domains in range(1, 25):
        action = rng.uniform(-1, 1, num_domains)
        padded = np.concatenate([action, rng.uniform(-1, 1, 6)])
        weights = ActionMap().weights(padded, np.arange(num_domains + 6) < num_domains)
        np.testing.assert_allclose(weights[:num_domains], ActionMap().weights(action), rtol=1e-14)


def test_integers_and_lists_become_float64():
    assert ActionMap().weights([1, -1]).dtype == np.float64
    np.testing.assert_array_equal(ActionMap().weights([1, -1]), ActionMap().weights(np.array([1.0, -1.0])))


def test_one_action_is_mapped_as_ever_bit_for_bit():
    """Runs must repeat across versions of this package."""
    rng = np.random.default_rng(2)
    for num_domains in (2, 7, 17, 24):
        action, prior = rng.normal(size=num_domains), tuple(rng.dirichlet([3.0] * num_domains))
        for action_map in (ActionMap(), ActionMap(scale=50.0, floor=0.3), ActionMap(prior=prior)):
            logits = action_map._log_prior(num_domains) + action_map.scale * np.clip(action, -1.0, 1.0)
            soft = np.exp(logits - logits.max())
            first = (1 - action_map.floor) * soft / soft.sum() + action_map.floor / num_domains
            np.testing.assert_array_equal(action_map.weights(action), first)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(2), r"mask: must have the action's shape \(3,\).*got \(2,\)"),
        (np.ones((3, 3)), r"got \(3, 3\)"),
        (np.zeros(3), "at least one domain"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(ConfigError, match=message):
        ActionMap().weights(np.zeros(3), mask)


def test_a_row_without_any_domain_is_refused():
    with pytest.raises(ConfigError, match="at least one domain"):
        ActionMap().weights(np.zeros((2, 3)), np.array([[1, 1, 1], [0, 0, 0]]))


# --- Bounds ------------------------------------------------------------------------------------------------


def test_mixture_within_bounds_is_untouched():
    weights = np.array([0.2, 0.3, 0.5])
    assert Bounds().project(weights) is weights
    assert Bounds(minimum=(0.1, 0.1, 0.1), maximum=(0.5, 0.5, 0.5)).project(weights) is weights


def test_projection_by_hand():
    weights = np.array([0.7, 0.2, 0.1])
    capped = Bounds(maximum=(0.4, 1.0, 1.0)).project(weights)  # 0.3 too much, shared evenly by the other two
    assert capped == pytest.approx([0.4, 0.35, 0.25])
    raised = Bounds(minimum=(0.0, 0.0, 0.3)).project(weights)  # 0.2 missing, taken evenly from the other two
    assert raised == pytest.approx([0.6, 0.1, 0.3])
    both = Bounds(minimum=(0.0, 0.15, 0.3), maximum=(0.5, 1.0, 1.0)).project(weights)
    assert both == pytest.approx([0.5, 0.2, 0.3])


def test_projection_is_the_nearest_allowed_mixture():
    rng = np.random.default_rng(0)
    bounds = Bounds(minimum=(0.05, 0.1, 0.0, 0.0), maximum=(0.3, 0.9, 0.4, 0.2))
    for _ in range(20):
        weights = rng.dirichlet([0.3] * 4)
        projected = bounds.project(weights)
        assert projected.sum() == pytest.approx(1.0, abs=1e-12)
        assert (projected >= np.array(bounds.minimum) - 1e-12).all()
        assert (projected <= np.array(bounds.maximum) + 1e-12).all()
        for _ in range(20):
            other = bounds.project(rng.dirichlet([1.0] * 4))
            assert ((weights - projected) ** 2).sum() <= ((weights - other) ** 2).sum() + 1e-12


def test_only_one_allowed_mixture():
    assert Bounds(minimum=(0.6, 0.4)).project(np.array([0.1, 0.9])) == pytest.approx([0.6, 0.4])
    assert Bounds(maximum=(0.6, 0.4)).project(np.array([0.1, 0.9])) == pytest.approx([0.6, 0.4])


def test_epoch_cap_takes_spent_domains_out():
    weights, epochs = np.array([0.5, 0.3, 0.2]), np.array([3.9, 4.0, 0.1])
    bounds = Bounds(max_epochs=4.0, minimum=(0.1, 0.1, 0.1))  # the minimum of a spent domain is given up
    assert bounds.project(weights, epochs) == pytest.approx([0.65, 0.0, 0.35])
    assert bounds.project(weights) is weights


@pytest.mark.parametrize(
    ("bounds", "epochs"),
    [
        (Bounds(minimum=(0.6, 0.5)), None),
        (Bounds(maximum=(0.4, 0.5)), None),
        (Bounds(minimum=(0.5, 0.0), maximum=(0.4, 1.0)), None),
        (Bounds(max_epochs=1.0), np.array([1.0, 2.0])),
        (Bounds(max_epochs=1.0, maximum=(0.9, 1.0)), np.array([0.5, 1.0])),
    ],
)
def test_bounds_that_nothing_fits_are_refused(bounds, epochs):
    with pytest.raises(ConfigError, match="no mixture fits between them"):
        bounds.project(np.array([0.5, 0.5]), epochs)


@pytest.mark.parametrize("bounds", [Bounds(minimum=(0.1,)), Bounds(maximum=(1.0, 1.0, 1.0))])
def test_bounds_of_another_length_are_refused(bounds):
    with pytest.raises(ConfigError, match="must hold 2 numbers"):
        bounds.project(np.array([0.5, 0.5]))
