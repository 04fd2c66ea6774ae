"""What processes tell each other; that several do is in test_distributed."""

import json

import numpy as np
import pytest
import torch
from torch.distributed import DistNetworkError

from acodm_env.pretrain.distributed import LostRank, Ranks, _arrays, _plain


def test_alone_nothing_is_sent_or_changed():
    ranks = Ranks()
    numbers = np.array([1.0, 2.0])
    assert ranks.sum(numbers) is numbers
    assert ranks.broadcast_array(numbers) is numbers
    assert ranks.broadcast_value({"a": 1}) == {"a": 1}
    assert ranks.sum_(torch.ones(2)).tolist() == [1.0, 1.0]
    assert ranks.exchanged == 0


def test_nested_values_arrive_exactly():
    told = {
        "mixture": np.array([0.1, 1 / 3, np.nan]),
        "counts": np.arange(6).reshape(2, 3),
        "none": np.empty((0, 3)),
        "number": np.float64(0.1),
        "inside": [{"big": 2**100, "inf": float("inf")}],
    }
    got = json.loads(json.dumps(told, default=_plain), object_hook=_arrays)
    for name in ("mixture", "counts", "none"):
        np.testing.assert_array_equal(got[name], told[name])
        assert got[name].dtype == told[name].dtype
        assert got[name].shape == told[name].shape
    assert (got["number"], got["inside"]) == (0.1, told["inside"])
    with pytest.raises(TypeError, match="set cannot be told"):
        json.dumps({"a": {1}}, default=_plain)


def pair():
    """One of two processes, as far as `contact` is concerned."""
    ranks = Ranks()
    ranks.world, ranks.rank = 2, 1
    return ranks


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "closed by peer"),
        (DistNetworkError("no route"), "DistNetworkError: no route"),
    ],
)
def test_the_echo_of_another_process_end_is_told_plainly(error, cause):
    with (
        pytest.raises(LostRank, match=rf"rank 1 of 2: another .* ended \(step 7: .*{cause}\)"),
        pair().contact("step 7"),
    ):
        raise error


def test_this_process_own_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), pair().contact("step 7"):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), Ranks().contact("step 7"):
        raise RuntimeError("Connection closed by peer")
