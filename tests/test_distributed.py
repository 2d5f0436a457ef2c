"""Two processes under torchrun, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import gpt

FLAGS = ["--data", "data/text", "--block_size", "32", "--dtype", "float32", "--log_interval", "1"]


def train(n_processes, *flags):
    """Runs train.py as a user does, one process without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    command = [sys.executable, *(torchrun if n_processes > 1 else []), ROOT / "train.py", *FLAGS, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def log(name):
    return [json.loads(line) for line in Path("out", name, "log.jsonl").read_text().splitlines()]


@pytest.fixture
def runs(data):
    """The same five steps by one process with four micro-batches, and by two with two each."""
    flags = ["--max_steps", 5, "--batch_size", 2, "--global_batch_size", 8]
    one, two = train(1, "--out", "out/one", *flags), train(2, "--out", "out/two", *flags)
    assert one.returncode == two.returncode == 0, two.stderr
    return one, two


def test_two_ranks_train_the_same_model_as_one_process(runs):
    one, two = (gpt.load_checkpoint(f"out/{name}/last.pt")[0].state_dict() for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5, rtol=0), name


def test_two_ranks_report_the_losses_of_one_process_and_once(runs):
    assert len(log("one")) == len(log("two")) == 6
    for one, two in zip(log("one"), log("two"), strict=True):
        loss = "val_loss" if "val_loss" in one else "loss"
        assert one["step"] == two["step"] and one[loss] == pytest.approx(two[loss], abs=1e-5)
    one, two = ([line.split("|")[0] for line in run.stdout.splitlines() if "|" in line] for run in runs)
    assert one == two
    assert "2 processes x 2 micro-batches x 2 windows = 256 ids" in runs[1].stdout


def test_two_ranks_end_on_a_users_mistake_without_a_traceback_of_ours(data):
    result = train(2, "--global_batch_size", 7)
    assert result.returncode != 0
    assert "error: rank 1: --global_batch_size 7 is not a multiple of 2, the number of" in result.stderr
    assert "train.py\", line" not in result.stderr
