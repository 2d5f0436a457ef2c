"""What README.md and docs/ claim: exercises that fit, commands that exist, a loop like that of train.py."""

import contextlib
import gzip
import io
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
from conftest import ROOT, at_step, log, ranks

import gpt
import prepare
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES_FILE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
EXERCISES = re.findall(
    r"^\*\*(.+?)\*\*.*?^```diff\n--- (\S+)\n(.*?)^```", EXERCISES_FILE, re.MULTILINE | re.DOTALL)
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [path.read_text(encoding="utf-8") for path in FILES]
NOTEBOOK = json.loads((ROOT / "docs" / "kaggle.ipynb").read_text(encoding="utf-8"))


def changed(source, diff):
    """Returns a text with a diff applied, whose hunks, between lines of @@, fit at exactly one place each."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    return source


def copy_of_the_programs(folder, file, diff):
    """Copies the four programs into a new folder, one of them changed. Returns the folder's absolute path."""
    folder = Path(folder).absolute()
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = changed(text, diff) if path.name == file else text
        (folder / path.name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name, file, diff, sizes", [
    *((*exercise, []) for exercise in EXERCISES),
    *((*exercise, ["--n_embd", "114", "--n_head", "2"]) for exercise in EXERCISES
      if exercise[0] == "Rotary positions")],
    ids=[*(name for name, _, _ in EXERCISES), "Rotary positions at head size 57"])
def test_each_exercise_fits_and_trains_in_two_processes(name, file, diff, sizes, data):
    flags = ["--data", data, "--max_steps", 2, "--block_size", 16, *sizes]
    first, second = ranks(2, *flags, source=copy_of_the_programs("copy", file, diff))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "step 2/2 | validation loss" in first.stdout


def test_there_are_exercises_for_all_that_one_may_want_to_change():
    assert len(EXERCISES) == EXERCISES_FILE.count("```diff") == 7


def test_the_loop_of_the_readme_gives_the_losses_of_train_py(monkeypatch):
    prepare.prepare(["python"], "data/python", "bpe", 2048, sample_size=12)
    [loop] = re.findall(r"^```python\n(from dataclasses.*?)^```", README, re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(loop.replace("range(10)", "range(3)"), {})
    monkeypatch.setattr(train, "show_sample_and_curves", lambda run: None)
    at_step(monkeypatch, 3, lambda model: train.signal.raise_signal(train.signal.SIGTERM))
    train.main(["--model", "nano", "--dtype", "float32", "--log_interval", "1"])
    losses = [row["loss"] for row in log("out/python") if "loss" in row]
    assert [float(line.split()[1]) for line in printed.getvalue().splitlines()] == losses and len(losses) == 3


def test_the_figures_of_the_quickstart_are_those_that_bench_py_measured():
    rows = bench.read_rows("quickstart.jsonl")
    for step in {row["step"] for row in rows}:
        found = [row["bits_per_byte"] for row in rows if row["step"] == step]
        assert f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" in README


def test_the_results_of_the_exercises_are_those_that_bench_py_measured():
    for result in bench.read_rows("exercises.jsonl"):
        assert f"{result['bits_per_byte']:.3f}" in README, result["change"]
        assert f"{result['bits_per_byte']:.3f}" in EXERCISES_FILE, result["change"]


def test_gradient_checkpointing_saves_the_memory_that_bench_py_measured():
    rows = bench.read_rows("exercises.jsonl")
    before, after = (row for row in rows if "gb" in row)
    speed = after["tokens_per_second"] / before["tokens_per_second"]
    assert f"needs {after['gb']:.2f} GB instead of {before['gb']:.2f}, at {speed:.0%} of the speed" in README
    text = " ".join(EXERCISES_FILE.split())
    assert f"drops from {before['gb']:.2f} GB to {after['gb']:.2f} GB, and speed to {speed:.2f} " in text


def test_the_trials_are_those_that_bench_py_measured_and_can_measure_again():
    results = bench.read_rows("trials.jsonl")
    assert {result["change"] for result in results} <= set(bench.TRIALS)
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "<!-- trials -->\n" + "\n".join(bench.table_of_trials(results)) in text
    for i, (_, _, file, diff) in enumerate(bench.TRIALS.values()):
        copy_of_the_programs(str(i), file, diff)        # fails unless the diff fits


def test_what_the_readme_shows_is_what_the_quickstart_printed():
    printed = (ROOT / "docs" / "quickstart.txt").read_text(encoding="utf-8")
    [samples] = re.findall(r"^```\n(after .*?)^```", README, re.MULTILINE | re.DOTALL)
    [output] = re.findall(r"^```\ndata/python.*?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in re.sub(r"^(after .* steps)?", "", samples + output, flags=re.MULTILINE).splitlines():
        assert line == "..." or line.strip() in printed


def test_the_readme_counts_its_lines_right():
    halves = [re.split(r"^# =+ plumbing$", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
              for name in ("gpt.py", "prepare.py", "sample.py", "train.py")]
    idea = sum(idea.count("\n") for idea, _ in halves)
    both = idea + sum(plumbing.count("\n") for _, plumbing in halves)
    assert f"{both:,} lines in four files, of which {idea:,} are the idea" in README


def test_the_lines_of_other_projects_are_those_that_bench_py_counted():
    nanogpt, nanochat = (row["files"] for row in bench.read_rows("lines.jsonl"))
    core, in_all = nanogpt["model.py"] + nanogpt["train.py"], sum(nanogpt.values())
    assert f"| {core} in two files (6 to 8), {in_all:,} in all | {sum(nanochat.values()):,} |" in README


def test_the_speeds_on_a_gpu_are_those_that_bench_py_measured():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row = re.search(r"ours, compiled: ([\d,]+) (.*? GB).*nanoGPT, compiled: ([\d,]+) (.*? GB)", text).groups()
    ours, theirs = (round(int(number.replace(",", "")), -3) for number in row[::2])
    assert f"| {ours:,} {row[1]} | {theirs:,} {row[3]} |" in README


@pytest.mark.parametrize("name", ["README.md", "docs/*.md", "*.py"])
def test_each_paper_has_its_link(name):
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(name)))
    assert not re.findall(r"(?:et\s+al\.|and [A-Z]\w+)\s+\d{4}(?!(?:,\s+|\]\()https://).*", text)


def lines_of_commands():
    """Lines of code in README and docs that call a program, and such calls in the text (but not --help, nor
    what needs an exercise to be done first)."""
    for text in [*TEXTS, *("".join(cell["source"]) for cell in NOTEBOOK["cells"])]:
        yield from re.findall(r"^[!]?((?:pip|python|torchrun|srun) .*)$", text, re.MULTILINE)
        yield from re.findall(r"`((?:python|torchrun) (?:(?!--help|\.md)[^`])*)`", text)


def test_torchrun_knows_the_flags_that_it_gets():
    from torch.distributed.run import get_args_parser
    flags = [line.partition("torchrun ")[2].partition("#")[0] for line in lines_of_commands()]
    flags = [flag.partition("&&")[0] for flag in flags if flag]
    assert any("--shutdown_timeout=240 " in flag for flag in flags)
    if "--shutdown" not in get_args_parser().format_help():     # PyTorch 2.11 and before
        flags = [flag.replace("--shutdown_timeout=240 ", "") for flag in flags]
    scripts = {get_args_parser().parse_args(shlex.split(flag)).training_script for flag in flags}
    assert scripts == {"train.py"}


def commands():
    """The command lines of the four programs in README and docs, without what surrounds them."""
    for line in lines_of_commands():
        for part in re.split(r"&&|#", line.replace('"$SLURM_JOB_ID"', "1")):
            if found := re.search(r"(train|prepare|sample)\.py( .*)?$", part.strip()):
                yield found[0]


SMALLER = {"train.py": ["--max_steps", "2", "--batch_size", "1", "--global_batch_size", "2", "--no-compile"],
           "prepare.py": ["--sample_size", "3", "--overwrite"], "sample.py": ["--max_new_tokens", "2"]}


@pytest.fixture
def little_of_all(monkeypatch):
    """What the commands need, in little: texts, data, checkpoints, GPT-2's weights, and tiny models."""
    text = "Once upon a time there was a small model. " * 800
    for path in ("books/a.txt", "kaggle/input/YOUR-DATASET/a.txt"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(text)
    Path("more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    prepare.prepare(["books"], "data/books", "gpt2")
    for name in ("text", "words", "bytes", "python", "docs"):
        shutil.copytree("data/books", f"data/{name}")
    tiny = gpt.GPTConfig(block_size=512, n_layer=1, n_head=1, n_embd=8)
    monkeypatch.setattr(train, "MODELS", dict.fromkeys(gpt.MODELS, tiny))
    monkeypatch.setattr(gpt.GPT, "from_pretrained", lambda name: gpt.GPT(tiny).eval())
    monkeypatch.setattr(sample, "has_other_tokenizer", lambda name: False)
    monkeypatch.setitem(train.sys.modules, "wandb", SimpleNamespace(init=lambda **options: None))
    for name in ("books", "words", "python"):
        Path("out", name).mkdir(parents=True)
        meta = {"data": {"tokenizer": "gpt2", "vocabulary": ""}}
        gpt.save_checkpoint(f"out/{name}/best.pt", gpt.GPT(tiny), meta)


@pytest.mark.usefixtures("little_of_all", "bare")
@pytest.mark.parametrize("command", sorted(set(commands())))
def test_each_command_of_readme_and_docs_runs(command):
    program, *flags = shlex.split(command.replace(" /", " "))
    if program == "train.py":
        shutil.rmtree("out")
    flags += SMALLER[program][2 if "--minutes" in flags else 0:]
    if "--minutes" in flags:
        flags[flags.index("--minutes") + 1] = "0.0001"
    if "--export" in flags:
        pytest.importorskip("transformers")
    {"train.py": train, "prepare.py": prepare, "sample.py": sample}[program].main(flags)


def test_the_table_of_scaling_follows_from_its_formula():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    formula, links = {}, {"NVLink": 450e9, "InfiniBand": 8 * 50e9, "10 Gb Ethernet": 1.25e9}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], formula)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    for link, row in zip((cells.pop(3) for cells in rows), rows, strict=True):
        n, sequences, computation, exchange, speed, share = (
            float(re.search(r"[\d.,]+", cell)[0].replace(",", "")) for cell in row)
        bandwidth, length = links[link.partition(",")[0]], 512 if "CPUs" in row[0] else 1024
        seconds = formula["step_seconds"](computation / 1e3, n, bandwidth)
        assert n * sequences * length / seconds / 1e6 == pytest.approx(speed, rel=0.02)
        assert computation / seconds / 10 == pytest.approx(share, abs=1)     # the table rounds
        assert 2e3 * (n - 1) / n * 4 * 124_439_808 / bandwidth == pytest.approx(exchange, rel=0.03)
