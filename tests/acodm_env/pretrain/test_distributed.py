"""Two processes do what one does: DDP and FSDP2, on gloo."""

import json
import time

import numpy as np
import pytest
import two_ranks

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.leader import Led
from acodm_env.pretrain.trainer import EXCHANGED_BYTES

RUNS = {"ddp": {"accumulation": 2}, "fsdp": {"parallel": "fsdp", "gradient_checkpointing": True}}
EXACT = ("counts", "drawn", "lr", "requested")


@pytest.fixture(scope="module")
def many_domains(tmp_path_factory):
    """A store of 22 domains."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    with (root / "data.jsonl").open("w") as file:
        for domain in range(22):
            for _ in range(30):
                text = " ".join(str(n) for n in rng.integers(100 * domain, 100 * domain + 100, size=30)) + "\n"
                file.write(json.dumps({"text": text, "domain": f"d{domain}"}) + "\n")
    source = Source(name=str(root / "data.jsonl"), domain_field="domain")
    prepare(Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:300"), root / "store")
    return root / "store"


@pytest.fixture(scope="module")
def one(tiny_store):
    """What one process does."""
    trainer = two_ranks.trainer_of(tiny_store)
    led = Led(trainer)
    record = two_ranks.play(led)
    return record | {"rows": trainer.rows, "closed": two_ranks.closed_loop(led)}


@pytest.fixture(scope="module")
def two(one, tiny_corpus, many_domains, tmp_path_factory):
    """What two processes do: one record per rank."""
    folder = tmp_path_factory.mktemp("two")
    write_state(folder / "one.safetensors", one["saved"])
    done = two_ranks.launch("check", folder, corpus=str(tiny_corpus), many=str(many_domains), runs=RUNS)
    assert done.returncode == 0, done.stderr
    return [read_state(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_draws_are_those_of_one_process(one, two, run):
    record = two[0][run]
    for name in EXACT:
        np.testing.assert_array_equal(record[name], one[name], err_msg=name)
    for name in ("loss", "losses", "grad_norm", "layers", "validation", "test"):
        np.testing.assert_allclose(record[name], one[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("run", RUNS)
def test_ranks_train_on_disjoint_rows_of_the_same_batch(one, two, run):
    parts = [rank[f"{run}-rows"] for rank in two]
    assert parts[0].shape == parts[1].shape
    for step, batch in enumerate(one["rows"]):
        micro = len(parts[0]) // two_ranks.STEPS
        together = np.concatenate([part[micro * step : micro * (step + 1)].reshape(-1, 32) for part in parts])
        assert sorted(map(bytes, together)) == sorted(map(bytes, batch))


@pytest.mark.parametrize("run", RUNS)
def test_the_gram_matrix_is_that_of_one_process(one, two, run):
    for name in ("gram", "noise"):
        theirs = two[0][run][name]
        np.testing.assert_allclose(theirs, one[name], rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(one[name])))


@pytest.mark.parametrize("run", RUNS)
def test_resuming_on_as_many_processes_is_bit_equal(two, run):
    whole, resumed = two[0][run], two[0][f"{run}-resumed"]
    for name in ("loss", "losses", "counts", "grad_norm", "gram"):
        np.testing.assert_array_equal(resumed[name], whole[name][two_ranks.SAVED_AT :], err_msg=name)
    assert_same_state(resumed["final"], whole["final"], exactly=True)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_one_process_goes_on_with_two_and_back(one, two, tiny_store, run):
    on_two = two[0][f"{run}-from-one"]
    on_one = two_ranks.play(two_ranks.trainer_of(tiny_store), two[0][run]["saved"])
    for record in (on_two, on_one):
        for name in ("counts", "drawn", "lr"):
            np.testing.assert_array_equal(record[name], one[name][two_ranks.SAVED_AT :], err_msg=name)
        np.testing.assert_allclose(record["loss"], one["loss"][two_ranks.SAVED_AT :], rtol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_checkpoints_of_any_number_of_processes_are_the_same(one, two, run):
    assert_same_state(two[0][run]["final"], one["final"], exactly=False)


def assert_same_state(mine, theirs, *, exactly):
    np.testing.assert_equal(mine["sampler"], theirs["sampler"])
    assert mine["step"] == theirs["step"] == two_ranks.STEPS
    assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for kind, entries in (("model", mine["model"]), ("snapshot", mine["snapshot"])):
        assert entries.keys() == theirs[kind].keys()
        for name, array in entries.items():
            # 2e-5: other sums alone move weights by 1e-5, most of all key biases, whose gradient is 0 but for rounding
            np.testing.assert_allclose(array, theirs[kind][name], rtol=0, atol=0 if exactly else 2e-5, err_msg=name)
    assert mine["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for key, entry in mine["optimizer"]["state"].items():
        for name, array in entry.items():
            other = theirs["optimizer"]["state"][key][name]
            assert array.shape == other.shape
            np.testing.assert_allclose(array, other, rtol=0, atol=0 if exactly else 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_in_closed_loop_the_mixtures_stay_within_2e_5(one, two, run):
    """Losses differ by 1e-7, so the mixtures do too; both are rounded to 1e-6 before they are used."""
    mixtures = two[0][f"{run}-closed"]
    assert np.ptp(mixtures, axis=0).max() > 0.05  # it moved
    np.testing.assert_allclose(mixtures, one["closed"], rtol=0, atol=2e-5)


def test_a_step_with_22_domains_exchanges_at_most_a_mebibyte(two):
    """The three layers' sketches, losses and the command."""
    assert 0.9 * EXCHANGED_BYTES < two[0]["bytes"] <= EXCHANGED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        ("die", 1, ["rank 0 of 2: another process of the run ended (step 2, step: Connection", "exitcode  : -9"]),
        ("die", 0, ["rank 1 of 2: another process of the run ended", "exitcode  : -9"]),
        ("raise", 1, ["ValueError: a deliberate failure", "rank 0 of 2: another process of the run ended"]),
        ("raise", 0, ["ValueError: a deliberate failure", "rank 1 of 2: another process of the run ended"]),
        ("decide", 0, ["ValueError: a deliberate failure of the mixer"]),
    ],
)
def test_a_process_that_ends_too_early_ends_the_run_with_its_reason(tiny_corpus, tmp_path, how, rank, said):
    started = time.monotonic()
    done = two_ranks.launch("fail", tmp_path, corpus=str(tiny_corpus), how=how, rank=rank, timeout=60)
    assert done.returncode != 0
    assert time.monotonic() - started < 45  # two interpreters start in that time too
    for text in said:
        assert text in done.stderr


@pytest.mark.slow
def test_pre_emption_leaves_the_others_to_process_0(tiny_corpus, tmp_path):
    done = two_ranks.launch("fail", tmp_path, corpus=str(tiny_corpus), how="preempt", rank=1)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"parallel": "fsdp"}, {"gradient_checkpointing": True, "accumulation": 3}])
def test_compiled_runs_are_those_of_one_process(one, tiny_corpus, many_domains, tmp_path, options):
    write_state(tmp_path / "one.safetensors", one["saved"])
    runs = {"compiled": options | {"compile": True, "compile_backend": "aot_eager"}}
    done = two_ranks.launch("check", tmp_path, corpus=str(tiny_corpus), many=str(many_domains), runs=runs)
    assert done.returncode == 0, done.stderr
    record = read_state(tmp_path / "rank0.safetensors")["compiled"]
    np.testing.assert_allclose(record["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(record["gram"], one["gram"], rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(one["gram"])))
