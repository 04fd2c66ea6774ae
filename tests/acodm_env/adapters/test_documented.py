"""The code of docs/how-to/your-own-loop.md runs as it stands, and is short."""

import re
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "your-own-loop.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_usage_takes_at_most_fifteen_lines(block):
    assert len(block.strip().splitlines()) <= 15


def test_the_documented_code_runs(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "mine").symlink_to(tiny_corpus)
    names = {}
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["data"].mixer.weights().shape == (3,)
    assert names["stats"].step == 20
    assert names["step"] == 9
    assert names["dataset"].weights.argmax() == list(names["store"].domains).index("verbs")
    assert names["trainer"].state.global_step == 20
    data = names["trainer"].mixed_data.state_dict()["loader"]
    assert (data["given"], sum(data["sampler"]["cursors"])) == (20, 20 * 16)
    last = tmp_path / "runs" / "trainer" / "checkpoint-20"
    assert (last / "trainer_state.json").is_file()
    shutil.rmtree(last)  # as if it had been killed at step 15
    names["trainer"].train(resume_from_checkpoint=True)
    assert names["trainer"].state.global_step == 20
    data = names["trainer"].mixed_data.state_dict()["loader"]
    assert (data["given"], sum(data["sampler"]["cursors"])) == (20, 20 * 16)
