"""Downstream tasks: prompts equal the harness's own, and answers are read and counted right."""

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import DATA, published
from evaluation_runs import AlwaysOne, lend, run

from acodm_env.errors import DataError
from acodm_env.experiments.evaluation.harness import run as harness
from acodm_env.experiments.evaluation.harness import task_names as harness_tasks
from acodm_env.experiments.evaluation.harness.local_data import read_mmlu
from acodm_env.experiments.evaluation.scores import AT
from acodm_env.pretrain.models import build_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


TASKS = Path(lm_eval.__file__).parent / "tasks"


def requests_of(task: Any, num_fewshot: int, limit: int) -> list[tuple[str, str]]:
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


# --- prompts -----------------------------------------------------------------------------------------------


@published
@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_mmlu_prompts_equal_the_harness_own(tmp_path: Path, num_fewshot: int) -> None:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    mmlu = read_mmlu(DATA)
    subjects = sorted(mmlu.test)[::6]  # 10 of the 57, two questions of each
    configs = harness_tasks.inline_mmlu(mmlu, subjects, tmp_path)
    ours = harness_tasks._load(configs)["tasks"]
    compared = 0
    for subject, config in zip(subjects, configs, strict=True):
        own = load_yaml(TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml", resolve_func=True)
        assert own.pop("dataset_name") == subject
        source = {"dataset_path": "json", "dataset_kwargs": config["dataset_kwargs"]}
        theirs = ConfigurableTask(config={key: own[key] for key in own if key != "tag"} | source)
        mine = ours[f"mmlu_{subject}"]
        expected = requests_of(theirs, num_fewshot, 2)
        assert requests_of(mine, num_fewshot, 2) == expected
        assert mine.config.metric_list == theirs.config.metric_list
        assert expected[0][0].count("\nAnswer:") == num_fewshot + 1
        compared += len(expected) // 4
    assert compared == 20


@published
def test_every_subject_is_described_as_the_harness_describes_it(tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    template = harness_tasks._template("mmlu")["description"]
    for subject in read_mmlu(DATA).test:
        own = load_yaml(TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml", resolve_func=False)
        assert apply_template(template, {"subject": subject}) == apply_template(own["description"], {})


# --- scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_mmlu_end_to_end(loaded: Any, small: Path, num_fewshot: int) -> None:
    seen: list[tuple[str, int, int]] = []
    scores, notes = run(loaded, "mmlu", small, num_fewshot=num_fewshot, on_progress=lambda *now: seen.append(now))
    assert [metric.group for metric in scores.metrics] == ["", "anatomy", "world_religions"]
    assert [metric.num_items for metric in scores.metrics] == [12, 6, 6]
    assert {metric.chance for metric in scores.metrics} == {0.25}
    assert {metric.constant for metric in scores.metrics} == {2 / 6}
    assert [item["id"] for item in scores.items[5:8]] == ["anatomy/5", "world_religions/0", "world_religions/1"]
    assert [item["answer"] for item in scores.items] == [0, 1, 2, 3, 0, 1] * 2
    for item in scores.items:
        assert item["acc"] == float(item["predicted"] == item["answer"])
    assert scores.metrics[0].value == pytest.approx(np.mean([item["acc"] for item in scores.items]))
    facts = scores.facts
    assert (facts["num_fewshot"], facts["limit"], facts["num_items"]) == (num_fewshot, None, 12)
    assert facts["dataset"] == harness.data_checksums("mmlu", small) == read_mmlu(small).files
    assert facts["harness_version"] == harness.harness_version() == "0.4.13" or facts["harness_version"]
    assert facts["complete"] is False
    assert any("2 subjects, 4 dev, 12 test" in note for note in notes)
    assert seen[-1] == ("mmlu", 12, 12)
    assert facts["num_truncated"] == (12 if num_fewshot else facts["num_truncated"])
    assert facts["prompt_tokens"] == 128
    assert num_fewshot == 0 or any("12 of 12 prompts exceed the context of 128 tokens" in note for note in notes)


def test_answers_equal_a_slow_reference(loaded: Any, small: Path) -> None:
    """The likeliest letter by one forward pass a question and letter, of a context that holds every prompt."""
    model = build_model("tiny", len(loaded.tokenizer), 512, seed=1).eval().requires_grad_(False)
    wide = lend(model, loaded.tokenizer, context=512)
    scores, _ = run(wide, "mmlu_anatomy", small, num_fewshot=1)
    assert scores.facts["num_truncated"] == 0
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    choices = "A. w\nB. x\nC. y\nD. z\nAnswer:"
    for item in scores.items:
        prompt = f"{head}q0\n{choices} A\n\nq{item['id'].partition('/')[2]}\n{choices}"
        values = []
        for letter in "ABCD":
            begin, ids = (loaded.tokenizer.encode(text) for text in (prompt, f"{prompt} {letter}"))
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
            values.append(sum(float(logs[place - 1, ids[place]]) for place in range(len(begin), len(ids))))
        assert item["predicted"] == int(np.argmax(values))


def test_logits_of_prompts_are_not_missed(loaded: Any) -> None:
    """Only the last positions' logits are asked for; answers and rows of all lengths score the same."""
    from lm_eval.api.instance import Instance

    from acodm_env.experiments.evaluation.harness.model import HarnessModel

    pairs = [("run walk sit " * size, " alpha" * (1 + size % 3)) for size in range(1, 9)]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("t", place, 1))
        for place, pair in enumerate([*pairs, ("", " beta")])
    ]
    sparing, plain = (HarnessModel(loaded, batch_size=3) for _ in range(2))
    widths: list[int] = []
    forward = loaded.model.forward
    plain._accepts = {}  # type: ignore[assignment]
    expected = plain.loglikelihood(requests)
    sparing._model = lambda ids, **settings: (widths.append(settings["logits_to_keep"]), forward(ids, **settings))[1]
    found = sparing.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert np.allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-5)
    assert max(widths) < 40
    text = ("alpha beta " * 90,)
    rolling = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=text, idx=0, metadata=("t", 0, 1))]
    assert sparing.loglikelihood_rolling(rolling) == pytest.approx(plain.loglikelihood_rolling(rolling), rel=1e-5)


class Watched(torch.nn.Module):
    """A model that notes its batches and the largest of their tensors, in numbers."""

    def __init__(self, model: Any, keeps: bool):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.seen: list[tuple[int, int]] = []
        if not keeps:
            self.forward = self.whole  # type: ignore[method-assign]

    def tie_weights(self) -> None:
        """Nothing to tie."""

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, ids: torch.Tensor, logits_to_keep: int = 0) -> Any:
        found = self.model(ids, logits_to_keep=logits_to_keep)
        widest = ids.numel() * 4 * self.config.hidden_size
        self.seen.append((len(ids), max(found.logits.numel(), widest)))
        return found

    def whole(self, ids: torch.Tensor) -> Any:
        return Watched.forward(self, ids)


@pytest.mark.parametrize("keeps", [True, False])
def test_automatic_batches_count_what_is_made(
    loaded: Any, small: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    from acodm_env.experiments.evaluation.harness import model as harness_model

    budget = 4 * (4 * 128 * 4 * 64)  # bytes of four prompts' activations; a prompt's logits would be 128 * 300 numbers
    monkeypatch.setattr(harness_model, "_BUDGET_BYTES", {"cpu": budget})
    model = Watched(loaded.model, keeps)
    scores, _ = run(lend(model, loaded.tokenizer, context=128), "mmlu", small, batch_size=None, num_fewshot=2)
    assert max(numbers for _, numbers in model.seen) <= budget // 4
    assert max(rows for rows, _ in model.seen) == (4 if keeps else 2)
    expected, _ = run(loaded, "mmlu", small, num_fewshot=2)
    assert scores.items == expected.items


def test_rows_that_fit_by_hand(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from acodm_env.experiments.evaluation.harness import model as harness_model

    config, vocabulary = loaded.model.config, loaded.model.config.vocab_size
    monkeypatch.setattr(harness_model, "_BUDGET_BYTES", {"cpu": 4 * vocabulary * 100})
    monkeypatch.setattr(harness_model, "_numbers_per_token", lambda loaded: (0, vocabulary))

    def fit(lengths: list[int], **settings: Any) -> int:
        return harness_model.fitting_rows(loaded, lengths, **settings)

    assert config.hidden_size > 0
    assert fit([10] * 64, answer=1) == 64  # 64 positions
    assert fit([10] * 64, answer=3) == 32  # 96
    assert fit([10] * 64, answer=1, keeps=False) == 8  # 80
    assert fit([10] * 3, answer=30, keeps=False) == 64  # 30, of three rows
    assert fit([99, 1], answer=1) == 1  # 99 each: the shorter is padded
    assert fit([10] * 64, answer=1, completion=15) == 4  # a cache of 25 tokens each
    assert fit([1000], answer=1, keeps=False) == 1
    assert fit([], answer=1) == 64
    monkeypatch.setattr(harness_model, "_numbers_per_token", lambda loaded: (vocabulary, 0))
    assert fit([10] * 64, answer=1) == 8  # activations as wide as logits, of whole rows


def test_the_tokenizer_is_not_heard_on_long_prompts(loaded: Any, small: Path) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.model_max_length = 8
    logger.addHandler(handler)
    try:
        run(lend(loaded.model, tokenizer, context=128), "mmlu_anatomy", small)
        assert heard == []
        tokenizer.encode("run walk sit " * 9)
        assert len(heard) == 1
    finally:
        logger.removeHandler(handler)


def test_limit_and_batch_size_change_no_answer(loaded: Any, small: Path) -> None:
    whole, _ = run(loaded, "mmlu", small)
    part, _ = run(loaded, "mmlu", small, limit=2, batch_size=None)
    wanted = {item["id"]: item for item in whole.items}
    assert len(part.items) == 4  # two of each subject, as the harness counts
    assert all(wanted[item["id"]] == item for item in part.items)
    assert part.facts["limit"] == 2


@published
def test_always_the_same_letter_is_not_distinguishable_from_chance(loaded: Any) -> None:
    token = loaded.tokenizer.encode("Answer: A")[-1]
    fake = lend(AlwaysOne(loaded.model, token), loaded.tokenizer, context=64)
    scores, _ = run(fake, "mmlu", DATA, limit=2)
    assert {item["predicted"] for item in scores.items} == {0}
    whole = scores.metrics[0]
    assert whole.num_items == 2 * 57
    assert whole.value == np.mean([item["answer"] == 0 for item in scores.items])
    assert whole.verdict == AT
    assert len(scores.metrics) == 58


def test_a_diverged_model_is_refused(loaded: Any, small: Path) -> None:
    fake = lend(AlwaysOne(loaded.model, 0, value=float("nan")), loaded.tokenizer, context=64)
    with pytest.raises(DataError, match="must be finite"):
        run(fake, "mmlu", small)


def test_nothing_is_left_behind(loaded: Any, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore  # noqa: NPY002
    padding, side = loaded.tokenizer.pad_token, loaded.tokenizer.padding_side
    run(loaded, "mmlu", small)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.padding_side) == (padding, side)
    assert capfd.readouterr() == ("", "")
