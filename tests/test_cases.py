"""What happens outside of a laboratory: odd files and names, streams that close, two processes in one folder,
memory that runs out, and all the ways in which a session ends."""

import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, RESUME, ROOT, at_step, documents, log, run

import gpt
import prepare
import sample
import train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def shell(command, **environment):
    """Runs a command line in which PYTHON is this one, and the four programs lie in ROOT."""
    command = command.replace("PYTHON ", f"'{sys.executable}' '{ROOT}'/")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100,
                          env={**ENVIRONMENT, **environment})


def failing(*args, **options):
    raise RuntimeError("broken")


# ------------------------------------------------------------------------- what training does not need

@pytest.mark.parametrize("name", ["complete", "get_tokenizer", "draw_curves"])
def test_a_sample_or_picture_that_fails_is_reported_once(data, monkeypatch, capsys, name):
    monkeypatch.setattr(train, name, failing)
    _, meta = run("--max_steps", 4, "--eval_interval", 2)
    assert meta["step"] == 4 and len([row for row in log() if "val_loss" in row]) == 2
    assert capsys.readouterr().out.count("(RuntimeError: broken)") == 1


def test_a_backend_of_matplotlib_that_is_missing_does_not_end_a_run(data):
    pytest.importorskip("matplotlib")
    done = shell(f"PYTHON train.py --data {data} --n_layer 1 --n_embd 8 --block_size 16 --max_steps 2",
                 MPLBACKEND="module://none.of.these")
    assert done.returncode == 0, done.stderr
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


@pytest.mark.usefixtures("bare")
def test_what_git_or_a_tracker_cannot_do_does_not_end_a_run(data, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **options: "vé".encode("latin-1"))
    Path("wandb.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run("--max_steps", 1, "--wandb")[1]["step"] == 1
    assert "warning: skipping wandb (TypeError: Descriptors cannot be" in capsys.readouterr().out


def test_a_package_that_is_broken_is_reported_in_one_line(fails, checkpoint, monkeypatch):
    Path("transformers.py").write_text("raise ImportError('tokenizers>=0.22 is required')")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    fails(sample.main, ["--export", "exported", "--checkpoint", checkpoint],
          "a package cannot be imported (tokenizers>=0.22 is required)")


@pytest.mark.parametrize("name", ["init", "log"])
@pytest.mark.usefixtures("bare")
def test_a_tracker_that_fails_does_not_end_a_run(data, monkeypatch, capsys, name):
    tracker = SimpleNamespace(log=failing)
    init = failing if name == "init" else lambda **options: tracker
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert run("--max_steps", 2, "--wandb", "--log_interval", 1)[1]["step"] == 2
    assert capsys.readouterr().out.count("warning: skipping wandb (RuntimeError: broken)") == 1


# -------------------------------------------------------------------------------------------- folders

@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="needs a second file system, /dev/shm")
def test_data_may_lie_on_another_disk():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        Path("data").mkdir()
        Path("data/books").symlink_to(other)
        Path("books.txt").write_text("one")
        prepare.main(["books.txt", "--tokenizer", "bytes"])
        assert documents("data/books") == ["one"]
        Path("more.jsonl").write_text('{"text": "two"}\nno JSON')
        with pytest.raises(prepare.UserError):
            prepare.prepare(["more.jsonl"], "data/books", "bytes")
        assert documents("data/books") == ["one"] and ".unfinished" not in os.listdir(other)


def test_a_target_that_cannot_be_written_is_found_before_the_work(fails, monkeypatch):
    Path("books.txt").write_text("one")
    Path("data").mkdir()
    Path("data/books").touch()
    monkeypatch.setattr(prepare, "find_files", failing)
    fails(prepare.main, ["books.txt", "--tokenizer", "bytes"], "data/books (File exists): fix that first")


def test_a_folder_is_held_by_one_process_and_free_again_however_that_ends(fails, data):
    holder = subprocess.Popen([sys.executable, "-c", "import prepare, time\nwith prepare.held('out/text'), "
                               "prepare.held('data/text'): print(flush=True); time.sleep(99)"],
                              stdout=subprocess.PIPE, env=ENVIRONMENT)
    holder.stdout.readline()
    fails(train.main, [*QUICK, "--out", "out/text"], "another process is writing to out/text: wait")
    fails(prepare.main, ["text.txt", "--tokenizer", "bytes", "--overwrite"], "is writing to data/text")
    assert os.listdir("out/text") == [".lock"]
    holder.kill()
    holder.wait()
    assert run("--max_steps", 1)[1]["step"] == 1
    prepare.main(["text.txt", "--tokenizer", "bytes", "--overwrite"])


def test_data_are_not_overwritten_unless_that_is_asked_for(fails):
    for text in ("books.txt", "books/a.txt"):
        Path(text).parent.mkdir(exist_ok=True)
        Path(text).write_text(text)
    prepare.main(["books.txt", "--tokenizer", "bytes"])
    for source in ("books.txt", "books"):
        fails(prepare.main, [source, "--tokenizer", "bytes"], "data/books already exists: choose another")
    assert documents("data/books") == ["books.txt"]
    prepare.main(["books", "--tokenizer", "bytes", "--overwrite"])
    assert documents("data/books") == ["books/a.txt"]


@pytest.fixture
def old_data():
    """A data folder, data/a, and a text for a new one. Returns the contents of the files in data/a."""
    Path("a.txt").write_text("old")
    prepare.main(["a.txt", "--tokenizer", "bytes"])
    Path("a.txt").write_text("new")
    return contents("data/a")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def replace_open(monkeypatch):
    """Replaces open, wherever Python has it."""
    def replace(function):
        for name in ("builtins.open", "io.open"):
            monkeypatch.setattr(name, function)
        if hasattr(pathlib, "_NormalAccessor"):     # Python 3.10
            monkeypatch.setattr(pathlib._NormalAccessor, "open", staticmethod(function))
    return replace


@pytest.mark.parametrize("n_moves", range(8))
def test_old_data_stay_whole_where_new_data_cannot_take_their_place(fails, old_data, monkeypatch, n_moves):
    replace, moved = os.replace, []

    def limited(source, target):
        if len(moved) == n_moves:
            moved.append("failed")
            raise PermissionError(1, "Operation not permitted", str(target))
        moved.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", limited)
    fails(prepare.main, ["a.txt", "--tokenizer", "bytes", "--overwrite"], "Operation not permitted")
    assert contents("data/a") == old_data


@pytest.mark.parametrize("n_moves", range(8))
def test_old_data_stay_whole_where_a_signal_comes_during_a_move(old_data, monkeypatch, n_moves):
    replace, moved = os.replace, []

    def interrupted(source, target):
        replace(source, target)
        moved.append(source)
        if len(moved) == n_moves + 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["a.txt", "--tokenizer", "bytes", "--overwrite"])
    assert stop.value.code == 130 and contents("data/a") == old_data


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_old_data_stay_whole_where_the_disk_is_full(fails, old_data, replace_open, name):
    real_open = io.open

    def full(path, mode="r", *args, **options):
        is_new = str(path).endswith(f"unfinished/{name}") and "w" in mode
        return real_open("/dev/full" if is_new else path, mode, *args, **options)

    replace_open(full)
    fails(prepare.main, ["a.txt", "--tokenizer", "bytes", "--overwrite"], "No space left on device")
    assert contents("data/a") == old_data


@pytest.mark.parametrize("name", ["..", "../corpus", ".", "a/../../corpus", "a/.unfinished"])
def test_a_name_leads_nowhere_but_into_data(fails, name):
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("precious")
    fails(prepare.main, ["nothing.txt", "--name", name], "--name must be the name of a folder in data")
    with pytest.raises(prepare.UserError):
        prepare.prepare(["nothing.txt"], "data/../corpus", "bytes")
    assert Path("corpus/a.txt").read_text() == "precious"


def test_a_run_that_another_process_has_meanwhile_written_is_not_overwritten(fails, data, monkeypatch):
    set_up = train.set_up

    def slow(*args):
        monkeypatch.setattr(train, "set_up", set_up)
        run("--max_steps", 2)
        return set_up(*args)

    monkeypatch.setattr(train, "set_up", slow)
    fails(train.main, [*QUICK, "--out", "out/text", "--max_steps", "1"], "another process has just written")
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


@pytest.mark.usefixtures("bare")
def test_a_checkpoint_that_changes_while_it_is_read_is_not_overwritten(fails, data, monkeypatch):
    run("--max_steps", 1)
    load = train.load_checkpoint

    def slow(path):
        loaded = load(path)
        os.utime(path, (1, 1))
        return loaded

    monkeypatch.setattr(train, "load_checkpoint", slow)
    fails(train.main, [*RESUME, "--max_steps", "2"], "another process has just written to out/text")


def test_an_export_does_not_overwrite(fails, checkpoint, data):
    fails(sample.main, ["--checkpoint", checkpoint, "--export", data], "data/text already exists: choose")
    prepare.load_meta(data)


@pytest.mark.parametrize("limit", [1000, 30_000])       # the model is smaller than its tokenizer
def test_an_export_to_a_full_disk_leaves_nothing(fails, checkpoint, limit_files, limit):
    Path("exports").mkdir()
    limit_files(limit)
    fails(sample.main, ["--checkpoint", checkpoint, "--export", "exports/mine"], "cannot write exports/mine")
    assert os.listdir("exports") == []


def test_a_file_with_a_short_name_is_not_passed_over_in_silence(monkeypatch, capsys):
    Path("shakespeare").mkdir()
    monkeypatch.setattr(prepare, "download", failing)
    with pytest.raises(RuntimeError):
        prepare.main(["shakespeare", "--tokenizer", "bytes"])
    assert "write ./shakespeare for a file or folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- documents

@pytest.mark.parametrize("name", [
    "part[0].txt", "part*.jsonl", "part[0].parquet", "pa{r,}t?.parquet", "[0]/a.txt"])
def test_a_name_is_a_name_and_not_a_pattern(name):
    for path in (name, "part0.parquet", "part0.txt", "0/a.txt"):
        text = "right" if path == name else "wrong"
        Path(path).parent.mkdir(exist_ok=True)
        if path.endswith(".parquet"):
            pytest.importorskip("datasets").Dataset.from_dict({"text": [text]}).to_parquet(path)
        else:
            Path(path).write_text(json.dumps({"text": text}) if path.endswith(".jsonl") else text)
    prepare.prepare([name], "data/part", "bytes")
    assert documents("data/part") == ["right"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_text_that_is_null_is_skipped_and_counted(capsys, kind):
    texts = [*map(str, range(50)), None, None, "last"]
    if kind == "parquet":
        pytest.importorskip("datasets").Dataset.from_dict({"text": texts}).to_parquet("rows.parquet")
    else:
        Path("rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare.prepare([f"rows.{kind}"], "data/rows", "bytes")
    assert documents("data/rows") == [*map(str, range(50)), "last"]
    assert "skipped 2 documents whose text is null" in capsys.readouterr().err
    prepare.prepare([f"rows.{kind}"], "data/rows", "bytes", sample_size=51)
    assert documents("data/rows") == [*map(str, range(50)), "last"]
    assert "skipped 2 documents whose text is null" in capsys.readouterr().err


def test_linked_folders_are_read_once_hidden_ones_not_and_what_is_left_out_is_said(capsys):
    for path in ("books/a.txt", "books/a.md", "books/b.md", "books/.git/c.txt", "elsewhere/d.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path)
    Path("books/linked").symlink_to("../elsewhere")
    Path("books/linked again").symlink_to("../elsewhere")
    Path("elsewhere/loop").symlink_to("../books")
    Path("books/dangling.txt").symlink_to("nowhere.txt")
    prepare.prepare(["books"], "data/books", "bytes")
    assert documents("data/books") == ["books/a.txt", "elsewhere/d.txt"]
    assert "books: files taken: 2, skipped: 3 (.md, broken links)" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["hf:my/corpus", "hf:my/corpus:part"])
def test_a_dataset_of_the_hub_is_not_taken_for_a_folder_of_that_name(fails, source):
    Path("my/corpus").mkdir(parents=True)
    fails(prepare.main, [source, "--tokenizer", "bytes"], "my/corpus is a file or folder here: leave out hf:")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2", "bpe"])
@pytest.mark.parametrize("name", ["tales.txt", "tales.jsonl"])
def test_end_of_text_written_in_a_text_ends_a_document(name, tokenizer):
    text = "one<|endoftext|>two" + " ending" * 9
    Path(name).write_text(json.dumps({"text": text}) if name.endswith("l") else text)
    meta = prepare.prepare([name], "data/tales", tokenizer, 260)
    assert meta["train"]["documents"] + meta["val"]["documents"] == 2


@pytest.mark.parametrize("filler", ["x", "。", "汉字。\n", "<", " "])
def test_end_of_text_is_never_cut_in_two(monkeypatch, filler):
    monkeypatch.setattr(prepare, "CHUNK", 40)
    for n in range(28, 42):
        Path("a.txt").write_text((filler * 40)[:n] + "<|endoftext|>" + filler * 50)
        meta = prepare.prepare(["a.txt"], "data/a", "bytes")
        assert meta["train"]["documents"] + meta["val"]["documents"] == 2


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_a_row_may_have_a_million_spaces(tokenizer):
    text = "a" + " " * 1_100_000 + "b"
    Path("a.jsonl").write_text(json.dumps({"text": text}))
    meta = prepare.prepare(["a.jsonl"], "data/a", tokenizer, 260)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(text)


def test_a_prompt_may_have_a_million_spaces():
    tokenizer = prepare.get_tokenizer("gpt2")
    assert tokenizer.decode(sample.encode_prompt(tokenizer, " " * 1_100_000 + "b")) == " " * 1_100_000 + "b"


# ------------------------------------------------------------------------------- how a session ends

def test_under_nohup_the_end_of_the_terminal_does_not_end_a_run(data, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda model: os.kill(os.getpid(), signal.SIGHUP))
    assert run("--max_steps", 4)[1]["step"] == 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_sample_acts_like_ctrl_c(checkpoint, monkeypatch, capsys, name):
    def interrupted(*args, **options):
        yield "c"
        signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(sample, "complete", interrupted)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--prompt", "ab"])
    assert stop.value.code == 130 and capsys.readouterr().out == "abc\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_prepare_leaves_nothing_behind(monkeypatch, name):
    monkeypatch.setattr(prepare, "find_files", lambda *args: signal.raise_signal(signal.Signals[name]))
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--tokenizer", "bytes"])
    assert stop.value.code == 130 and not Path("data/python").exists()


def test_under_nohup_the_end_of_the_terminal_does_not_end_prepare(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Path("books.txt").write_text("one")
    monkeypatch.setattr(prepare, "find_files", lambda source, folder: (
        signal.raise_signal(signal.SIGHUP) or [Path(source)]))
    prepare.main(["books.txt", "--tokenizer", "bytes"])
    assert documents("data/books") == ["one"]


def test_ctrl_c_ends_a_dry_run_at_once(data, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda model: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run("--dry_run")
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("bare")
def test_last_is_saved_by_the_clock_too(data, monkeypatch):
    seen = []
    at_step(monkeypatch, 4, lambda model: seen.append(gpt.load_checkpoint("out/text/last.pt")[1]["step"]))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    run("--max_steps", 5)
    assert seen == [3]


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")], ids=repr)
@pytest.mark.parametrize("owner, name, main, flags, says", [
    (train, "backward", train.main, [*QUICK, "--out", "out/new"], "lower --batch_size"),
    (train, "backward", train.main, [*QUICK, "--dry_run"], "lower --batch_size"),
    (gpt.GPT, "init_weights", train.main, [*QUICK, "--out", "out/new"], "lower --batch_size, or choose"),
    (gpt.GPT, "generate", sample.main, ["--checkpoint", "out/text/best.pt"], "choose a smaller")])
@pytest.mark.usefixtures("data", "checkpoint")
def test_out_of_memory_is_one_line_that_says_what_to_lower(
        fails, monkeypatch, error, owner, name, main, flags, says):
    def raise_it(*args, **options):
        raise error

    monkeypatch.setattr(owner, name, raise_it)
    fails(main, flags, f"out of memory: {says}")
    assert not Path("out/new/last.pt").exists()


def test_a_checkpoint_too_large_for_the_memory_is_not_called_damaged(fails, checkpoint, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(torch, "load", full)
    fails(sample.main, ["--checkpoint", checkpoint], "out of memory: choose a smaller --checkpoint")


def test_what_a_message_quotes_is_not_taken_for_a_lack_of_memory(fails):
    fails(sample.main, ["--checkpoint", "out of memory.pt"], "there is no checkpoint out of memory.pt")


@pytest.mark.parametrize("name", ["meta.json", "vocabulary.tiktoken", "train.bin"])
def test_data_that_may_not_be_read_are_not_called_damaged(fails, data, replace_open, name):
    def refuse(path, *args, **options):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **options)

    real_open = open
    replace_open(refuse)
    fails(train.main, QUICK, "Permission denied")


def test_a_name_stays_in_data_even_as_an_absolute_path(fails):
    Path("books.txt").write_text("one")
    fails(prepare.main, ["books.txt", "--tokenizer", "bytes", "--name", str(Path.cwd() / "new")],
          "--name must be the name of a folder in data, not ")
    assert not Path("new").exists()


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"RANK": "3"}, {"RANK": "-1"}, {"RANK": "abc"}, {"WORLD_SIZE": "1.0"},
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}],
    ids=str)
def test_an_environment_that_contradicts_itself_is_one_line(fails, data, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fails(train.main, [*QUICK, "--out", "out/new"], "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
          "are not as torchrun sets them: use torchrun, or unset them")


def test_processes_that_cannot_meet_say_so_in_one_line(fails, data, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with socket.create_server(("127.0.0.1", 0)) as server:      # another program has the port
        for port in ("abc", "99999", server.getsockname()[1]):
            monkeypatch.setenv("MASTER_PORT", str(port))
            fails(train.main, [*QUICK, "--out", "out/new"], "use torchrun, or another port")
    assert not Path("out/new").exists()


@pytest.mark.parametrize("main, flag", [
    (train.main, "--init"), (train.main, "--out"), (sample.main, "--checkpoint"), (sample.main, "--export"),
    (prepare.main, "--name"), (prepare.main, "--tokenizer")])
def test_a_flag_that_an_unset_variable_left_empty_is_refused(fails, checkpoint, main, flag):
    fails(main, [flag, ""], f"argument {flag}: expected a value, not an empty text (see --help)")


# ----------------------------------------------------------------------------------------------- streams

@pytest.mark.parametrize("command, status", [
    ("PYTHON sample.py --prompt a --max_new_tokens 2000 | head -c 1", 141),
    ("PYTHON sample.py --show_probs --prompt abcdef | head -n 1", 141),
    ("PYTHON prepare.py text.txt --tokenizer bytes --name new | true", None)])
def test_a_reader_that_goes_away_ends_it_quietly(checkpoint, command, status):
    Path("text.txt").write_text("one")
    done = shell(f"{command}; exit ${{PIPESTATUS[0]}}")
    notes = ["sampling from out/text/best.pt", "probability, token, its likeliest rivals; > marks new tokens"]
    assert [line for line in done.stderr.splitlines() if line not in notes] == []
    assert status in (None, done.returncode)
    assert "prepare" not in command or documents("data/new") == ["one"]


@pytest.mark.parametrize("command", [
    "PYTHON train.py --data data/text --n_layer 1 --n_embd 8 --block_size 16 --max_steps 2 --out new 2>&-",
    "PYTHON sample.py --prompt a --checkpoint out/text/best.pt --max_new_tokens 3 >&- 2>&-",
    "PYTHON prepare.py text.txt --tokenizer bytes --name new >&- 2>&-"])
def test_streams_may_be_closed_from_the_beginning(data, checkpoint, command):
    assert shell(command).returncode == 0
    assert "train.py" not in command or gpt.load_checkpoint("new/last.pt")[1]["step"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [
    "PYTHON prepare.py text.txt --tokenizer bpe --name new 2>/dev/full",
    "PYTHON sample.py --prompt a 2>/dev/full"])
def test_notes_that_nobody_can_read_end_nothing(checkpoint, command):
    Path("text.txt").write_text("one")
    printed = shell(command).stdout
    assert printed.startswith("a" if "sample.py" in command else "data/new: 1 documents")


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_turned_off(checkpoint, monkeypatch, capsys, name, value):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")      # the same as unset
    sample.main(["--show_probs", "--max_new_tokens", "2"])
    assert "\033[" in capsys.readouterr().out
    monkeypatch.setenv(name, value)
    sample.main(["--show_probs", "--max_new_tokens", "2"])
    assert "\033[" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------- the next step

def test_a_run_without_an_evaluation_is_sampled_from_its_last_checkpoint(data, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    run("--max_steps", 9)
    sample.main(["--max_new_tokens", "2"])
    assert f"sampling from {Path('out/text/last.pt')}" in capsys.readouterr().err


def test_the_weights_of_a_run_that_diverged_are_refused(fails, model, checkpoint):
    with torch.no_grad():
        model.ln_f.bias[3] = torch.nan
    gpt.save_checkpoint(checkpoint, model, {"data": {"tokenizer": "bytes", "vocabulary": ""}})
    fails(sample.main, ["--checkpoint", checkpoint], "cannot be used: its run diverged")
    gpt.save_checkpoint(checkpoint, model, {})
    fails(sample.main, ["--checkpoint", checkpoint], "cannot be used: it is not from train.py")


@pytest.mark.parametrize("flags", [[], ["--show_probs"], ["--temperature", "0"]], ids=str)
def test_a_model_whose_logits_are_not_finite_is_refused(fails, model, checkpoint, flags):
    with torch.no_grad():
        model.ln_f.weight.fill_(1e38)
        model.lm_head.weight.fill_(10)
    gpt.save_checkpoint(checkpoint, model, {"data": {"tokenizer": "bytes", "vocabulary": ""}})
    fails(sample.main, ["--checkpoint", checkpoint, *flags], "the model's logits are not finite: its run ")


def test_a_run_can_be_given_by_its_folder(checkpoint, capsys):
    sample.main(["--checkpoint", "out/text", "--prompt", "ab", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("ab")


def test_ctrl_c_leaves_what_there_is_of_each_sample(checkpoint, monkeypatch, capsys):
    def interrupted(*args, seed, **options):
        yield "c"
        if seed == 1338:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "complete", interrupted)
    with pytest.raises(SystemExit):
        sample.main(["--num_samples", "3", "--prompt", "ab"])
    assert capsys.readouterr().out == "--- sample 1 ---\nabc\n--- sample 2 ---\nabc\n"


def test_data_that_were_moved_are_found_with_a_flag(fails, data):
    run("--max_steps", 1)
    Path(data).rename("data/moved")
    fails(train.main, RESUME, "or pass the right folder, such as --data data/NAME")
    train.main([*RESUME, "--data", "data/moved", "--max_steps", "2"])
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 2


def test_a_prompt_that_begins_with_a_dash_can_be_given(fails, checkpoint, capsys):
    fails(sample.main, ["--prompt", "-x"], 'or --flag="-VALUE" if VALUE begins with -')
    sample.main(["--prompt=-x", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("-x")


def test_a_hub_out_of_reach_is_said_to_be(fails, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def offline(*args, **options):
        raise OSError("We couldn't connect to the hub.\nSecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    fails(sample.main, ["--checkpoint", "some/model"], "(We couldn't connect to the hub.)")
