"""The README says what is true: its commands parse, its code runs, its figures are filled in."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from acodm_env.experiments.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def command_lines():
    """Every `acodm …` line of the pages, continuation lines joined, without comments."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
        lines = re.findall(r"^ {4,8}(?:\S*/)?acodm (.+)$", text, flags=re.MULTILINE)
        lines += re.findall(r"^(?:\S*/)?acodm (.+)$", fenced, flags=re.MULTILINE)
        lines += re.findall(r"(?:torchrun|accelerate launch) .*-m acodm_env (.+?)(?: SETTINGS.*)?$", text, re.MULTILINE)
        for line in lines:
            yield pytest.param(shlex.split(line.rstrip("`| ,"), comments=True), id=line[:60])


@pytest.mark.parametrize("arguments", list(command_lines()))
def test_every_command_line_of_the_pages_exists(arguments):
    command, flags = arguments[0], [a for a in arguments[1:] if a.startswith("--")]
    assert command in COMMANDS
    place, config, _ = COMMANDS[command]
    known = fields(getattr(import_module(f"acodm_env.experiments.{place}"), config))
    settings = {field.name for field in known} | {f"no_{field.name}" for field in known if field.type in (bool, "bool")}
    assert {flag[2:].partition("=")[0].replace("-", "_") for flag in flags} <= settings | {"config"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_left_open_and_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_examples_are_short_and_compile():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        compile(block, "README.md", "exec")
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=["gym", "sb3", "own loop"])
def test_examples_run(block, tmp_path):
    """On the pocket corpus, as a newcomer would; a minute or two each."""
    subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path, timeout=600)
