"""Several ranks, on the CPU. conftest.ranks starts them, or torchrun where it is torchrun that is tested."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port, log, ranks, same_weights
from processes import BARE

import gpt
import processes

FLAGS = ["--data", "data/text", "--block_size", "32", "--dtype", "float32", "--log_interval", "1"]


def train(n_ranks, *flags, **options):
    """Returns what the ranks of a run that succeeds printed, one after another."""
    done = ranks(n_ranks, *FLAGS, *flags, **options)
    assert not any(rank.returncode for rank in done), [rank.stderr for rank in done]
    return "".join(rank.stdout for rank in done)


def last(out):
    """The model that a run has saved."""
    return gpt.load_checkpoint(f"{out}/last.pt")[0]


CONSTANT_RATE = ["--lr", 1e-3, "--min_lr", 1e-3, "--warmup", 0]     # whatever --max_steps is


def losses(out):
    return [row["loss"] for row in log(out) if "loss" in row]


def test_two_ranks_train_the_same_model_as_one_process_and_report_its_losses_once(data):
    flags = ["--max_steps", 5, "--batch_size", 2, "--global_batch_size", 8]
    one, two = (train(n, "--out", f"out/{n}", *flags) for n in (1, 2))
    assert "256 tokens per step: 1 (processes) x 4 (micro-batches) x 2 (sequences) x 32" in one
    assert "256 tokens per step: 2 (processes) x 2 (micro-batches) x 2 (sequences) x 32" in two
    models = last("out/1"), last("out/2")
    for key in [block.attn.c_attn.bias.data.chunk(3)[1] for model in models for block in model.h]:
        assert key.abs().max() < 1e-4       # it changes no attention: its gradient is 0 but for rounding
        key.zero_()
    assert same_weights(*models, tolerance=1e-5)
    assert len(log("out/1")) == len(log("out/2")) == 6
    for row, other in zip(log("out/1"), log("out/2"), strict=True):
        assert row["step"] == other["step"]
        for name in row.keys() & {"loss", "val_loss", "val_stderr"}:
            assert row[name] == pytest.approx(other[name], abs=1e-5)
    lines = [[line.split("|")[0] for line in printed.splitlines() if "|" in line] for printed in (one, two)]
    assert lines[0] == lines[1]


def test_two_ranks_continue_with_the_tokens_of_one_process(data):
    flags = ["--batch_size", 2, "--global_batch_size", 8, *CONSTANT_RATE]
    train(1, *flags, "--out", "out/whole", "--max_steps", 6)
    train(1, *flags, "--max_steps", 2)
    train(2, *flags, "--max_steps", 4, "--resume")
    train(1, *flags, "--max_steps", 6, "--resume")
    # A loss says which tokens were read: those of two steps differ by much more than rounding.
    whole = losses("out/whole")
    assert len(whole) == 6 and min(abs(a - b) for a, b in itertools.combinations(whole, 2)) > 1e-4
    assert losses("out/text") == pytest.approx(whole, abs=1e-5)


def test_a_save_by_the_first_rank_is_not_taken_for_one_by_another_process(data):
    late = """
import os, time
def describe(*args, describe=train.describe):
    describe(*args)
    time.sleep(2 * int(os.environ["RANK"]))
train.describe = describe
"""
    train(2, "--max_steps", 2, "--eval_interval", 2)
    assert "step 4/4" in train(2, "--max_steps", 4, "--eval_interval", 2, "--resume", first=late)


def test_two_ranks_continue_with_a_larger_global_batch_size_than_all_they_have_read(data):
    flags = ["--batch_size", 2, "--out", "out/text"]
    train(2, *flags, "--global_batch_size", 4, "--max_steps", 1)
    assert "step 2/2" in train(2, *flags, "--global_batch_size", 64, "--max_steps", 2, "--resume")
    assert not list(Path("out/text").glob("epoch_*.pt"))


def test_three_ranks_resume_bit_for_bit(data):
    # Unlike two, three ranks can add up gradients in different orders.
    flags = ["--n_layer", 2, "--n_embd", 256, "--batch_size", 4, "--global_batch_size", 12,
             "--eval_interval", 2, *CONSTANT_RATE]
    train(3, "--out", "out/whole", *flags, "--max_steps", 4)
    train(3, *flags, "--max_steps", 2)
    train(3, *flags, "--max_steps", 4, "--resume")
    assert same_weights(last("out/whole"), last("out/text"))


def test_ranks_that_find_different_checkpoints_do_not_start(data):
    train(1, "--out", "out/0", "--max_steps", 2)
    train(1, "--out", "out/1", "--max_steps", 3)
    apart = ("import os\n"
             "parse_args = train.parse_args\n"
             "train.parse_args = lambda argv: parse_args([*argv, '--out', f'out/{os.environ[\"RANK\"]}'])\n")
    for rank in ranks(2, *FLAGS, "--resume", first=apart):
        assert rank.returncode == 2
        assert "error: the ranks found different checkpoints: --out must be on a disk" in rank.stderr


def test_two_ranks_do_not_overwrite_an_earlier_run(data):
    train(1, "--max_steps", 2)
    for rank in ranks(2, *FLAGS, "--max_steps", 4):
        assert rank.returncode == 2
        assert "error: out/text/last.pt is from an earlier run: add --resume" in rank.stderr


def test_the_blocks_of_several_ranks_are_compiled_one_by_one(data):
    look = "train.compiled = lambda model, block_by_block: print('block by block:', block_by_block) or model"
    assert train(2, "--max_steps", 1, "--compile", first=look).count("block by block: True") == 2


# ----------------------------------------------------------------------------------------- faults of a rank

def acting(action, patience=30):
    """Code that lets rank 1 do something in the middle of its fourth step."""
    return f"""
import os, signal, time
from datetime import timedelta

def acting_backward(*args, backward=train.backward, calls=[]):
    calls.append(args)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        {action}
    try:
        return backward(*args)
    except RuntimeError:
        time.sleep(1)       # so that torchrun notices first the rank that failed first
        raise

train.backward, train.PATIENCE = acting_backward, timedelta(seconds={patience})
"""


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(data):
    printed = train(2, "--max_steps", 1000, first=acting("os.kill(os.getpid(), signal.SIGTERM)"))
    assert "stopped after step 4 of 1,000 and saved" in printed
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 4


def test_one_rank_with_an_infinite_loss_ends_the_run_before_any_weights_are_touched(data):
    spoil = acting("return backward(*args) + float('inf')")
    done = ranks(2, *FLAGS, "--max_steps", 9, "--eval_interval", 3, first=spoil)
    for rank in done:
        assert rank.returncode == 2 and "error: step 4 has loss inf and a gradient of norm " in rank.stderr
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 3


def test_a_rank_that_raises_ends_the_run(data):
    other, raising = ranks(2, *FLAGS, "--max_steps", 9, "--eval_interval", 2, first=acting("1 / 0"))
    assert other.returncode == raising.returncode == 1
    assert "ZeroDivisionError: division by zero" in raising.stderr
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_a_rank_that_hangs_ends_the_run_when_the_others_lose_patience(data):
    first, hanging = ranks(2, *FLAGS, "--max_steps", 9, "--eval_interval", 2,
                           first=acting("time.sleep(8)", patience=5))
    assert first.returncode == 1 and "Timed out waiting 5000ms" in first.stderr
    assert hanging.returncode != 0
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


# ------------------------------------------------------------------------------------------------ torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def script(first=""):
    """Writes a script: train.py without samples and curves, after the code `first`."""
    Path("script.py").write_text(f"{BARE}{first}\ntrain.main()\n")
    return "script.py"


def torchrun(*flags, first=""):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", script(first), *FLAGS, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100,
                          env=ENVIRONMENT)


def test_ctrl_c_under_torchrun_stops_all_ranks_after_the_step(data):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", script(), *FLAGS, "--max_steps", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENVIRONMENT, start_new_session=True)
    while "| loss" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    step = int(re.search(r"stopped after step (\d+) of 1,000,000 and saved", output)[1])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == step > 0


def test_a_rank_that_fails_ends_the_run_and_torchrun_names_it_and_the_reason(data):
    result = torchrun("--max_steps", 9, "--eval_interval", 2,
                      first=acting("raise train.UserError('the data is damaged')"))
    assert result.returncode != 0
    cause = result.stderr.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in cause and "UserError: the data is damaged" in cause
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        "error: the data is damaged"]
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


FAULTY = ["--max_steps", 7, "--eval_interval", 2, "--dropout", 0.1, "--batch_size", 4]
KILLED = acting("os.kill(os.getpid(), signal.SIGKILL)")


@contextlib.contextmanager
def machine(output, n_machines, first, **options):
    """Starts what torchrun is once it has imported torch: a process that starts and watches its ranks."""
    process = processes.start(
        ROOT, [*FLAGS, *FAULTY, "--resume"], Path.cwd(), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, output,
        BARE + first, {"min_nodes": n_machines, "max_nodes": n_machines, "rdzv_endpoint": "localhost:0",
                       **options})
    try:
        yield process
    finally:
        process.kill()


def test_torchrun_returns_a_run_whose_worker_was_killed_to_its_last_checkpoint(data):
    train(2, "--out", "out/whole", *FAULTY)
    # Rank 1 dies in its fourth step: step 4, then, continuing from step 2, step 6. From step 4 on, there are
    # only three steps left.
    with machine("output", 1, KILLED, nproc_per_node=2, max_restarts=2) as process:
        process.join(100)
    printed, errors = Path("output.out").read_text(), Path("output.err").read_text()
    assert process.exitcode == 0, errors
    assert errors.count("failed (exitcode: -9) local_rank: 1") == 2
    assert all(f"7 steps, 4.00 epochs, {n} of them done" in printed for n in (2, 4))
    assert [row["step"] for row in log() if "loss" in row] == [1, 2, 3, 3, 4, 5, 5, 6, 7]
    assert same_weights(last("out/whole"), last("out/text"))


def test_a_rank_that_is_killed_ends_the_run_and_torchrun_names_it_and_the_signal(data):
    with machine("output", 1, KILLED, nproc_per_node=2, max_restarts=0) as process:
        process.join(100)
    assert process.exitcode == 1
    cause = Path("output.err").read_text().partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in cause and "Signal 9 (SIGKILL) received by PID" in cause
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_a_machine_that_dies_and_comes_back_joins_the_run_again_at_its_last_checkpoint(data):
    # A process stands for each of two machines. Rank 1, on the second one, takes its machine down with it.
    train(2, "--out", "out/whole", *FAULTY)
    die = acting("os.path.exists('died') or (open('died', 'w').close(), "
                 "os.kill(os.getppid(), signal.SIGKILL), os.kill(os.getpid(), signal.SIGKILL))")
    port = free_port()
    options = {"first": die, "nproc_per_node": 1, "rdzv_endpoint": f"127.0.0.1:{port}",
               "rdzv_configs": {"keep_alive_interval": 1}}
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(machine("first", 2, **options))
        while True:     # until it listens
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        stack.enter_context(machine("lost", 2, **options)).join(100)
        second = stack.enter_context(machine("second", 2, **options))
        for process in (first, second):
            process.join(100)
    assert first.exitcode == second.exitcode == 0, Path("first.err").read_text()
    assert "7 steps, 4.00 epochs, 2 of them done" in Path("first.out").read_text()
    assert same_weights(last("out/whole"), last("out/text"))


def test_two_ranks_end_on_a_users_mistake_with_its_one_line(data):
    for rank in ranks(2, *FLAGS, "--global_batch_size", 7):
        assert rank.returncode == 2 and rank.stderr == (
            "error: --global_batch_size 7 is not a multiple of 2, the number of processes: change one of "
            "them\n")
