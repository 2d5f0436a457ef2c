"""What is left when a run is stopped, killed, or cannot go on."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, RESUME, ROOT, at_step, log, run, same_weights

import gpt
import kill
import train
from train import main


pytestmark = pytest.mark.usefixtures("bare")


# ------------------------------------------------------------------------------------------------- stops

@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_it_and_says_how_to_go_on(data, monkeypatch, capfd, name):
    before = signal.getsignal(name)
    at_step(monkeypatch, 3, lambda net: os.kill(os.getpid(), name))
    _, meta = run("--max_steps", 10)
    out, err = capfd.readouterr()
    assert meta["step"] == 3 and not Path("out/text/best.pt").exists()
    assert "stopping after this step; Ctrl-C stops at once" in err
    assert "\nstopped after step 3 of 10 and saved: the same command with --resume goes on from" in out
    assert signal.getsignal(name) == before


def test_a_second_ctrl_c_stops_at_once(data, monkeypatch):
    def twice(net):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(SystemExit) as stop:
        run("--max_steps", 10, "--eval_interval", 2)
    assert stop.value.code == 130
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


@pytest.mark.parametrize("redirection", ["| head -n 5", "2>&1 | head -n 5"])
def test_a_reader_of_its_output_that_goes_away_does_not_end_a_run(data, redirection):
    # As with `| tee`, which Ctrl-C ends, too.
    command = (f"'{sys.executable}' '{ROOT}/train.py' --data {data} --n_layer 1 --n_embd 8 --block_size 16 "
               f"--max_steps 60 --eval_interval 20 --log_interval 1 --eval_windows 4 {redirection}")
    subprocess.run(command, shell=True, timeout=100, capture_output=True)
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 60


def test_max_minutes_stops_on_the_clock(data, capsys):
    _, meta = run("--max_steps", 1_000_000, "--max_minutes", 0.01)
    assert 0 < meta["step"] < 1_000
    assert f"stopped after step {meta['step']:,} of 1,000,000 and saved" in capsys.readouterr().out


def test_killed_at_any_moment_a_run_can_be_resumed_and_is_the_same_in_the_end():
    kill.main(["--times", "4"])     # by itself, kill.py does so 50 times


# ------------------------------------------------------------------------------------------------- disks

def limit_files_to_300_kilobytes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_line(data):
    sizes = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "16"]
    command = [sys.executable, ROOT / "train.py", "--data", data, *sizes, "--max_steps", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100,
                            preexec_fn=limit_files_to_300_kilobytes)
    # Before the first step, last.pt has no state of the optimizer, and is below the limit.
    assert result.returncode == 2
    assert result.stderr == ("error: cannot write out/text/last.pt (File too large): mend that, or choose "
                             "another --out; what was saved before can be resumed\n")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 0
    assert not list(Path("out/text").glob("*.tmp"))


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_one_line(fails, data, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda net: Path("out/text/last.pt.tmp").symlink_to("/dev/full"))
        fails(main, [*QUICK, "--max_steps", 9, "--eval_interval", 3],
              "cannot write out/text/last.pt (No space left on device): mend that, or choose another --out")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 3
    main(["--out", "out/text", "--resume"])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 9


def test_a_folder_that_cannot_be_written_is_told_in_one_line(fails, data):
    Path("file").touch()
    fails(main, [*QUICK, "--out", "file/text"], "cannot write file/text (Not a directory): mend that")


def test_a_log_that_cannot_be_appended_is_told_in_one_line(fails, data):
    run("--max_steps", 2)
    Path("out/text/log.jsonl").unlink()
    Path("out/text/log.jsonl").symlink_to("/dev/full")
    fails(main, [*QUICK, "--resume", "--max_steps", 4, "--log_interval", 1],
          "cannot write out/text/log.jsonl (No space left on device): mend that")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


# --------------------------------------------------------------------------------------------- not finite

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_module(fails, data, monkeypatch, dtype):
    @torch.no_grad()
    def spoil(net):
        net.h[1].mlp.c_fc.weight[0, 0] = math.inf

    at_step(monkeypatch, 3, spoil)
    fails(main, [*QUICK, "--dtype", dtype, "--max_steps", 9, "--eval_interval", 2],
          "step 3 has loss nan and a gradient of norm nan at learning rate 0.00875 and loss scale 1; "
          "computed again, outputs are not finite first in h.1.mlp.c_fc: return to the last checkpoint")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_a_run_that_diverges_keeps_its_last_good_weights(fails, data):
    model, _ = run("--max_steps", 2)
    flags = [*QUICK, "--resume", "--max_steps", 9, "--lr", "1e30", "--grad_clip", "1e30"]
    fails(main, flags, "step 4 has loss nan and a gradient of norm nan")
    fails(main, [*flags, "--eval_interval", 1], "the validation loss after step 3 is nan: return to the")
    assert same_weights(model, gpt.load_checkpoint("out/text/last.pt")[0])
    main([*RESUME, "--max_steps", "3"])


def test_in_float16_an_infinite_loss_with_a_finite_gradient_is_no_skipped_step(data, monkeypatch):
    monkeypatch.setattr(train, "update", lambda *args: (math.inf, 1.0))
    assert run("--dtype", "float16", "--max_steps", 30)[1]["skipped"] == 0


def test_in_float16_the_run_ends_after_20_skipped_steps_in_a_row(fails, data, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0 ** 60))
    fails(main, [*QUICK, "--dtype", "float16", "--max_steps", 50, "--log_interval", 1],
          "and a gradient of norm nan at learning rate 0.00689 and loss scale 1.09951e+12; computed again, "
          "outputs are finite in all modules")
    assert [row["loss_scale"] for row in log()] == [2.0 ** (60 - step) for step in range(1, 20)]


def test_skipped_steps_are_counted_in_a_row(fails, data, monkeypatch):
    norms = iter([math.nan] * 19 + [1.0] + [math.inf] * 19 + [1.0] + [math.nan] * 20)
    monkeypatch.setattr(train, "update", lambda *args: (5.0, next(norms)))
    fails(main, [*QUICK, "--dtype", "float16", "--max_steps", 99], "step 60 has loss 5 and a gradient")


def test_skipped_steps_are_counted_across_a_stop(fails, data, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0 ** 60))
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda net: os.kill(os.getpid(), signal.SIGTERM))
        run("--dtype", "float16", "--max_steps", 50)
    fails(main, ["--out", "out/text", "--resume"], "step 20 has loss")


# ------------------------------------------------------------------------------------------ foreign names

@pytest.mark.parametrize("elsewhere", ["../text", "/elsewhere"])
def test_a_folder_named_by_a_checkpoint_is_not_read_unless_it_is_inside_this_one(fails, data, elsewhere):
    model, meta = run("--max_steps", 1)
    meta["args"] = {**meta["args"], "data": elsewhere, "out": elsewhere, "dat": elsewhere,
                    f"data={elsewhere}": True}
    gpt.save_checkpoint("out/text/last.pt", model, meta)
    fails(main, ["--out", "out/text", "--resume"],
          f"this run read {elsewhere}, which is outside this folder: allow it by --data")
    main(["--data", data, "--resume", "--max_steps", "2"])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["args"]["out"] == "out/text"


@pytest.mark.parametrize("name", ["../../vocabulary", "/etc/passwd", ["gpt2"], None])
def test_a_tokenizer_named_by_meta_json_is_never_a_file(fails, data, name):
    path = Path(data, "meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": name}))
    fails(main, QUICK, "meta.json is damaged, half-written, or of another version")
