"""Two processes under torchrun, on the CPU."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, log, same_weights

import gpt

FLAGS = ["--data", "data/text", "--block_size", "32", "--dtype", "float32", "--log_interval", "1"]


def command(n_processes, *flags, torchrun=(), script=ROOT / "train.py"):
    """The command of a user, for one process without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", *torchrun]
    words = [sys.executable, *(torchrun if n_processes > 1 else []), script, *FLAGS, *flags]
    return list(map(str, words))


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(n_processes, *flags, **options):
    return subprocess.run(command(n_processes, *flags, **options), capture_output=True, text=True,
                          timeout=100, env=ENVIRONMENT)


def last(out):
    """The model that a run has saved."""
    return gpt.load_checkpoint(f"{out}/last.pt")[0]


def test_two_ranks_train_the_same_model_as_one_process_and_report_its_losses_once(data):
    flags = ["--max_steps", 5, "--batch_size", 2, "--global_batch_size", 8]
    runs = [train(n, "--out", f"out/{n}", *flags) for n in (1, 2)]
    assert runs[0].returncode == runs[1].returncode == 0, runs[1].stderr
    assert "1 processes x 4 micro-batches x 2 windows = 256 ids" in runs[0].stdout
    assert "2 processes x 2 micro-batches x 2 windows = 256 ids" in runs[1].stdout
    assert same_weights(last("out/1"), last("out/2"), tolerance=1e-5)
    assert len(log("out/1")) == len(log("out/2")) == 6
    for one, two in zip(log("out/1"), log("out/2"), strict=True):
        loss = "val_loss" if "val_loss" in one else "loss"
        assert one["step"] == two["step"] and one[loss] == pytest.approx(two[loss], abs=1e-5)
    one, two = ([line.split("|")[0] for line in run.stdout.splitlines() if "|" in line] for run in runs)
    assert one == two


def test_two_ranks_go_on_with_the_ids_of_one_process_and_say_so(data):
    flags = ["--batch_size", 2, "--global_batch_size", 8, "--out", "out/text"]
    assert train(1, *flags, "--out", "out/whole", "--max_steps", 6).returncode == 0
    assert train(1, *flags, "--max_steps", 2).returncode == 0
    two = train(2, *flags, "--max_steps", 4, "--resume")
    assert "this run had 1 processes, and now has 2: its steps read the same ids as before" in two.stdout
    one = train(1, *flags, "--max_steps", 6, "--resume")
    assert "this run had 2 processes, and now has 1: its steps read the same ids as before" in one.stdout
    hashes = [[row["ids_hash"] for row in log(out) if "loss" in row]
              for out in ("out/whole", "out/text")]
    assert len(set(hashes[0])) == 6 and hashes[0] == hashes[1]


def test_two_ranks_go_on_with_a_larger_global_batch_size_than_all_they_have_read(data):
    flags = ["--batch_size", 2, "--out", "out/text"]
    assert train(2, *flags, "--global_batch_size", 4, "--max_steps", 1).returncode == 0
    result = train(2, *flags, "--global_batch_size", 64, "--max_steps", 2, "--resume")
    assert result.returncode == 0 and "step 2/2" in result.stdout, result.stderr


def test_three_ranks_resume_in_every_bit(data):
    # Unlike two, three ranks can add up gradients in different orders. The learning rate is constant.
    flags = ["--n_embd", 256, "--batch_size", 4, "--global_batch_size", 12, "--eval_interval", 2,
             "--lr", 1e-3, "--min_lr", 1e-3, "--warmup", 0]
    assert train(3, "--out", "out/whole", *flags, "--max_steps", 4).returncode == 0
    assert train(3, "--out", "out/text", *flags, "--max_steps", 2).returncode == 0
    assert train(3, "--out", "out/text", *flags, "--max_steps", 4, "--resume").returncode == 0
    assert same_weights(last("out/whole"), last("out/text"))


@pytest.mark.parametrize("n_processes", [1, 2])
def test_where_compiling_fails_on_a_rank_all_train_without_and_say_so_in_one_line(data, n_processes):
    Path("without_compiler.py").write_text(
        "import os, train\n"
        "if int(os.environ.get('RANK', 0)) + 1 == int(os.environ.get('WORLD_SIZE', 1)):\n"
        "    os.environ.update(CXX='/no/compiler', TORCHINDUCTOR_CACHE_DIR='inductor')\n"
        "train.main()\n")
    flags = ["--n_layer", 1, "--max_steps", 2]
    assert train(n_processes, *flags, "--out", "out/plain").returncode == 0
    result = train(n_processes, *flags, "--out", "out/text", "--compile", script="without_compiler.py")
    assert result.returncode == 0, result.stderr
    reason = "InvalidCxxCompiler" if n_processes == 1 else "(another rank)"
    [line] = [line for line in result.stdout.splitlines() if "training without --compile" in line]
    assert reason in line
    assert same_weights(last("out/plain"), last("out/text"))


def test_ranks_that_find_different_checkpoints_do_not_start(data):
    assert train(1, "--out", "out/first", "--max_steps", 2).returncode == 0
    assert train(1, "--out", "out/second", "--max_steps", 3).returncode == 0
    Path("apart.py").write_text("import os, pathlib, train\n"
                                "find = train.find_checkpoint\n"
                                "name = 'first' if os.environ['RANK'] == '0' else 'second'\n"
                                "path = pathlib.Path('out', name, 'last.pt')\n"
                                "train.find_checkpoint = lambda _, *args: find(path, *args)\n"
                                "train.main()\n")
    result = train(2, "--resume", script="apart.py")
    assert "the ranks found different checkpoints: --out must be on a disk that all share" in result.stderr


# ----------------------------------------------------------------------------------------- faults of a rank

def acting(action):
    """A script: train.py, but rank 1 does something in the middle of step 4, unless it was started again."""
    Path("acting.py").write_text(f"""
import os, signal, time
from datetime import timedelta
import train

def acting_update(*args, update=train.update, calls=[]):
    calls.append(args)
    if len(calls) == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {action}
    return update(*args)

train.update, train.PATIENCE = acting_update, timedelta(seconds=5)
train.main()
""")
    return "acting.py"


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(data):
    result = train(2, "--max_steps", 1000, script=acting("os.kill(os.getpid(), signal.SIGTERM)"))
    assert result.returncode == 0, result.stderr
    step = int(re.search(r"stopped after step (\d+) of 1,000 and saved", result.stdout)[1])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == step
    assert 4 <= step < 100      # they ask each other twice a second


def test_ctrl_c_under_torchrun_stops_all_ranks_after_the_step(data):
    process = subprocess.Popen(command(2, "--max_steps", 10 ** 6), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True)
    while "| loss" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    step = int(re.search(r"stopped after step (\d+) of 1,000,000 and saved", output)[1])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == step > 0


@pytest.mark.parametrize("action, says", [
    ("raise ZeroDivisionError('division by zero')", "rank 1 failed: ZeroDivisionError: division by zero"),
    ("raise train.UserError('the data is damaged')", "rank 1: the data is damaged"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 does not answer: it was killed, or hangs"),
    ("signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(99)", "rank 1 does not answer: it was")])
def test_a_rank_that_fails_or_hangs_ends_the_run_and_is_named(data, action, says):
    result = train(2, "--max_steps", 9, "--eval_interval", 2, script=acting(action))
    assert result.returncode != 0
    assert f"error: {says}" in result.stderr
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_torchrun_takes_a_run_whose_worker_was_killed_back_to_its_last_checkpoint(data):
    flags = ["--max_steps", 6, "--eval_interval", 2, "--dropout", 0.1, "--batch_size", 4]
    assert train(2, "--out", "out/whole", *flags).returncode == 0
    kill = acting("os.kill(os.getpid(), signal.SIGKILL)")
    result = train(2, "--out", "out/text", *flags, torchrun=["--max_restarts=1"], script=kill)
    assert result.returncode == 0, result.stderr
    assert "6 steps, 1.71 epochs, 2 of them done" in result.stdout
    assert [row["step"] for row in log("out/text") if "loss" in row] == [1, 2, 3, 3, 4, 5, 6]
    assert same_weights(last("out/whole"), last("out/text"))


def test_a_machine_that_dies_and_comes_back_joins_the_run_again_at_its_last_checkpoint(data):
    # A torchrun stands for each of two machines. Rank 1, on the second one, takes its machine down with it.
    flags = ["--max_steps", 6, "--eval_interval", 2, "--dropout", 0.1, "--batch_size", 4]
    assert train(2, "--out", "out/whole", *flags).returncode == 0
    die = acting("os.path.exists('died') or (open('died', 'w').close(), "
                 "os.kill(os.getppid(), signal.SIGKILL), os.kill(os.getpid(), signal.SIGKILL))")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    machine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=job",
               "--max_restarts=3", die, *FLAGS, "--out", "out/text", *map(str, flags)]
    start = functools.partial(subprocess.Popen, machine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    first = start()
    while True:     # until it listens
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    start().wait(timeout=100)
    second = start()
    outputs = [process.communicate(timeout=100)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert "rank 1 does not answer: it was killed, or hangs" in outputs[0]
    assert "6 steps, 1.71 epochs, 2 of them done" in outputs[0]
    assert same_weights(last("out/whole"), last("out/text"))


def test_another_job_of_torchrun_does_not_go_on_by_itself(data):
    assert train(1, "--max_steps", 2).returncode == 0
    result = train(2, "--max_steps", 4)
    assert result.returncode != 0
    assert "last.pt is from an earlier run: --resume continues it" in result.stderr


def test_two_ranks_end_on_a_users_mistake_without_a_traceback_of_ours(data):
    result = train(2, "--global_batch_size", 7)
    assert result.returncode != 0
    assert "error: rank 1: --global_batch_size 7 is not a multiple of 2, the number of" in result.stderr
    assert "train.py\", line" not in result.stderr
