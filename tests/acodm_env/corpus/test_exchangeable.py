"""Domains whose validation and test differ are named, the worst first."""

import math

import pytest

from acodm_env.corpus.exchangeable import split_differences
from acodm_env.errors import ConfigError


def test_domains_that_differ_are_named_with_both_losses_the_worst_first():
    found = split_differences(["code", "licences", "prose"], [3.0, 2.3, 4.0], [3.31, 3.6, 3.75])
    assert [sentence.split(":")[0] for sentence in found] == ["domain 'licences'", "domain 'code'"]
    assert "validation (2.30 nats) and test (3.60) differ by 1.30 nats" in found[0]


def test_the_limit_is_exclusive_and_what_was_not_measured_is_not_named():
    assert split_differences(["a", "b"], [1.0, math.nan], [1.5, 2.0], limit_nats=0.5) == []
    assert len(split_differences(["a"], [1.0], [1.5], limit_nats=0.49)) == 1
    assert split_differences([], [], []) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test": [1.0]}, r"domains=a,b: must have one validation and one test loss each; there are 2 and 1"),
        ({"limit_nats": 0.0}, "limit_nats=0.0: must be above 0"),
        ({"limit_nats": math.nan}, "limit_nats=nan"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        split_differences(**({"domains": ["a", "b"], "validation": [1.0, 2.0], "test": [1.0, 2.0]} | settings))
