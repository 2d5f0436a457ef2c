"""A resumed run is the run it would have been."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import QUICK, RESUME, at_step, log, ranks, run, same_weights

import gpt
import prepare
import train
from train import Batches, main

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(autouse=True)
def each_run_finds_another_random_state(monkeypatch):
    """As a new process would."""
    parse_args = train.parse_args
    monkeypatch.setattr(train, "parse_args", lambda *args: torch.seed() and parse_args(*args))


def stop_after(monkeypatch, step):
    """Lets SIGTERM come in the middle of that step."""
    at_step(monkeypatch, step, lambda model: os.kill(os.getpid(), signal.SIGTERM))


def identical(a, b):
    """Whether two checkpoints are bit-for-bit identical, but for the name of the folder."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            identical(a[name], b[name]) for name in a if name not in ("out", "resume"))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def steps(out):
    """What a log says of each step, but for its times. A later row replaces an earlier one."""
    rows = {}
    for row in log(out):
        rows["loss" in row, row["step"]] = {name: value for name, value in row.items()
                                            if name not in ("seconds", "tokens_per_second", "memory")}
    return rows


@pytest.mark.parametrize("dtype, optimizer", [
    ("float32", "adamw"), ("float16", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")])
def test_a_run_that_is_stopped_at_any_step_and_resumed_is_bit_for_bit_identical(
        data, monkeypatch, dtype, optimizer):
    # A step has 40 sequences, an epoch 112. In float16, the first steps overflow, and later the scale grows.
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(
        *a, **k, init_scale=2.0 ** 22, growth_interval=2))
    flags = ["--dtype", dtype, "--n_embd", 8, "--dropout", 0.1, "--batch_size", 20, "--global_batch_size", 40,
             "--optimizer", optimizer, "--max_steps", 9, "--log_interval", 1, "--eval_interval", 4]
    whole, meta = run(*flags, out="out/whole")
    if dtype == "float16":
        scales = [row["loss_scale"] for row in log("out/whole") if "loss" in row]
        assert min(scales) < scales[0] and max(scales[5:]) > min(scales)
    for step in range(1, 9):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            _, stopped = run(*flags)
        assert stopped["step"] == step
        main(RESUME)
        resumed, meta_of_resumed = gpt.load_checkpoint("out/text/last.pt")
        assert same_weights(whole, resumed) and identical(meta, meta_of_resumed)
        assert steps("out/text") == steps("out/whole")
        assert same_weights(*(gpt.load_checkpoint(f"out/{name}/best.pt")[0] for name in ("whole", "text")))
        shutil.rmtree("out/text")


def test_a_run_that_is_stopped_at_every_step_is_bit_for_bit_identical(data, monkeypatch):
    flags = ["--dropout", 0.1, "--max_steps", 5, "--eval_interval", 2, "--log_interval", 1]
    whole, meta = run(*flags, out="out/whole")
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            run(*flags, "--resume")
        assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == step
    main(RESUME)        # the last evaluation remains
    resumed, meta_of_resumed = gpt.load_checkpoint("out/text/last.pt")
    assert same_weights(whole, resumed) and identical(meta, meta_of_resumed)
    assert steps("out/text") == steps("out/whole")


def test_a_run_that_is_stopped_at_a_step_of_evaluation_evaluates_when_it_is_resumed(data, monkeypatch):
    flags = ["--max_steps", 6, "--eval_interval", 2, "--log_interval", 1]
    run(*flags, out="out/whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(*flags)
    assert [row["step"] for row in log() if "val_loss" in row] == [2]
    main(RESUME)
    assert [row["step"] for row in log() if "val_loss" in row] == [2, 4, 6]
    assert steps("out/text") == steps("out/whole")
    best, of_whole = (gpt.load_checkpoint(f"out/{name}/best.pt") for name in ("text", "whole"))
    assert same_weights(best[0], of_whole[0]) and identical(best[1], of_whole[1])


def test_a_run_that_ends_in_an_evaluation_has_saved_before_and_evaluates_again(data, monkeypatch):
    flags = ["--max_steps", 4, "--eval_interval", 2, "--log_interval", 1]
    run(*flags, out="out/whole")
    read, reads = train.Sequences.read, []

    def interrupted(self, indices, device):
        reads.append(len(self))
        if reads.count(12) == 3:        # in the middle of the first evaluation, of 12 sequences
            raise KeyboardInterrupt
        return read(self, indices, device)

    with monkeypatch.context() as patch:
        patch.setattr(train.Sequences, "read", interrupted)
        with pytest.raises(SystemExit):
            run(*flags)
    assert reads == [112, 112, 12, 12, 12] and not Path("out/text/best.pt").exists()
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2
    main(RESUME)
    assert steps("out/text") == steps("out/whole")
    assert same_weights(*(gpt.load_checkpoint(f"out/{name}/best.pt")[0] for name in ("whole", "text")))


def test_resume_without_a_checkpoint_begins(data):
    resumed, meta = run("--max_steps", 2, "--resume")
    begun, meta_of_begun = run("--max_steps", 2, out="out/whole")
    assert same_weights(resumed, begun) and identical(meta, meta_of_begun)


def test_a_copy_is_continued_in_another_folder_with_other_flags(data):
    run("--max_steps", 2, "--weight_decay", 0.5, "--global_batch_size", 8)
    shutil.copytree("out/text", "out/copy")
    main(["--out", "out/copy", "--resume", "--epochs", "1", "--lr", "1e-3", "--batch_size", "1",
          "--eval_interval", "7"])
    _, meta = gpt.load_checkpoint("out/copy/last.pt")
    args = meta["args"]
    assert (args["epochs"], args["max_steps"], args["lr"], args["batch_size"]) == (1, None, 1e-3, 1)
    assert (args["weight_decay"], args["global_batch_size"], args["data"]) == (0.5, 8, data)
    assert meta["step"] == 112 / 8
    assert [row["step"] for row in log("out/copy") if "val_loss" in row] == [2, 7, 14]
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_another_global_batch_size_continues_where_the_old_one_ended(data, monkeypatch):
    run("--max_steps", 3, "--global_batch_size", 8)
    offsets, batches = [], Batches.__call__
    monkeypatch.setattr(Batches, "__call__", lambda self, offset: offsets.extend(
        range(offset, offset + self.share)) or batches(self, offset))
    main([*RESUME, "--global_batch_size", "16", "--epochs", "1"])
    assert offsets == list(range(24, 120))      # in steps of 16 to the end of the epoch of 112 sequences
    _, meta = gpt.load_checkpoint("out/text/last.pt")
    assert (meta["step"], meta["offset"]) == (3 + 6, 120)
    offsets.clear()
    main([*RESUME, "--global_batch_size", "4", "--max_steps", "11"])
    assert offsets == list(range(120, 128))
    assert log()[-2]["step"] == 11 and log()[-2]["epoch"] == pytest.approx(128 / 112)


def test_a_run_that_is_done_says_so(data, capsys):
    run("--max_steps", 1)
    main(RESUME)
    assert "all steps are done: raise --max_steps or --epochs" in capsys.readouterr().out


def test_a_resumed_run_does_not_overwrite_a_better_checkpoint(data):
    run("--max_steps", 20)
    main([*RESUME, "--max_steps", "21", "--lr", "100"])
    assert gpt.load_checkpoint("out/text/best.pt")[1]["step"] == 20


def test_a_resumed_run_keeps_its_flags_but_for_those_that_are_given_and_the_device(data):
    run("--max_steps", 1, "--lr", 3e-3, "--device", "cpu")
    args, (_, meta) = train.parse_args([*RESUME, "--min_lr", "1e-4"])
    assert (args.lr, args.min_lr, args.max_steps, args.model) == (3e-3, 1e-4, 1, "tiny")
    assert args.device is None and args.out == "out/text" and meta["step"] == 1


def test_the_log_continues_after_a_row_that_was_cut_short(data):
    run("--max_steps", 1)
    with open("out/text/log.jsonl", "a") as file:
        file.write('{"step": 2, "los')
    main([*RESUME, "--max_steps", "2"])
    lines = Path("out/text/log.jsonl").read_text().splitlines()
    assert lines[3] == '{"step": 2, "los' and json.loads(lines[4])["started_at_step"] == 1
    assert json.loads(lines[5])["step"] == 2


# ----------------------------------------------------------------------------------- what is not resumed

@pytest.mark.parametrize("flag, value, says", [
    ("block_size", 8, "block_size was 16 in that run, but is 8 now"),
    ("n_layer", 1, "n_layer was 2 in that run, but is 1 now"),
    ("dropout", 0.5, "dropout was 0.0 in that run, but is 0.5 now"),
    ("stride", 8, "stride was 16 in that run, but is 8 now"),
    ("optimizer", "muon", "optimizer was adamw in that run, but is muon now"),
    ("seed", 1, "seed was 1337 in that run, but is 1 now")])
def test_another_model_or_order_of_the_data_is_refused_with_both_values(fails, data, flag, value, says):
    run("--max_steps", 1)
    fails(main, [*RESUME, f"--{flag}", value], f"cannot resume: {says}")


@pytest.mark.parametrize("text", ["Other text. " * 100, "Same size.\n" * 181 + "12345678"])
def test_other_data_are_refused(fails, data, text):
    run("--max_steps", 1)
    Path("text.txt").write_text(text)
    prepare.prepare(["text.txt"], data, "bytes")
    fails(main, RESUME, "cannot resume: data/text is not the data that this run began with")


def test_an_earlier_run_is_not_overwritten(fails, data):
    model, _ = run("--max_steps", 2)
    fails(main, QUICK, "last.pt is from an earlier run: add --resume, or choose another --out")
    fails(main, [*QUICK, "--data", "text", "--out", "out/text"], "/text contains no prepared data")
    assert same_weights(model, gpt.load_checkpoint("out/text/last.pt")[0])


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_what_is_left_of_an_earlier_run_is_not_overwritten_either(fails, data, flags):
    run("--max_steps", 2)
    os.remove("out/text/last.pt")
    before = Path("out/text/best.pt").read_bytes()
    fails(main, [*QUICK, "--out", "out/text", *flags],
          "best.pt is from an earlier run: there is no last.pt to resume, so choose another --out")
    assert Path("out/text/best.pt").read_bytes() == before


def test_there_is_a_last_checkpoint_to_resume_whenever_one_was_kept(data, monkeypatch):
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda run, name: saved.append(name) or save(run, name))
    run("--keep_epochs", 1, "--epochs", 2, "--eval_interval", 1000)
    assert saved[:4] == ["last.pt", "epoch_0001.pt", "last.pt", "epoch_0002.pt"]


def test_a_checkpoint_to_keep_that_could_not_be_written_comes_with_the_resumed_run(data, monkeypatch, fails):
    run("--keep_epochs", 1, "--epochs", 2, out="out/whole")
    save = train.save

    def failing(run, name):
        if name == "epoch_0001.pt":
            raise OSError(28, "No space left on device")
        save(run, name)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", failing)
        fails(main, [*QUICK, "--out", "out/text", "--keep_epochs", 1, "--epochs", 2], "No space left")
    main(RESUME)
    for name in ("epoch_0001.pt", "epoch_0002.pt"):
        kept, of_whole = (gpt.load_checkpoint(f"out/{out}/{name}") for out in ("text", "whole"))
        assert same_weights(kept[0], of_whole[0]) and identical(kept[1], of_whole[1])


def test_a_run_that_is_stopped_in_its_last_step_says_so_and_evaluates_when_it_is_resumed(data, capsys):
    run("--max_steps", 1, "--max_minutes", 1e-9)
    assert "stopped after step 1 of 1 and saved" in capsys.readouterr().out
    assert not Path("out/text/best.pt").exists()
    main(RESUME)
    assert "stopped" not in capsys.readouterr().out
    assert [row["step"] for row in log() if "val_loss" in row] == [1]


def test_no_more_than_20_checkpoints_are_kept_unless_that_is_asked_for(data):
    run("--batch_size", 112, "--max_steps", 100, "--eval_interval", 1000)       # 112 sequences: 100 epochs
    assert len(list(Path("out/text").glob("epoch_*.pt"))) == 20


def test_resuming_with_fewer_steps_than_are_done_changes_nothing(data, capsys):
    run("--max_steps", 3)
    before = Path("out/text/last.pt").read_bytes()
    main([*RESUME, "--max_steps", "2"])
    assert "all steps are done: raise --max_steps" in capsys.readouterr().out
    assert Path("out/text/last.pt").read_bytes() == before


def test_a_last_checkpoint_that_is_a_broken_link_is_called_so(fails, data):
    Path("out/text").mkdir(parents=True)
    Path("out/text/last.pt").symlink_to("gone.pt")
    fails(main, [*QUICK, *RESUME], "out/text/last.pt is a broken link: repair it, or choose another --out")


def test_a_run_that_took_no_step_leaves_no_checkpoint_and_can_begin_again(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", None)
        with pytest.raises(TypeError):
            run("--max_steps", 2, "--lr", 0.1)
    assert not list(Path("out/text").glob("*.pt"))
    assert run("--max_steps", 1)[1]["args"]["lr"] == 1e-2


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_checkpoint_that_cannot_be_read_cannot_be_resumed(fails, data, content):
    Path("out/text").mkdir(parents=True)
    Path("out/text/last.pt").write_bytes(content)
    fails(main, [*QUICK, "--resume"], "last.pt is damaged, cut short, or not a checkpoint")


def test_weights_without_an_optimizer_cannot_be_resumed(fails, data):
    run("--max_steps", 2)
    Path("out/text/best.pt").replace("out/text/last.pt")
    fails(main, RESUME, "cannot be resumed: it has weights, but no state of a run")


# ------------------------------------------------------------------------------------------------ scale

def test_a_hundred_billion_tokens_take_little_memory(data):
    n = 100_000_000_000
    meta = json.loads(Path(data, "meta.json").read_text())
    del meta["checksum"]
    meta["train"]["tokens"], meta["val"]["tokens"] = n, 1025
    prepare.write_meta(data, meta)
    try:
        os.truncate(f"{data}/train.bin", 2 * n)         # a hole, which takes no room on the disk
        os.truncate(f"{data}/val.bin", 2 * 1025)
    except OSError as error:
        pytest.skip(f"this file system has no files of 200 GB: {error}")
    measure = ("import torch\n"
               "main = train.main\n"
               "train.main = lambda flags: (main(flags), print(train.peak_memory(torch.device('cpu'))))\n")
    [done] = ranks(1, "--data", data, "--block_size", 1024, "--max_steps", 3, "--batch_size", 1,
                   "--global_batch_size", 1, "--dtype", "float32", first=measure)
    assert done.returncode == 0, done.stderr
    assert "97,656,249 sequences of 1024 tokens" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 2e9
