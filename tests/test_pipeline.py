"""The whole chain, as a user types it, on a small share of the data."""

import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, log

import prepare
import sample
import train


def shell(line):
    """Runs a line as it stands in the README, with the scripts of this checkout; returns what it printed."""
    words = [str(ROOT / word) if word in ("prepare.py", "train.py", "sample.py") else word
             for word in shlex.split(line)]
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    result = subprocess.run([*program[words[0]], *words[1:]], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_text_becomes_tokens_becomes_weights_becomes_text():
    assert "data/python: 12 documents" in shell("python prepare.py --sample_size 12")
    trained = shell("torchrun --standalone --nproc_per_node=2 train.py --max_steps 4 --batch_size 2 "
                    "--global_batch_size 4 --eval_sequences 8")
    assert "training nano on cpu" in trained and trained.count("validation loss") == 1
    assert {path.name for path in Path("out/python").iterdir()} == {
        ".lock", "best.pt", "last.pt", "log.jsonl", "curves.png"}
    assert "step 5/5 | validation loss" in shell("python train.py --resume --max_steps 5")
    assert shell('python sample.py --prompt "def " --max_new_tokens 20').startswith("def ")


def test_each_program_explains_its_flags(capsys):
    for program in (prepare, train, sample):
        with suppress(SystemExit):      # torch's record returns on a status of 0
            program.main(["--help"])
        explained = capsys.readouterr().out
        assert "(default: " in explained
        assert not re.search(r"default: (None|\[)|SUPPRESS", explained)


def test_the_first_100_steps_are_those_that_were_measured(monkeypatch):
    """Where nothing else fails, a change has altered what is learned: measure the quickstart again."""
    monkeypatch.setattr(train, "show_sample_and_curves", lambda run: None)
    Path("text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    prepare.prepare(["text.txt"], "data/text", "bpe", 400)
    train.main(["--data", "data/text", "--model", "nano", "--dtype", "float32", "--batch_size", "4",
                "--global_batch_size", "4", "--max_steps", "100", "--log_interval", "20"])
    losses = [row["loss"] for row in log() if "loss" in row]
    assert losses == pytest.approx([6.0117, 3.9368, 3.3440, 3.4003, 3.0572, 2.6661], rel=0.01)
