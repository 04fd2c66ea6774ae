import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.errors import ConfigError
from acodm_env.surrogate.draws import Family
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer

SHIPPED = Surface.load("regmix-1m")
FAMILIES = {"around": Family(around=SHIPPED), "made": Family(around=SHIPPED, num_domains=(3, 24))}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def same(one, other):
    """Whether two surfaces are equal to the last bit."""
    numbers = ("domains", "targets", "sizes_tokens", "forgetting", "length", "objective")
    return all(getattr(one, name) == getattr(other, name) for name in numbers) and all(
        np.array_equal(array, getattr(other.law, name)) for name, array in vars(one.law).items()
    )


@families
def test_the_same_generator_draws_the_same_surfaces(family):
    one, other = ([family.draw(rng) for _ in range(3)] for rng in (np.random.default_rng(4), np.random.default_rng(4)))
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert not same(one[0], one[1])
    assert one[0].domains == other[0].domains


def test_around_a_surface_names_and_shapes_stay():
    surface = FAMILIES["around"].draw(np.random.default_rng(0))
    assert (surface.domains, surface.targets) == (SHIPPED.domains, SHIPPED.targets)
    assert surface.law.usefulness.shape == (13, 17)
    np.testing.assert_allclose(surface.objective_weights, 1 / 13)
    assert (FAMILIES["around"].max_domains, FAMILIES["around"].max_targets) == (17, 13)


def test_without_spreads_a_draw_is_the_surface_itself():
    still = Family(
        around=SHIPPED,
        transfer=0,
        learnability=0,
        entropy=0,
        forgetting=0,
        sizes=0,
        noise_domains=0,
        saturating=0,
        lengths=(1, 1),
    )
    surface = still.draw(np.random.default_rng(0))
    weights = np.random.default_rng(1).dirichlet(np.ones(17), 5)
    np.testing.assert_allclose(surface.law.predict(weights), SHIPPED.law.predict(weights), rtol=1e-10)
    np.testing.assert_allclose(surface.sizes_tokens, SHIPPED.sizes_tokens)
    assert surface.length == 1.0


def test_made_surfaces_have_every_number_of_domains_asked_for():
    rng = np.random.default_rng(0)
    drawn = [FAMILIES["made"].draw(rng) for _ in range(300)]
    assert {len(surface.domains) for surface in drawn} == set(range(3, 25))
    for surface in drawn:
        assert surface.domains == surface.targets
        assert surface.objective_weights.sum() == pytest.approx(1)
        assert np.count_nonzero(surface.objective_weights) >= 2
    assert (FAMILIES["made"].max_domains, FAMILIES["made"].max_targets) == (24, 24)


def test_lengths_forgetting_and_sizes_stay_in_their_ranges():
    rng = np.random.default_rng(0)
    drawn = [FAMILIES["around"].draw(rng) for _ in range(400)]
    lengths = np.array([surface.length for surface in drawn])
    assert lengths.min() >= 0.5
    assert lengths.max() <= 2.0
    assert np.log2(lengths).mean() == pytest.approx(0, abs=0.1)
    forgetting = np.array([surface.forgetting for surface in drawn])
    assert 0 <= forgetting.min() < 0.05
    assert 1.5 < forgetting.max() <= 1.5 + 5 * 0.3  # the level and five standard deviations
    spread = np.log([surface.sizes_tokens for surface in drawn]) - np.log(SHIPPED.sizes_tokens)
    assert spread.std() == pytest.approx(1.0, rel=0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FAMILIES)))
def test_every_surface_can_be_played(seed, name):
    """Finite losses under uniform and in every corner; a uniform run learns."""
    rng = np.random.default_rng(seed)
    surface = FAMILIES[name].draw(rng)
    num_domains = len(surface.domains)
    initial = None
    for weights in (np.full(num_domains, 1 / num_domains), *np.eye(num_domains)[:: max(1, num_domains // 4)]):
        runs = SurrogateTrainer(surface, horizon=8)
        runs.reset(rng)
        runs.measure = frozenset({"gram", "losses"})
        initial = runs.evaluate("test")
        stats = [runs.step(weights) for _ in range(8)][-1]
        assert np.isfinite(runs.evaluate("test")).all()
        assert np.isfinite(stats.gradients.gram()[0]).all()
        assert np.isfinite(stats.losses[weights > 0]).all()
        if weights[0] == 1 / num_domains:
            assert (runs.evaluate("test") <= initial + 1e-9).all()
            assert runs.evaluate("test").mean() < initial.mean()


def test_noise_domains_teach_nothing_and_do_not_count():
    """Drawn with certainty nearly: all but the first two domains."""
    family = Family(around=SHIPPED, num_domains=(6, 6), noise_domains=0.999)
    surface = family.draw(np.random.default_rng(0))
    np.testing.assert_allclose(surface.objective_weights, [0.5, 0.5, 0, 0, 0, 0])
    assert (surface.law.usefulness[:2, 2:] == -30).all()
    assert (surface.law.usefulness[2:] == -30).all()
    some, none = (surface.law.predict(weights[None])[0] for weights in (np.full(6, 1 / 6), np.eye(6)[2]))
    np.testing.assert_allclose(some[2:], none[2:], rtol=1e-6)


# --- batches -----------------------------------------------------------------------------------------------


@families
def test_each_row_of_a_batch_is_a_run_on_that_rows_surface(family):
    batch = SurrogateTrainer(family, horizon=6, batch=(5,), noise=0.0)
    batch.reset(np.random.default_rng(3))
    batch.measure = frozenset({"losses", "gram"})
    rng = np.random.default_rng(1)
    schedule = rng.dirichlet(np.ones(family.max_domains), (6, 5))
    trace = [(batch.step(weights), batch.evaluate("test")) for weights in schedule]
    assert len({surface.length for surface in batch.surfaces}) == 5
    for row, surface in enumerate(batch.surfaces):
        alone = SurrogateTrainer(surface, horizon=6, noise=0.0)
        alone.reset(np.random.default_rng(0))
        alone.measure = batch.measure
        num_domains, num_targets = len(surface.domains), len(surface.targets)
        np.testing.assert_array_equal(batch.mask[row], np.arange(family.max_domains) < num_domains)
        for weights, (stats, held_out) in zip(schedule[:, row], trace, strict=True):
            part = weights[:num_domains] / weights[:num_domains].sum()
            expected = alone.step(part)
            np.testing.assert_allclose(stats.requested[row, :num_domains], part, atol=1e-12)
            np.testing.assert_array_equal(stats.requested[row, num_domains:], 0.0)
            np.testing.assert_allclose(stats.losses[row, :num_domains], expected.losses, atol=1e-12)
            assert np.isnan(stats.losses[row, num_domains:]).all()
            np.testing.assert_allclose(stats.epochs[row, :num_domains], expected.epochs, atol=1e-12)
            np.testing.assert_allclose(held_out[row, :num_targets], alone.evaluate("test"), atol=1e-12)
            gram, wanted = stats.gradients.gram()[0][row], expected.gradients.gram()[0]
            np.testing.assert_allclose(gram[:num_domains, :num_domains], wanted, rtol=1e-9, atol=1e-12)
            assert not gram[num_domains:].any()


def test_a_list_gives_each_run_its_surface():
    drawn = [FAMILIES["around"].draw(np.random.default_rng(seed)) for seed in range(2)]
    runs, weights = SurrogateTrainer(drawn, horizon=3, batch=(2,), noise=0.0), np.full(17, 1 / 17)
    runs.reset(np.random.default_rng(0))
    runs.step(np.tile(weights, (2, 1)))
    for row, surface in enumerate(drawn):
        alone = SurrogateTrainer(surface, horizon=3, noise=0.0)
        alone.reset(np.random.default_rng(0))
        alone.step(weights)
        np.testing.assert_allclose(runs.evaluate("test")[row], alone.evaluate("test"), rtol=1e-12)


def test_targets_of_padding_weigh_nothing():
    runs = SurrogateTrainer(FAMILIES["made"], horizon=4, batch=(20,))
    runs.reset(np.random.default_rng(0))
    np.testing.assert_allclose(runs.target_weights.sum(-1), 1.0)
    assert (runs.target_weights[runs.mask == 0] == 0).all()


def test_a_new_run_draws_a_new_surface_and_describes_it():
    runs = SurrogateTrainer(FAMILIES["made"], horizon=4)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(5):
        runs.reset(rng)
        seen.add(runs.info.padding)
        real = len(runs.surfaces[0].domains)
        assert runs.info.padding == 24 - real
        assert runs.info.num_domains == 24
        assert runs.info.domains[:real] == runs.surfaces[0].domains
        np.testing.assert_allclose(runs.info.objective_weights[:real], runs.surfaces[0].objective_weights)
        np.testing.assert_array_equal(runs.mask, np.arange(24) < real)
        stats = runs.step(np.full(24, 1 / 24))
        np.testing.assert_allclose(stats.requested, runs.mask / real)
    assert len(seen) > 1


def test_a_familys_run_goes_on_from_its_state():
    def fresh():
        runs = SurrogateTrainer(FAMILIES["made"], horizon=6)
        runs.reset(np.random.default_rng(5))
        runs.measure = frozenset({"losses"})
        return runs

    whole, first, weights = fresh(), fresh(), np.full(24, 1 / 24)
    trace = [whole.step(weights) for _ in range(6)]
    first.step(weights)
    first.step(weights)
    second = fresh()
    second.load_state_dict(first.state_dict())
    for expected in trace[2:]:
        np.testing.assert_array_equal(second.step(weights).losses, expected.losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_domains": (1, 5)}, r"num_domains=\(1, 5\): must be \(fewest, most\) with 2 ≤ fewest ≤ most"),
        ({"num_domains": (6, 5)}, r"num_domains=\(6, 5\)"),
        ({"lengths": (0.0, 1.0)}, r"lengths=\(0.0, 1.0\): must be \(shortest, longest\), both positive"),
        ({"lengths": (2.0, 1.0)}, "lengths"),
        ({"lengths": (1.0, float("inf"))}, "lengths"),
        ({"transfer": -1.0}, "transfer=-1.0: must be"),
        ({"forgetting": float("nan")}, "forgetting=nan"),
        ({"sizes": float("inf")}, "sizes=inf"),
        ({"noise_domains": 1.0}, "noise_domains=1.0: must be a probability below 1"),
        ({"saturating": -0.1}, "saturating=-0.1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Family(around=SHIPPED, **settings)
