"""The report's section on evaluations: scores with marks, differences, and silence where nothing was evaluated."""

import html
import re

import pytest
from fake_benchmark import DOMAINS, fake_benchmark, fake_transfer
from fake_evaluation import choice_scores, text_scores

from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.comparison.summary import summarise
from acodm_env.experiments.evaluation.store import Results
from acodm_env.experiments.report.evaluation import evaluation_section


def words(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def section(paths):
    comparison = load(paths)
    return evaluation_section(comparison, summarise(comparison, "cosine"))


def identity(task, **changes):
    return {"task": task, "model_sha256": "m", "tokenizer_sha256": "t", "limit": None, "context": 32, **changes}


def texts(shift):
    return text_scores({domain: [3.0 + shift + 0.01 * i for i in range(25)] for domain in DOMAINS})


def evaluated(folder, shift, share, **changes):
    Results(folder).save(texts(shift), identity("perplexity", **changes), {})
    marks = [float(i % 20 < 20 * share) for i in range(400)]
    Results(folder).save(choice_scores(marks), identity("mmlu", num_fewshot=0), {})


@pytest.fixture
def pair(tmp_path):
    paths = [fake_transfer(tmp_path / mixer, mixer) for mixer in ("uniform", "odm-released")]
    evaluated(paths[0], 0.0, 0.25)
    evaluated(paths[1], -0.1, 0.25)
    return paths


def test_nothing_is_said_where_nothing_was_evaluated(tmp_path):
    assert section([fake_benchmark(tmp_path / "b", seeds=(0, 1))]) == ""


def test_two_runs_of_one_seed_compare_over_items(pair):
    text = words(section(pair))
    for part in (
        "Evaluation By acodm evaluate",
        "perplexity: 75 documents, 1 seed;",
        "against uniform",
        "−0.1000 [−0.1000, −0.1000]",
        "◀ better",
        "mmlu: 400 items, chance 0.25",
        "≈ chance",
        "both at chance: not a comparison",
        "perplexity: perplexity by domain",
        "uniform, mmlu: acc 0.2500",
    ):
        assert part in text, part


def test_several_seeds_compare_over_seeds(tmp_path):
    paths = []
    for mixer, shift in (("uniform", 0.0), ("odm-released", -0.1)):
        for seed in range(3):
            paths.append(fake_transfer(tmp_path / f"{mixer}{seed}", mixer, seed))
            noise = {"uniform": (0, 0, 0), "odm-released": (0.01, 0, -0.01)}[mixer][seed]
            evaluated(paths[-1], shift + noise, 0.6 if mixer == "uniform" else 0.25)
    text = words(section(paths))
    half = 4.302653 * 0.01 / 3**0.5
    assert f"−0.1000 [−{0.1 + half:.4f}, −{0.1 - half:.4f}]" in text
    assert "◀ better" in text
    assert "▶ worse" in text  # mmlu: from 0.6 to chance
    assert "perplexity: 75 documents, 3 seeds;" in text
    assert "mixer seeds" not in text
    (paths[-1] / "evaluation.json").unlink()
    text = words(section(paths))
    assert "mixer seeds bits/byte" in text
    assert "uniform 3" in text
    assert "odm-released 2" in text


def test_results_of_other_conditions_have_a_table_of_their_own_that_says_which(pair):
    Results(pair[1]).save(texts(-0.1), identity("perplexity", corpus_fingerprint="f" * 64, model_sha256="n"), {})
    text = words(section(pair))
    assert "perplexity: 75 documents" in text
    assert "perplexity (corpus fingerprint ffffffffffff): 75 documents" in text
    assert "perplexity (corpus fingerprint ffffffffffff): the corpus is ffffffffffff" in text
    assert "◀ better" not in text


def test_results_are_joined_by_what_was_asked_not_by_their_names(tmp_path):
    paths = [fake_transfer(tmp_path / mixer, mixer) for mixer in ("uniform", "odm-released")]
    sizes = {8: 0.5, 16: 0.2}
    for path, shift, order in zip(paths, (0.0, -0.1), ((8, 16), (16, 8)), strict=True):
        for stride in order:
            settings = identity("perplexity", stride=stride, model_sha256=path.name, tokenizer_sha256="t")
            name = Results(path).save(texts(shift + sizes[stride]), settings, {})
        assert name == "perplexity-2"
    text = words(section(paths))
    assert text.count("◀ better") == 6
    assert text.count("−0.1000 [−0.1000, −0.1000]") == 2
    assert "perplexity (stride 8): 75 documents" in text
    assert "perplexity (stride 16): 75 documents" in text


def test_unequal_items_are_not_compared_and_the_section_says_why(pair):
    scores = choice_scores([1.0] * 400, max_gen_toks=8)
    Results(pair[1]).save(scores, identity("mmlu", num_fewshot=0), {})
    assert "not of equal items (mmlu with max_gen_toks=None as uniform has" in words(section(pair))


def test_each_verdict_stands_with_its_metric(tmp_path):
    paths = [fake_transfer(tmp_path / mixer, mixer) for mixer in ("uniform", "odm-released")]
    losses = {"uniform": [3.0, 3.0], "odm-released": [2.0, 3.5]}  # lower mean, higher perplexity
    for path in paths:
        values = dict(zip(DOMAINS, ([loss] * 25 for loss in losses[path.name]), strict=False))
        Results(path).save(text_scores(values), identity("perplexity"), {})
    page = section(paths)
    heads = re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", page)
    against = "against uniform"
    assert heads[:7] == ["mixer", "bits/byte", against, "loss, nats/token", against, "perplexity", against]
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page) if "odm-released" in row)
    cells = [words(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)]
    assert [cell.split()[-1] for cell in cells[2::2]] == ["better", "better", "worse"]


def test_a_trial_is_called_one(pair):
    Results(pair[0]).save(choice_scores([1.0]), identity("mmlu", num_fewshot=0, limit=1), {})
    page = section(pair)
    assert "trial: mmlu-limit1: 1 item, chance 0.25" in words(page)
    assert 'aria-label="trial: mmlu-limit1' in page
    assert "trial: perplexity" not in page


def test_a_file_that_is_not_whole_is_said(pair):
    (pair[0] / "evaluation.json").write_text("{")
    text = words(section(pair))
    assert "uniform, seed 0: evaluation.json cannot be read" in text
    assert "odm-released" in text


def test_names_are_escaped_and_the_whole_page_holds_the_section(pair):
    pytest.importorskip("plotly", reason="plotly is not installed")
    from acodm_env.experiments.report.command import render

    scores = choice_scores([1.0, 0.0], name="<b>acc</b>")
    Results(pair[0]).save(scores, identity("odd"), {})
    page = render(load(pair))
    assert "<h3>Evaluation</h3>" in page
    assert "<b>acc</b>" not in page
