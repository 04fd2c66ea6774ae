import json
from pathlib import Path

import pytest

from acodm_env.errors import DataError
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.run_log import EvaluationLine, StepLine, first_step, read_log
from log_lines import step_line

TOLD = {"loss_weights": [1.0, 2.0], "losses": [None, 2.0], "seconds_by_part": {"train": 0.5}}
LINES = [step_line(step, **TOLD, diagnostics={"reward": 1.0}) for step in (1, 2, 3)]


def written(folder: Path, text: str) -> Path:
    (folder / StepLine.log).write_text(text)
    return folder


def test_lines_come_back_as_they_were(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    evaluation = EvaluationLine(step=2, losses=[1.0, None], targets=["a", "b"], seconds=0.25)
    for line in (*LINES, evaluation):
        folder.append(line)
    assert (folder.steps, folder.evaluations) == (LINES, [evaluation])
    assert first_step(folder.path) == LINES[0]
    record = json.loads((folder.path / "stats.jsonl").read_text().splitlines()[0])
    assert (record["seconds_train"], record["reward"]) == (0.5, 1.0)  # flat in the file
    folder.rewind(2)
    assert [line.step for line in folder.steps] == [1, 2]


def test_what_an_interruption_cut_short_is_no_line(tmp_path):
    whole = "".join(json.dumps(line.record()) + "\n" for line in LINES)
    assert read_log(written(tmp_path, whole + '{"step": 4, "tok'), StepLine) == LINES
    assert read_log(written(tmp_path, '{"step": 1, "tok'), StepLine) == []
    assert first_step(tmp_path) is None
    assert read_log(tmp_path / "nowhere", StepLine) == []


@pytest.mark.parametrize("damaged", ['{"step": 2, "tok', "[1]", "2", "{}", '{"step": 2}', "\x00"])
def test_a_damaged_line_is_named_and_never_the_end_of_the_log(tmp_path, damaged):
    lines = [json.dumps(line.record()) for line in LINES]
    lines[1] = damaged
    with pytest.raises(DataError, match=r"stats\.jsonl, line 2: must be a whole line of a run's log"):
        read_log(written(tmp_path, "\n".join(lines) + "\n"), StepLine)
