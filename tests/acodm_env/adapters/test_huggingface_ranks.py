"""`MixtureTrainer` on two processes (gloo): the draws and losses of a single one."""

import json
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, os, sys
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from acodm_env.adapters.huggingface import MixtureTrainer
from acodm_env.corpus.tokens import TokenStore
from acodm_env.trainer import Mixer


class Tilting(Mixer):
    name = "tilting"
    needs = frozenset({"losses"})

    def start(self, info):
        super().start(info)
        self.seen = []

    def weights(self):
        tilted = 1.0 + np.roll([3.0, 0.0, 1.0], len(self.seen))
        return tilted / tilted.sum()

    def update(self, stats):
        self.seen.append(stats)

    def state_dict(self):
        return {"num": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [None] * state["num"]


corpus, out, micro, resume = sys.argv[1:]
store = TokenStore.open(corpus)
torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT2LMHeadModel(GPT2Config(
    vocab_size=store.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=32,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
))
args = TrainingArguments(
    out, max_steps=8, per_device_train_batch_size=int(micro), gradient_accumulation_steps=2, learning_rate=1e-2,
    use_cpu=True, save_steps=3, seed=5, disable_tqdm=True,
)
trainer = MixtureTrainer(model=model, args=args, store=store, mixer=Tilting(), sequence_length=32)
trainer.train(resume_from_checkpoint=resume or None)
seen = [stats for stats in trainer.mixed_data.mixer.seen if stats is not None]
if args.process_index == 0:
    record = {
        "world": args.world_size,
        "counts": [stats.counts.tolist() for stats in seen],
        "drawn": [stats.drawn.tolist() for stats in seen],
        "losses": [np.nan_to_num(stats.losses).tolist() for stats in seen],
        "weights": [parameter.sum().item() for parameter in trainer.model.parameters()],
    }
    with open(os.path.join(out, "record.json"), "w") as file:
        json.dump(record, file)
"""


def launch(folder, corpus, world, micro, resume=""):
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, str(script), str(corpus), str(folder), str(micro), resume]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "record.json").read_text())


@pytest.mark.slow
def test_two_processes_draw_and_learn_as_one(tiny_corpus, tmp_path):
    one = launch(tmp_path / "one", tiny_corpus, world=1, micro=4)
    two = launch(tmp_path / "two", tiny_corpus, world=2, micro=2)
    assert (one["world"], two["world"]) == (1, 2)
    assert one["drawn"] == two["drawn"]
    assert one["counts"] == two["counts"]
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    resumed = launch(tmp_path / "resumed", tiny_corpus, 2, 2, resume=str(tmp_path / "two" / "checkpoint-3"))
    assert resumed["drawn"] == two["drawn"][3:]
    assert resumed["losses"] == two["losses"][3:]
    assert resumed["weights"] == two["weights"]
