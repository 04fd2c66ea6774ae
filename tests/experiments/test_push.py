"""`--push` against a stand-in of the hub: what arrives, what is refused, and that nothing leaves unchecked."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from hub_stand_in import TOKEN, stand_in

from acodm_env.errors import ConfigError, DataError, PolicyError
from acodm_env.experiments import cli
from acodm_env.experiments.policy import export
from acodm_env.experiments.policy.export import POLICY_FILES, ExportConfig
from acodm_env.experiments.publish import export_model
from acodm_env.experiments.publish.export_model import MODEL_FILES, ExportModelConfig
from acodm_env.experiments.publish.policy_card import policy_card
from acodm_env.policy.load import load_policy

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"  # the client's
)
REPO = "me/mixed"
TRAIN = ["--episodes", "2", "--episode_steps", "6", "--steps_per_action", "2", "--batch_size", "6"]
TRAIN += ["--sequence_length", "32", "--evaluate_every", "1", "--quiet"]
TRAIN += ["--agent", '{"learning_starts": 1, "batch_size": 2, "hidden": [8]}']


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def hub(monkeypatch):
    """The stand-in as this process's hub, with a token that may write."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with stand_in() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    sizes = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2", "--quiet"]
    assert acodm("transfer", "--corpus", tiny_corpus, *sizes, "--mixer", "uniform", "--steps", "4", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def learned(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "run"
    assert acodm("train", "--corpus", tiny_corpus, "--out", out, *TRAIN) == 0
    return out


def model(trained, tmp_path, **settings):
    return ExportModelConfig(**({"run": str(trained), "out": str(tmp_path / "out"), "push": REPO} | settings))


def local(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what arrives -----------------------------------------------------------------------------------------


def test_a_model_arrives_bit_for_bit_in_one_commit(trained, tmp_path, hub, capsys):
    export_model.run(model(trained, tmp_path))
    held = hub.repositories[REPO]
    assert held.files == local(tmp_path / "out")
    assert held.files.keys() == {*MODEL_FILES}
    assert held.commits == ["uniform, 768 tokens"]
    assert not held.private
    assert f"pushed: {hub.url}/{REPO}/commit/{held.sha}" in capsys.readouterr().out
    assert f'from_pretrained("{REPO}")' in held.files["README.md"].decode()
    assert TOKEN.encode() not in b"".join(held.files.values())


def test_pushed_again_large_files_are_not_sent_again(trained, tmp_path, hub):
    export_model.run(model(trained, tmp_path))
    export_model.run(model(trained, tmp_path))
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert hub.repositories[REPO].files == local(tmp_path / "out")


@pytest.mark.slow
def test_others_load_it_from_the_hub(trained, tmp_path, hub):
    """In a process that knows nothing of us: transformers, the repository's name, and the hub."""
    export_model.run(model(trained, tmp_path))
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "ids = torch.arange(60).reshape(2, 30)\n"
        "there, here = (AutoModelForCausalLM.from_pretrained(name).eval()(ids).logits for name in sys.argv[1:3])\n"
        "assert torch.equal(there, here)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert tokenizer.decode(tokenizer('alpha 123')['input_ids']) == 'alpha 123'\n"
        "assert 'acodm_env' not in sys.modules\n"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | settings
    done = subprocess.run(
        [sys.executable, "-c", code, REPO, str(trained / "model")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_private(trained, tmp_path, hub):
    export_model.run(model(trained, tmp_path, private=True))
    assert hub.repositories[REPO].private
    export_model.run(model(trained, tmp_path, private=True))
    assert len(hub.repositories[REPO].commits) == 2


def test_private_into_a_public_repository_is_refused(trained, tmp_path, hub):
    export_model.run(model(trained, tmp_path))
    with pytest.raises(ConfigError, match="is there and public"):
        export_model.run(model(trained, tmp_path, private=True))
    assert len(hub.repositories[REPO].commits) == 1


def test_a_policy_is_exported_with_a_card_and_pushed(learned, tmp_path, hub, capsys):
    export.run(ExportConfig(run=str(learned), out=str(tmp_path / "policy"), push="me/policy"))
    held = hub.repositories["me/policy"]
    assert held.files == local(tmp_path / "policy")
    assert held.files.keys() == POLICY_FILES
    assert "/me/policy/commit/" in capsys.readouterr().out
    card, policy = held.files["README.md"].decode(), load_policy(tmp_path / "policy")
    assert policy.fingerprint in card
    assert "| domains | `letters`, `numbers`, `verbs` |" in card
    assert "| algorithm | td3 |" in card
    assert "| learned on | the proxy tiny |" in card
    assert "hf download me/policy --local-dir DIR" in card
    assert all(f"| `{name}` |" in card for name, _ in policy.fields)
    told = b"".join(held.files.values())
    assert b"/store" not in told  # the corpus by its name, not by its path
    assert policy.provenance["config"]["corpus"] == "store"


def test_an_exported_policy_is_pushed_as_it_is(learned, tmp_path, hub):
    folder = tmp_path / "policy"
    export.run(ExportConfig(run=str(learned), out=str(folder), quiet=True))
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("not for others")
    export.run(ExportConfig(policy=str(folder), push="me/policy"))
    assert hub.repositories["me/policy"].files["README.md"] == b"mine"
    assert hub.repositories["me/policy"].files.keys() == POLICY_FILES
    (folder / "README.md").unlink()
    export.run(ExportConfig(policy=str(folder), push="me/policy"))
    assert hub.repositories["me/policy"].files["README.md"].decode() == policy_card(load_policy(folder), "me/policy")


def test_paths_in_an_earlier_versions_policy_stay_here(learned, tmp_path, hub, capsys):
    folder = tmp_path / "policy"
    export.run(ExportConfig(run=str(learned), out=str(folder), quiet=True))
    policy = load_policy(folder)
    config = {**policy.provenance["config"], "corpus": "/home/someone/pile", "proxy": "/home/someone/p/config.json"}
    config |= {"conf_file": "~/mine.yml", "journal": "/home/someone/journal"}
    replace(policy, provenance={**policy.provenance, "config": config}).save(folder)
    (folder / "README.md").write_text("mine")
    before = local(folder)
    export.run(ExportConfig(policy=str(folder), push="me/policy"))
    assert local(folder) == before
    assert "a copy with bare names instead is pushed" in capsys.readouterr().err
    held = hub.repositories["me/policy"].files
    assert held.keys() == POLICY_FILES
    assert held["README.md"] == b"mine"
    assert b"someone" not in b"".join(held.values())
    (tmp_path / "fetched").mkdir()
    for name, content in held.items():
        (tmp_path / "fetched" / name).write_bytes(content)
    fetched = load_policy(tmp_path / "fetched")
    assert fetched.fingerprint == policy.fingerprint
    told = {"corpus": "pile", "proxy": "config.json", "conf_file": "mine.yml", "journal": "journal"}
    assert fetched.provenance["config"] == config | told
    hub.refuse = ("/commit/", 500)
    with pytest.raises(DataError, match=f"{folder} is whole"):
        export.run(ExportConfig(policy=str(folder), push="me/policy"))


# --- what is refused --------------------------------------------------------------------------------------


def test_no_token(trained, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ConfigError, match=r"push=me/mixed: must come with a token that may write; HF_TOKEN is not set"):
        export_model.run(model(trained, tmp_path))
    assert not hub.requests
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["mixed", "me/mixed/x", "me/mi xed", "me/--mixed", ""])
def test_names_that_are_none(repo, trained, tmp_path, hub):
    with pytest.raises(ConfigError, match=f"push={repo}: must be OWNER/NAME on the hub"):
        export_model.run(model(trained, tmp_path, push=repo))
    assert not hub.requests
    assert not (tmp_path / "out").exists()


def test_private_without_push(trained, tmp_path):
    with pytest.raises(ConfigError, match="private=True: must come with --push"):
        export_model.run(model(trained, tmp_path, push=None, private=True))


def test_offline(trained, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set; leave --push out"):
        export_model.run(model(trained, tmp_path))
    assert not hub.requests
    assert not (tmp_path / "out").exists()


def test_no_network(trained, tmp_path, hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    with pytest.raises(DataError, match="cannot be reached"):
        export_model.run(model(trained, tmp_path))
    assert not (tmp_path / "out").exists()


REFUSALS = [
    ("repos/create", 403, "the hub answered 403 .*was not made.*is whole; give HF_TOKEN a token"),
    ("preupload", 401, "the hub answered 401 .*has no new commit"),
    ("/lfs/", 403, "the hub answered 403 .*has no new commit"),
    ("/commit/", 500, "the hub answered 500 .*has no new commit.*; try again"),
]


@pytest.mark.parametrize(("where", "status", "message"), REFUSALS, ids=[where for where, _, _ in REFUSALS])
def test_refused_by_the_server(where, status, message, trained, tmp_path, hub):
    hub.refuse = (where, status)
    with pytest.raises(DataError, match=message):
        export_model.run(model(trained, tmp_path))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not any(held.commits for held in hub.repositories.values())
    hub.refuse = None
    export_model.run(model(trained, tmp_path))
    assert hub.repositories[REPO].files == local(tmp_path / "out")


def test_a_token_that_may_not_write(trained, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(DataError, match="the hub answered 401"):
        export_model.run(model(trained, tmp_path))
    assert not hub.repositories


def test_a_repository_of_others(trained, tmp_path, hub):
    with pytest.raises(DataError, match=r"the hub answered 403 .*rights.*name a repository of yours"):
        export_model.run(model(trained, tmp_path, push="you/mixed"))


def test_nothing_is_pushed_before_the_check_passes(trained, tmp_path, hub):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="cut short"):
        export_model.run(model(tmp_path / "run", tmp_path))
    assert hub.requests == ["GET /"]  # whether it is there at all


def test_an_edited_policy_is_not_pushed(learned, tmp_path, hub):
    folder = tmp_path / "policy"
    export.run(ExportConfig(run=str(learned), out=str(folder), quiet=True))
    contract = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(contract | {"clip": 3.0}))
    with pytest.raises(PolicyError, match="the file was edited"):
        export.run(ExportConfig(policy=str(folder), push="me/policy"))
    assert hub.requests == ["GET /"]


def test_a_policy_that_is_exported_already_is_only_for_pushing():
    with pytest.raises(ConfigError, match="policy=x: must come with --push"):
        ExportConfig(policy="x")


def test_an_export_over_other_files_is_refused_and_over_its_own_is_not(learned, tmp_path):
    config = ExportConfig(run=str(learned), out=str(tmp_path / "policy"), quiet=True)
    export.run(config)
    export.run(config)
    assert local(tmp_path / "policy").keys() == POLICY_FILES
    (tmp_path / "policy" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="already holds other files"):
        export.run(config)
