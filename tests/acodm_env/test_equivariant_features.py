import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.observation import Observer
from acodm_env.policy.equivariant import (
    PER_DOMAIN,
    SCALINGS,
    Scaling,
    features,
    fields_of,
    num_features,
    scalings_of,
    split_mask,
)
from toy import ToyTrainer

FIELDS = (("loss", PER_DOMAIN), ("progress", 1), ("epochs", PER_DOMAIN))


def test_scaling_by_hand():
    scaling = Scaling(shift=1.0, scale=0.5, squash="asinh", times_domains=True)
    assert scaling.apply(np.array([0.25]), 8, np) == pytest.approx([math.asinh((0.25 * 8 - 1) / 0.5)])
    assert SCALINGS["sample_share"].apply(np.full(5, 1 / 5), 5, np) == pytest.approx(np.zeros(5))
    assert SCALINGS["loss"].apply(np.array([8.0]), 5, np) == pytest.approx([2.0])  # nats, whatever ln V is
    assert SCALINGS["delta_loss"].apply(np.array([-0.05]), 5, np) == pytest.approx([-math.asinh(1)])


def test_features_by_hand():
    """Loss and its difference to the mean, epochs as they are; a far value is clipped; padding is in no mean."""
    scalings = scalings_of(FIELDS, {"loss": {"shift": 0.0, "scale": 1.0}})
    assert num_features(FIELDS, scalings) == (3, 1)
    observation = np.array([[1.0, 3.0, 99.0, 0.75, 0.5, 0.25, 0.0]])
    present = np.array([[True, True, False]])

    def mean(values, present):
        return np.where(present, values, 0).sum(1, keepdims=True) / present.sum(1, keepdims=True)

    local, context = features(observation, present, FIELDS, scalings, mean, np)
    np.testing.assert_allclose(local, [[[1, -1, 0.5], [3, 1, 0.25], [10, 10, 0]]])
    np.testing.assert_allclose(context, [[0.5]])


def test_layout_is_split_into_domains_and_run():
    info = ToyTrainer((0.2,) * 5).info
    layout = Observer(info, ["progress", "loss", "mask", "epochs"]).layout
    assert fields_of(layout, 5) == (("progress", 1), ("loss", PER_DOMAIN), ("epochs", PER_DOMAIN))
    observation = np.arange(2 * 16).reshape(2, 16)
    rest, mask = split_mask(observation, layout)
    np.testing.assert_array_equal(mask, observation[:, 6:11])
    np.testing.assert_array_equal(rest, observation[:, [0, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15]])
    assert split_mask(observation, (("loss", 16),))[1] is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("loss", 4), ("target_loss", 13)], r"fields='target_loss': must have one entry per domain \(4\).* it has 13"),
        ([("loss", 4), ("layer_norm", 4)], "fields='layer_norm'"),
        ([("loss", 4), ("pending", 8)], "fields='pending'.*leave it out"),
        ([("progress", 1), ("mask", 4)], "must hold a field with one entry per domain"),
    ],
)
def test_layouts_that_are_not_of_domains_are_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        fields_of(layout, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"los": {}}, "did you mean 'loss'"),
        ({"loss": {"scal": 1.0}}, "did you mean 'scale'"),
        ({"loss": {"scale": 0.0}}, "scale=0.0: must be finite, the scale positive"),
        ({"loss": {"shift": math.nan}}, "shift=nan"),
        ({"loss": {"squash": "asin"}}, "did you mean 'asinh'"),
    ],
)
def test_bad_scalings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        scalings_of(FIELDS, changes)


def test_scalings_can_be_changed_one_setting_at_a_time():
    changed = scalings_of(FIELDS, {"loss": {"scale": 3.0}})
    assert changed == {
        "loss": replace(SCALINGS["loss"], scale=3.0),
        "progress": SCALINGS["progress"],
        "epochs": Scaling(),
    }
