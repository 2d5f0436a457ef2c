"""What a run says before it begins: its size, its cost, and what is unusual about it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUICK, log, ranks, run
from torch.utils.flop_counter import FlopCounterMode

import gpt
import train


@pytest.fixture
def foretold(data, capsys):
    """foretold(flag, ...) is what a dry run prints."""
    def dry_run(*flags):
        train.main([*QUICK, "--out", "out/text", *map(str, flags), "--dry_run"])
        return capsys.readouterr().out
    return dry_run


@pytest.mark.parametrize("name", ["nano", "gpt2-92m", "gpt2"])
def test_floating_point_operations_are_those_that_torch_counts(name):
    model = gpt.GPT(replace(gpt.MODELS[name], n_layer=2), fused=False)  # it does not count fused attention
    ids = torch.randint(257, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert counter.get_total_flops() == train.flops_per_token(model, 64) * ids.numel()


def test_a_dry_run_reports_the_size_the_cost_and_the_time_and_writes_nothing(foretold, tiny):
    says = foretold("--max_steps", 200)
    assert says.startswith("training tiny on cpu; nothing is written\n")
    assert not Path("out").exists()
    flops = train.flops_per_token(gpt.GPT(tiny), 16)
    n_params = gpt.GPT(tiny).num_params()
    assert f"{n_params:,} parameters, float32; data/text: 112 sequences of 16 tokens\n" in says
    assert "each step: 1 processes x 1 micro-batches x 4 sequences = 64 tokens\n" in says
    assert f"200 steps, 7.14 epochs; {flops:.2e} FLOPs per token, {flops * 64 * 200:.2e} in all\n" in says
    assert re.search(r"\n[\d,]+ tokens/s; \d+s for all steps, .*; [\d.]+ GB in each process\n$", says)


def test_the_same_lines_head_the_run(foretold, capsys):
    says = foretold("--max_steps", 2).splitlines()
    run("--max_steps", 2)
    assert capsys.readouterr().out.splitlines()[1:5] == says[1:5]


def test_a_dry_run_leaves_a_run_as_it_is_and_reports_what_is_left_of_it(foretold):
    run("--max_steps", 2)
    before = {path: path.read_bytes() for path in Path("out/text").iterdir()}
    assert "9 steps" in foretold("--max_steps", 9)
    assert "9 steps, 0.32 epochs, 2 of them done" in foretold("--max_steps", 9, "--resume")
    assert before == {path: path.read_bytes() for path in Path("out/text").iterdir()}


def test_the_memory_it_foretells_is_that_of_the_run(data):
    # Of processes of their own, as it is a process's peak.
    flags = ["--data", data, "--n_layer", 2, "--n_embd", 512, "--block_size", 64, "--global_batch_size", 8,
             "--dtype", "float32", "--max_steps", 3, "--log_interval", 1, "--out", "out/text"]
    [dry] = ranks(1, *flags, "--dry_run")
    foretold = float(re.search(r"([\d.]+) GB in each process", dry.stdout)[1]) * 1e9
    ranks(1, *flags)
    measured = [row["memory"] for row in log() if "memory" in row][-1]
    assert foretold == pytest.approx(measured, rel=0.15)


def test_the_disk_it_foretells_is_enough_and_little_more(foretold, bare):
    flags = ["--n_embd", 512, "--batch_size", 28, "--max_steps", 10, "--keep_epochs", 1]     # 2.5 epochs
    says = float(re.search(r"up to ([\d.]+) GB of checkpoints", foretold(*flags))[1]) * 1e9
    run(*flags)
    size = {path.name: path.stat().st_size for path in Path("out/text").glob("*.pt")}
    assert size.keys() == {"last.pt", "best.pt", "epoch_0001.pt", "epoch_0002.pt"}
    needed = sum(size.values()) + size["last.pt"]       # which has a new one beside it while that is written
    assert needed == pytest.approx(says, rel=0.15)


@pytest.mark.parametrize("flags, warnings", [
    (["--max_steps", 1000], []),
    (["--max_steps", 1200], ["the data will be seen 43 times"])])
def test_what_is_unusual_is_warned_of(foretold, flags, warnings):
    says = re.findall("warning: (.*)", foretold(*flags))
    assert len(says) == len(warnings) and all(map(str.startswith, says, warnings)), says
