"""What is left when a run is stopped, killed, or cannot continue."""

import copy
import json
import math
import os
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

@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_step_end_saves_it_and_says_how_to_continue(data, monkeypatch, capfd, name):
    at_step(monkeypatch, 3, lambda model: os.kill(os.getpid(), name))
    _, meta = run("--max_steps", 10)
    out, err = capfd.readouterr()
    assert meta["step"] == 3 and not Path("out/text/best.pt").exists()
    assert "stopping after this step; Ctrl-C stops at once" in err
    assert "\nstopped after step 3 of 10 and saved: the same command with --resume continues" in out


def test_a_second_ctrl_c_stops_at_once(data, monkeypatch):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(SystemExit) as stop:
        run("--max_steps", 10, "--eval_interval", 2)
    assert stop.value.code == 130
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_a_ctrl_c_that_is_ignored_stays_ignored_after_another_signal(data, monkeypatch):
    def both(model):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at_step(monkeypatch, 3, both)
    assert run("--max_steps", 10)[1]["step"] == 3


def test_a_reader_of_its_output_that_goes_away_does_not_end_a_run(data):
    # As with `| tee`, which Ctrl-C ends, too.
    command = (f"'{sys.executable}' '{ROOT}/train.py' --data {data} --n_layer 1 --n_embd 8 --block_size 16 "
               "--max_steps 60 --eval_interval 20 --log_interval 1 --eval_sequences 4 2>&1 | head -n 5")
    subprocess.run(command, shell=True, timeout=100, capture_output=True)
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 60


def test_max_minutes_is_about_one_start_alone(data):
    assert run("--max_steps", 3, "--max_minutes", 1e-9)[1]["step"] == 1
    main(RESUME)
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 3


def test_max_minutes_stops_on_the_clock(data, capsys):
    _, meta = run("--max_steps", 1_000_000, "--max_minutes", 0.01)
    assert 0 < meta["step"] < 1_000
    assert f"stopped after step {meta['step']:,} of 1,000,000 and saved" in capsys.readouterr().out


def test_killed_at_any_moment_a_run_can_be_resumed_and_is_the_same_in_the_end():
    kill.main(["--times", "3"])     # by itself, kill.py does so 50 times


# ------------------------------------------------------------------------------------------------- disks

def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_line(fails, data, limit_files):
    model, _ = run("--max_steps", 2)
    limit_files(300_000)        # weights alone are below it
    fails(main, [*RESUME, "--max_steps", 4],
          "cannot read or write out/text (File too large): fix that, or choose another folder; earlier "
          "checkpoints can still be resumed")
    last, meta = gpt.load_checkpoint("out/text/last.pt")
    assert meta["step"] == 2 and same_weights(model, last)
    assert not list(Path("out/text").glob("*.tmp"))


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_one_line(fails, data, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda model: Path("out/text/last.pt.tmp").symlink_to("/dev/full"))
        fails(main, [*QUICK, "--max_steps", 9, "--eval_interval", 3],
              "cannot read or write out/text (No space left on device): fix that, or choose another folder")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 3
    main(["--out", "out/text", "--resume"])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 9


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(fails, data):
    Path("file").touch()
    fails(main, [*QUICK, "--out", "file/text"], "cannot read or write file/text (Not a directory): fix")


def test_a_log_that_cannot_be_appended_is_reported_in_one_line(fails, data, monkeypatch):
    def fill_disk(model):
        Path("out/text/log.jsonl").unlink()
        Path("out/text/log.jsonl").symlink_to("/dev/full")

    at_step(monkeypatch, 3, fill_disk)
    fails(main, [*QUICK, "--max_steps", 4, "--eval_interval", 2, "--log_interval", 1],
          "cannot read or write out/text (No space left on device): fix that")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


# --------------------------------------------------------------------------------------------- not finite

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_end_the_run(fails, data, monkeypatch, dtype):
    @torch.no_grad()
    def spoil(model):
        model.h[1].mlp.c_fc.weight[0, 0] = math.inf

    at_step(monkeypatch, 3, spoil)
    fails(main, [*QUICK, "--dtype", dtype, "--max_steps", 9, "--eval_interval", 2],
          "step 3 has loss nan and a gradient of norm nan at learning rate 0.00875 (loss scale now 1): "
          "use a lower --lr, with --resume to continue from last.pt")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def make_losses_infinite(monkeypatch, *numbers):
    """Makes these losses of training, counted from 1, infinite, but not their gradients. Returns the model of
    each loss."""
    forward, models = gpt.GPT.forward, []

    def spoiled(model, ids, targets=None):
        if targets is None or not model.training:
            return forward(model, ids, targets)
        models.append(model)
        return forward(model, ids, targets) + (math.inf if len(models) in numbers else 0)

    monkeypatch.setattr(gpt.GPT, "forward", spoiled)
    return models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_micro_batches, number", [(1, 3), (4, 9), (4, 11), (4, 12)])
def test_an_infinite_loss_with_a_finite_gradient_ends_the_run_before_the_weights_are_touched(
        fails, data, monkeypatch, dtype, n_micro_batches, number):
    models = make_losses_infinite(monkeypatch, number)      # of step 3
    fails(main, [*QUICK, "--dtype", dtype, "--max_steps", 9, "--eval_interval", 2,
                 "--global_batch_size", 4 * n_micro_batches], "step 3 has loss inf and a gradient of norm ")
    last, meta = gpt.load_checkpoint("out/text/last.pt")
    assert meta["step"] == 2 and same_weights(last, models[0])
    assert [row["step"] for row in log() if "loss" in row] == [1]


@pytest.mark.parametrize("n_micro_batches, number", [(1, 3), (4, 11)])
def test_in_float16_an_infinite_loss_with_a_finite_gradient_is_skipped_and_counted(
        data, monkeypatch, n_micro_batches, number):
    found = []

    def stop(model):
        found.append(copy.deepcopy(model))
        os.kill(os.getpid(), signal.SIGTERM)

    make_losses_infinite(monkeypatch, number)       # of step 3
    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        stopped, meta = run("--dtype", "float16", "--global_batch_size", 4 * n_micro_batches,
                            "--log_interval", 1, "--max_steps", 5)
    assert same_weights(stopped, found[0]) and (meta["step"], meta["skipped"]) == (3, 1)
    assert log()[-1]["loss"] is None and log()[-1]["grad_norm"] > 0 and log()[-1]["loss_scale"] == 65536
    main(RESUME)
    _, meta = gpt.load_checkpoint("out/text/last.pt")
    assert (meta["step"], meta["skipped"]) == (5, 0)
    assert {state["step"].item() for state in meta["optimizers"][0].values()} == {4}


def test_in_float16_20_infinite_losses_in_a_row_end_the_run(fails, data, monkeypatch):
    models = make_losses_infinite(monkeypatch, *range(2, 99))
    fails(main, [*QUICK, "--dtype", "float16", "--max_steps", 50], "step 21 has loss inf and a gradient of")
    assert len(models) == 21


def test_a_run_that_diverges_keeps_its_last_good_weights(fails, data):
    model, _ = run("--max_steps", 2)
    flags = [*QUICK, "--resume", "--max_steps", 9, "--lr", "1e30", "--grad_clip", "1e30"]
    fails(main, flags, "step 4 has loss nan and a gradient of norm nan")
    assert same_weights(model, gpt.load_checkpoint("out/text/last.pt")[0])
    fails(main, [*flags, "--eval_interval", 1], "step 4 has loss nan and a gradient of norm nan")
    assert [row["val_loss"] for row in log() if row["step"] == 3] == [None]
    assert same_weights(model, gpt.load_checkpoint("out/text/best.pt")[0])


def test_a_run_that_diverged_can_be_resumed_with_a_lower_learning_rate(fails, data):
    run("--max_steps", 2)
    fails(main, [*RESUME, "--max_steps", 9, "--lr", "1e30", "--grad_clip", "1e30"], "step 4 has loss nan")
    main([*RESUME, "--max_steps", "9"])
    assert gpt.load_checkpoint("out/text/best.pt")[1]["step"] == 9


def test_in_float16_the_run_ends_after_20_skipped_steps_in_a_row(fails, data, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0 ** 60))
    fails(main, [*QUICK, "--dtype", "float16", "--max_steps", 50, "--log_interval", 1],
          "and a gradient of norm nan at learning rate 0.00689 (loss scale now 1.09951e+12): use a lower "
          "--lr, with --resume to continue from last.pt")
    assert [row["loss_scale"] for row in log()] == [2.0 ** (60 - step) for step in range(1, 20)]


def test_skipped_steps_are_counted_in_a_row(fails, data, monkeypatch):
    norms = iter([math.nan] * 19 + [1.0] + [math.inf] * 19 + [1.0] + [math.nan] * 20)
    monkeypatch.setattr(train, "backward", lambda *args: torch.tensor(5.0))
    monkeypatch.setattr(train, "clip_gradients", lambda *args: next(norms))
    monkeypatch.setattr(train, "update", lambda optimizers, scaler, loss, norm, lr: math.isfinite(norm))
    fails(main, [*QUICK, "--dtype", "float16", "--max_steps", 99], "step 60 has loss 5 and a gradient")


def test_skipped_steps_are_counted_across_a_stop(fails, data, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0 ** 60))
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        run("--dtype", "float16", "--max_steps", 50)
    fails(main, ["--out", "out/text", "--resume"], "step 20 has loss")


# ------------------------------------------------------------------------------------------ foreign names

@pytest.mark.parametrize("name", ["../../vocabulary", "/etc/passwd", ["gpt2"], None])
def test_a_tokenizer_named_by_meta_json_is_never_a_file(fails, data, name):
    path = Path(data, "meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": name}))
    fails(main, QUICK, "data/text is damaged, half-written, or from another version")
