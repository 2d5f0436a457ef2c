"""What a run says before it begins: its size, its cost, and what is unusual about it."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ranks, run

import gpt
import train


@pytest.fixture
def foretold(data, capsys):
    """foretold(flag, ...) is what a dry run prints."""
    def dry_run(*flags):
        train.main([*QUICK, "--out", "out/text", *map(str, flags), "--dry_run"])
        return capsys.readouterr().out
    return dry_run


def test_a_dry_run_reports_the_size_the_cost_and_the_time_and_writes_nothing(foretold, tiny):
    says = foretold("--max_steps", 200)
    assert re.match(r"training tiny on cpu in float32 \(.* GPU available\); nothing is written\n", says)
    assert not Path("out").exists()
    assert f"{gpt.GPT(tiny).num_params():,} parameters; data/text: 112 sequences of 16 tokens\n" in says
    assert "64 tokens per step: 1 (processes) x 1 (micro-batches) x 4 (sequences) x 16\n" in says
    assert "\n200 steps, 7.14 epochs\n" in says
    assert re.search(r"\n[\d,]+ tokens/s; \d+s for the steps left, .*; at least [\d.]+ GB in each process\n$",
                     says)


def test_the_same_lines_head_the_run(foretold, capsys):
    says = foretold("--max_steps", 2).splitlines()
    run("--max_steps", 2)
    assert capsys.readouterr().out.splitlines()[1:4] == says[1:4]


def test_a_dry_run_leaves_a_run_as_it_is_and_reports_what_is_left_of_it(foretold):
    run("--max_steps", 2)
    before = {path: path.read_bytes() for path in Path("out/text").iterdir()}
    assert "9 steps" in foretold("--max_steps", 9)
    assert "9 steps, 0.32 epochs, 2 of them done" in foretold("--max_steps", 9, "--resume")
    assert before == {path: path.read_bytes() for path in Path("out/text").iterdir()}


def test_a_run_whose_threads_would_wait_for_busy_cores_says_how_to_use_one(foretold, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for load, busy in ((1.9, False), (2.1, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        says = "the cores have been busy: if this is slow, put OMP_NUM_THREADS=1 before python"
        assert (says in foretold("--max_steps", 2)) == busy


PEAK = "\ntrain.World.close = lambda world: print(train.peak_memory(world.device))\n"


def test_the_memory_it_foretells_is_that_of_the_run(data):
    # Of processes of their own, as it is a process's peak.
    flags = ["--data", data, "--n_layer", 2, "--n_embd", 512, "--block_size", 64, "--global_batch_size", 8,
             "--dtype", "float32", "--max_steps", 3, "--optimizer", "adamw", "--out", "out/text"]
    [dry] = ranks(1, *flags, "--dry_run")
    foretold = float(re.search(r"([\d.]+) GB in each process", dry.stdout)[1]) * 1e9
    [run] = ranks(1, *flags, first=PEAK)
    assert foretold == pytest.approx(int(run.stdout.split()[-1]), rel=0.15)
