"""How fast this is, beside what one would use instead, and beside what the machine can do.

    pip install -e ".[bench]"
    python tests/bench.py                       all rows for a CPU, one to two hours
    python tests/bench.py generation prepare    the rows of these groups
    python tests/bench.py quickstart --seeds 5  the quickstart with five seeds, into docs/quickstart.jsonl
    python tests/bench.py exercises             bits per byte with each exercise, into docs/exercises.jsonl
    python tests/bench.py trials --steps 1600   what each choice of nano gains, into docs/trials.jsonl
    python tests/bench.py patterns --texts FOLDER       bytes per token of ways to split text into words
    python tests/bench.py lines --clones FOLDER FOLDER  other projects' lines, into docs/lines.jsonl
    python tests/bench.py --device cuda         training and generation on a GPU
    python tests/bench.py --device cuda --nanogpt FOLDER        also nanoGPT, out of a clone of it
    python tests/bench.py --table NAME          also writes the table into docs/benchmarks.md

Each row is a ratio of medians. Its two sides are measured in turn, each in a process of its own, so that what
else the machine does meets both. "Plain" is this model as it is often written: float32, all logits at once,
no cache, eager. "Hugging Face" is GPT2LMHeadModel with the same weights, in the same dtype as ours.
"""

import argparse
import gettext
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAKESPEARE, provide_gpt2_vocabulary

import gpt
import prepare
import train
from gpt import mixed_precision

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


# --------------------------------------------------------------------------------------------- measuring

class Side:
    """One side of a comparison: a process that calls make(*args) once, and what that returns at each call,
    which returns how much it did. A call returns amounts per second; `memory` is then the process's peak
    resident memory, or on a GPU that of its tensors, in GB."""

    def __init__(self, make, *args):
        self.connection, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()      # until it has warmed up, so that no other side is measured meanwhile

    def __call__(self):
        self.connection.send(True)
        rate, self.memory = self.connection.recv()
        return rate


def serve(connection, make, args):
    work = make(*args)
    work()                                      # what is slow only once is not measured
    connection.send(True)
    while connection.recv():
        started = time.perf_counter()
        amount = work()
        connection.send((amount / (time.perf_counter() - started), peak_memory()))


def peak_memory():
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024 / 1e9


def medians(repeats, *sides):
    """Calls the sides in turn, and returns the median of each."""
    return [statistics.median(values) for values in zip(*([side() for side in sides] for _ in range(repeats)),
                                                        strict=True)]


def close(*sides):
    for side in sides:
        side.connection.send(False)
        side.process.join()


OUTPUT = []     # the lines printed


def say(line):
    OUTPUT.append(line)
    print(line, flush=True)


def row(what, ours, other, ratio, target=""):
    say(f"| {what} | {ours} | {other} | {ratio} | {target} |")


def write_table(name, lines=OUTPUT):
    """Replaces what is between <!-- name --> and <!-- end --> in docs/benchmarks.md by these lines."""
    path = ROOT / "docs" / "benchmarks.md"
    before, mark, after = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    end = after.index("<!-- end -->")
    path.write_text(before + mark + "\n".join(lines) + "\n" + after[end:], encoding="utf-8")


def write_rows(name, rows):
    """Writes dictionaries into a file in docs/, one a line."""
    Path(ROOT, "docs", name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(name):
    """The dictionaries that write_rows wrote."""
    return [json.loads(line) for line in Path(ROOT, "docs", name).read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------- the machine

def limits(device):
    """Prints what the machine can do at most."""
    n = 2048 if device == "cpu" else 8192
    fast = fast_dtype(device)
    for dtype in dict.fromkeys((torch.float32, fast)):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rate = 2 * n ** 3 / seconds(lambda a=a, b=b: a @ b, device) / 1e9
        exact = " (no TF32)" if device == "cuda" and dtype == torch.float32 else ""
        say(f"- {n}³ matmuls in {name_of(dtype)}{exact}: {rate:,.0f} GFLOP/s")
    source = torch.randn(2 ** 26, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    say(f"- memory copies: {rate:,.0f} GB/s, read and written")


def fast_dtype(device):
    """The dtype of matmuls that train.py chooses by default."""
    return gpt.choose_dtype(None, torch.device(device))


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def seconds(work, device, repeats=10):
    """Returns the median time of one call, after a first one that is not counted."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def product_weights(model):
    """The matrices that each generated token is multiplied with."""
    return [*(w for w in model.h.parameters() if w.dim() == 2), model.lm_head.weight]


# ----------------------------------------------------------------------------------------------- training

def hugging_face(model):
    """Returns a GPT2LMHeadModel with the weights of this model."""
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder)


def nanogpt(name):
    """Returns the model of that name as nanoGPT writes it, and its optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(os.environ["NANOGPT"], "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fields = ("block_size", "n_layer", "n_head", "n_embd")
    sizes = {field: getattr(gpt.MODELS[name], field) for field in fields}
    model = module.GPT(module.GPTConfig(vocab_size=50304, **sizes)).cuda()
    return model, model.configure_optimizers(1e-4, 1e-4, (0.9, 0.95), "cuda")


def training(kind, name, batch_size, length, device="cpu", dtype=None, compiled=False, optimizer="adamw"):
    """Takes steps of AdamW on random tokens, as train.py does or as others do."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")      # as train.py does
    device = torch.device(device)
    model = gpt.GPT(gpt.MODELS[name]).to(device)
    ids = torch.randint(model.config.vocab_size, (batch_size, length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    dtype = torch.float32 if kind == "plain" else dtype or fast_dtype(device)
    context = mixed_precision(device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if kind == "ours":
        train.keep_freed_memory()
        optimizers = train.make_optimizers(optimizer, model, 1e-4, device, dtype)
        net = train.compiled(model, block_by_block=False) if compiled else model
    elif kind == "nanoGPT":
        model, optimizer = nanogpt(name)
        whole = torch.compile(model) if compiled else model
        net = lambda x, y: whole(x, y)[1]                                                       # noqa: E731
    else:
        if kind == "plain":
            net = lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())             # noqa: E731
        else:
            model = hugging_face(model).to(device).train()
            net = lambda x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())      # noqa: E731
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    n_steps = 50 if device.type == "cuda" else 1 if name == "gpt2" else 10

    def steps():
        for _ in range(n_steps):
            if kind == "ours":
                loss = train.backward(net, [(inputs, targets)], scaler, context)
                grad_norm = train.clip_gradients(model, optimizers, scaler, 1.0)
                train.update(optimizers, scaler, loss.item(), grad_norm, 1e-4)
                continue
            with context:
                loss = net(inputs, targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss.item()
        return n_steps * inputs.numel()
    return steps


def bench_training(repeats):
    for name, batch_size, length, target, memory_target in (
            ("gpt2", 4, 512, "2.0", "0.75"), ("nano", 16, 128, "1.5", "")):
        what = f"training `{name}`, B {batch_size}, T {length}"
        sides = [Side(training, kind, name, batch_size, length) for kind in ("ours", "plain", "Hugging Face")]
        if name == "nano":
            sides.append(Side(training, "ours", name, batch_size, length, "cpu", None, False, "muon"))
        ours, plain, theirs, *muon = medians(repeats, *sides)
        for kind, other in (("plain", plain), ("Hugging Face", theirs)):
            row(f"{what}: tokens/s", f"{ours:,.0f}", f"{kind} {other:,.0f}", f"{ours / other:.2f}",
                f"≥ {target}" if kind == "plain" else "")
        ours_memory, plain_memory = sides[0].memory, sides[1].memory
        row(f"{what}: peak memory", f"{ours_memory:.2f} GB", f"plain {plain_memory:.2f} GB",
            f"{ours_memory / plain_memory:.2f}", f"≤ {memory_target}" if memory_target else "")
        close(*sides)
        for rate in muon:
            row(f"{what}, with Muon: tokens/s", f"{rate:,.0f}", f"with AdamW {ours:,.0f}",
                f"{rate / ours:.2f}")
        bench_loading(what, batch_size, length, batch_size * length / ours)


def bench_loading(what, batch_size, length, step_seconds):
    """Compares the time to read a step's batch, out of few or very many tokens, with the time of a step."""
    class World:
        rank, size, device = 0, 1, torch.device("cpu")

    offsets = range(0, 20 * batch_size, batch_size)
    for exponent in (6, 11 if length >= 512 else 10):      # the order of an epoch takes 4 bytes a sequence
        with open("sparse.bin", "wb") as file:
            file.truncate(2 * 10 ** exponent)
        sequences = train.Sequences(np.memmap("sparse.bin", prepare.TOKEN_DTYPE, "r"), length, length, 50257)
        batches = train.Batches(sequences, batch_size, batch_size, 1337, World)
        batch_seconds = seconds(lambda batches=batches: list(map(batches, offsets)), "cpu", 25) / len(offsets)
        row(f"{what}: reading a batch out of 10^{exponent} tokens", f"{batch_seconds * 1e3:.2f} ms",
            f"step {step_seconds * 1e3:,.0f} ms", f"{batch_seconds / step_seconds:.2%}", "≤ 1%")
    os.remove("sparse.bin")


def bench_cuda_training(repeats):
    """Prints, for both sides, tokens/s, the peak memory of tensors, and how fast the FLOPs of the matmuls are
    done, in percent of the speed of a large matmul."""
    large = torch.cuda.get_device_properties(0).total_memory > 40e9
    pairs = [("ours", "plain"), ("ours", "Hugging Face")]
    if "NANOGPT" in os.environ:
        pairs += [("ours", "nanoGPT"), ("ours, compiled", "nanoGPT, compiled")]
    for name, batch_size, length, dtype, comparisons in (
            ("gpt2", 12 if large else 4, 1024, fast_dtype("cuda"), pairs),      # a T4 has memory for 4
            ("gpt2-92m", 16, 512, torch.float16, [("ours", "Hugging Face"), ("ours, compiled", "ours")])):
        config = gpt.MODELS[name]
        parameters = sum(w.numel() for w in product_weights(gpt.GPT(config)))
        # FLOPs per token, as in appendix B of Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311.
        flops = 6 * parameters + 12 * config.n_layer * config.n_embd * length
        a, b = torch.randn(2, 8192, 8192, device="cuda").to(dtype)
        peak = 2 * 8192 ** 3 / seconds(lambda a=a, b=b: a @ b, "cuda")
        for pair in comparisons:
            sides = [Side(training, kind.removesuffix(", compiled"), name, batch_size, length, "cuda", dtype,
                          kind.endswith("compiled")) for kind in pair]
            rates = medians(repeats, *sides)
            row(f"training `{name}`, B {batch_size}, T {length}, {name_of(dtype)}",
                *(f"{kind}: {rate:,.0f} tokens/s, {side.memory:.1f} GB, {rate * flops / peak:.0%}"
                  for kind, rate, side in zip(pair, rates, sides, strict=True)), f"{rates[0] / rates[1]:.2f}")
            close(*sides)


# --------------------------------------------------------------------------------------------- generation

def generation(kind, batch_size, n, device="cpu"):
    """Generates n tokens, the likeliest each time; for "products", only multiplies the weights with as many
    rows as often; for "plain", in float32 and without a cache."""
    torch.manual_seed(0)
    dtype = fast_dtype(device)
    model = gpt.GPT(gpt.MODELS["gpt2"]).eval()
    ids = torch.full((batch_size, 1), 50256, device=device)
    if kind == "plain":
        @torch.inference_mode()
        def work():
            context = ids
            for _ in range(n):
                context = torch.cat([context, model(context)[:, -1:].argmax(-1)], dim=1)
            return n * batch_size
        return work
    if kind == "Hugging Face":
        theirs = hugging_face(model).to(device, dtype).eval()

        def work():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                            do_sample=False, pad_token_id=50256)
            return n * batch_size
        return work
    model = model.to(device, dtype)
    weights = product_weights(model)
    inputs = {w.shape[1]: torch.randn(batch_size, 1, w.shape[1], device=device).to(dtype) for w in weights}

    @torch.inference_mode()
    def products():
        for _ in range(n):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
        if device == "cuda":
            torch.cuda.synchronize()
        return n * batch_size

    def work():
        for next_ids in model.generate(ids, n, temperature=0):
            next_ids.tolist()
        return n * batch_size
    return products if kind == "products" else work


def bench_generation(repeats, device="cpu"):
    dtype = name_of(fast_dtype(device))
    for batch_size, target in ((1, "1.8"), (8, "2.5")):
        kinds = ("ours", "Hugging Face", "products")
        sides = [Side(generation, kind, batch_size, 256, device) for kind in kinds]
        ours, theirs, products = medians(repeats, *sides)
        close(*sides)
        what = f"generation, `gpt2`, {dtype}, batch {batch_size}, 256 tokens: tokens/s"
        row(what, f"{ours:,.0f}", f"Hugging Face {theirs:,.0f}", f"{ours / theirs:.2f}", f"≥ {target}")
        row(what, f"{ours:,.0f}", f"its matmuls alone {products:,.0f}", f"{ours / products:.2f}", "≥ 0.85")


def bench_cache(repeats):
    sides = [Side(generation, "ours", 1, 64), Side(generation, "plain", 1, 64)]
    ours, plain = medians(repeats, *sides)
    close(*sides)
    row("generation, `gpt2`, batch 1, 64 tokens: tokens/s", f"{ours:.0f}", f"plain {plain:.1f}",
        f"{ours / plain:.1f}", "")
    model = gpt.GPT(gpt.MODELS["gpt2"]).eval().to(fast_dtype("cpu"))
    at = {10: [], 1000: []}
    for _ in range(repeats):
        ticks = [time.perf_counter() for _ in model.generate(torch.full((1, 1), 50256), 1020, temperature=0)]
        for token, times in at.items():
            times += [ticks[i] - ticks[i - 1] for i in range(token - 8, token + 8)]
    first, last = (statistics.median(times) * 1e3 for times in at.values())
    row("generation, `gpt2`, batch 1: time of token 1,000 against token 10", f"{last:.1f} ms",
        f"{first:.1f} ms", f"{last / first:.2f}", "≤ 1.3")


# ------------------------------------------------------------------------------------------------ prepare

def preparing(kind, path):
    """Encodes a .jsonl file with GPT-2's tokenizer. For "loop", with encode_ordinary, document by document;
    for "ceiling", nothing but the encoding, of text that is in memory, on as many threads as there are cores,
    each with a tokenizer of its own."""
    parts = prepare.tokenizer_arguments("gpt2")
    tokenizer = tiktoken.Encoding(**parts)
    if kind == "ours":
        def work():
            meta = prepare.prepare([path], "prepared", "gpt2")
            return meta["train"]["tokens"] + meta["val"]["tokens"]
    elif kind == "loop":
        def work():
            n = 0
            with open(path, encoding="utf-8") as file, open("loop.bin", "wb") as out:
                for line in file:
                    ids = [*tokenizer.encode_ordinary(json.loads(line)["text"]), tokenizer.eot_token]
                    n += len(ids)
                    np.array(ids, dtype=np.uint16).tofile(out)
            return n
    else:
        documents = [(json.loads(line)["text"], True) for line in open(path, encoding="utf-8")]
        batches = [documents[i:i + 32] for i in range(0, len(documents), 32)]
        own = threading.local()

        def start():
            own.tokenizer = tiktoken.Encoding(**parts)

        def work():
            with ThreadPoolExecutor(os.cpu_count(), initializer=start) as pool:
                return sum(map(len, pool.map(
                    lambda batch: prepare.encode(own.tokenizer, batch), batches)))
    return work


def documents(files):
    """Yields a line of .jsonl for each of these texts."""
    for path in files:
        yield json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n"


def bench_prepare(repeats):
    lines = list(documents(prepare.find_files("python", ".")))
    for name, times in (("small.jsonl", 4), ("large.jsonl", 16)):
        with open(name, "w", encoding="utf-8") as file:
            file.writelines(lines * times)
    size = Path("large.jsonl").stat().st_size / 1e6
    what = f"preparing with `gpt2`, {size:.0f} MB of Python: million tokens/s"
    sides = [Side(preparing, kind, "large.jsonl") for kind in ("ours", "loop", "ceiling")]
    ours, loop, ceiling = (rate / 1e6 for rate in medians(repeats, *sides))
    row(what, f"{ours:.1f}", f"encode_ordinary in a loop {loop:.1f}", f"{ours / loop:.2f}", "≥ 2.2")
    row(what, f"{ours:.1f}", f"encoding alone {ceiling:.1f}", f"{ours / ceiling:.2f}", "≥ 0.90")
    small = Side(preparing, "ours", "small.jsonl")
    small()
    row("preparing: peak memory, 4 times the text against once", f"{sides[0].memory * 1e3:.0f} MB",
        f"{small.memory * 1e3:.0f} MB", f"{sides[0].memory / small.memory:.2f}", "≤ 500 MB")
    close(*sides, small)


# --------------------------------------------------------------------------------------------- whole runs
# Flags for the same model at the same context as others_quickstart.
SHAKESPEARE_RECIPE = ["--data", "data/shakespeare", "--block_size", "64", "--batch_size", "16",
                      "--max_steps", "400", "--lr", "1e-2", "--eval_interval", "400", "--n_head", "4",
                      "--global_batch_size", "16", "--schedule", "linear"]


def run(launcher, out, *flags, source=ROOT):
    """Runs train.py; returns the rows of its log, and its seconds from start to end. What it printed is in
    out/printed.txt."""
    started = time.perf_counter()
    result = subprocess.run([*launcher, source / "train.py", "--out", out, *flags], check=True,
                            capture_output=True, text=True)
    seconds = time.perf_counter() - started
    Path(out, "printed.txt").write_text(result.stdout, encoding="utf-8")
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()], seconds


def bench_ranks(repeats):
    prepare.prepare(["python"], "data/python", "bytes")

    def speed(launcher, out):
        rows, _ = run(launcher, f"{out}{time.time()}", "--max_steps", "9999", "--max_minutes", "1")
        return statistics.median(row["tokens_per_second"] for row in rows[1:] if "loss" in row)

    two, one = medians(repeats, lambda: speed(TORCHRUN, "two"), lambda: speed([sys.executable], "one"))
    row("training `nano`, two processes of one thread: tokens/s", f"{two:,.0f}",
        f"one process of two threads {one:,.0f}", f"{two / one:.2f}", "≥ 0.9")

    def start(command, line):
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for text in process.stdout:
                if text.startswith(line):
                    break
            seconds = time.perf_counter() - started
            process.kill()
        return seconds

    command = [sys.executable, ROOT / "train.py", "--max_steps", "9999", "--log_interval", "1", "--out"]
    first_step, imports = medians(
        repeats, lambda: start([*command, f"start{time.time()}"], "step 1/"),
        lambda: start([sys.executable, "-c", "import torch; print('torch')"], "torch"))
    row("from `python train.py` to the first step of `nano`", f"{first_step:.1f} s",
        f"import torch alone {imports:.1f} s", f"{first_step / imports:.1f}", "≤ 6 s")


def others_quickstart(path):
    """Trains a byte-level model as others' CPU quickstarts do: 4 layers, width 128, context 64, 2,000 steps
    of 12 sequences in float32, AdamW at 1e-3 falling to 1e-4. Prints the loss over all of the validation
    text."""
    torch.manual_seed(1337)
    ids = torch.tensor(list(Path(path).read_bytes()))
    ids, val = ids[:int(0.9 * len(ids))], ids[int(0.9 * len(ids)):]
    config = replace(gpt.MODELS["nano"], block_size=64, vocab_size=257, n_head=4, bias=False)
    model = gpt.GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(2000):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 2000, 0.05, 1e-3, 1e-4, "cosine")
        sequences = ids[torch.randint(len(ids) - 65, (12, 1)) + torch.arange(65)]
        logits = model(sequences[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sequences = val[:(len(val) - 1) // 64 * 64 + 1].unfold(0, 65, 64)
    with torch.no_grad():
        print(model(sequences[:, :-1], sequences[:, 1:]).item())


def bench_loss(repeats):
    """Times whole commands, with imports and a validation at the end."""
    if not SHAKESPEARE.exists():
        print(f"skipped: loss against time on tinyshakespeare, as there is no {SHAKESPEARE}")
        return
    prepare.prepare([str(SHAKESPEARE)], "data/shakespeare", "bytes")
    losses = {}

    def ours():
        rows, seconds = run([sys.executable], f"shakespeare{time.time()}", *SHAKESPEARE_RECIPE)
        losses["ours"] = rows[-1]["val_loss"]
        return seconds

    def theirs():
        started = time.perf_counter()
        code = f"import bench; bench.others_quickstart({str(SHAKESPEARE)!r})"
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
        losses["theirs"] = float(result.stdout)
        return time.perf_counter() - started

    seconds, their_seconds = medians(repeats, ours, theirs)
    row("tinyshakespeare, bytes: time to a validation loss",
        f"{losses['ours']:.3f} in {seconds:.0f} s", f"others {losses['theirs']:.3f} in {their_seconds:.0f} s",
        f"{seconds / their_seconds:.2f}", "loss ≤ 1.886, ≤ 0.33")


def learning(kind, path, vocab_size):
    """Work that learns a vocabulary from a file of documents, reading it included."""
    import tokenizers

    def ours():
        prepare.choose_tokenizer("bpe", vocab_size, prepare.read_pieces([path], None), 0.0)
        return 1

    def theirs():
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(prepare.WORD), "isolated")
        in_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, in_bytes])
        tokenizer.train_from_iterator(
            (text for text, _ in prepare.read_pieces([path], None)), tokenizers.trainers.BpeTrainer(
                vocab_size=vocab_size - 1, show_progress=False,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        return 1

    return ours if kind == "ours" else theirs


def bench_vocabulary(repeats):
    packages = Path(np.__file__).parent.parent      # those installed here
    for what, files, size, vocab_size, times, target in (
            ("the standard library", prepare.find_files("python", "."), 1e9, 2048, repeats, "≤ 8 s"),
            ("100 MB of Python", sorted(packages.rglob("*.py")), 1e8, 16384, 1, "≤ 90 s, ≤ 1 GB")):
        with open("documents.jsonl", "w", encoding="utf-8") as file:
            for line in documents(files):
                file.write(line)
                if file.tell() >= size:
                    break
        sides = [Side(learning, kind, Path("documents.jsonl"), vocab_size) for kind in ("ours", "theirs")]
        ours, theirs = (1 / rate for rate in medians(times, *sides))
        row(f"learning {vocab_size:,} tokens from {what}", f"{ours:.1f} s, {sides[0].memory:.2f} GB",
            f"`tokenizers` (Rust) {theirs:.1f} s, {sides[1].memory:.2f} GB", f"{ours / theirs:.1f}", target)
        close(*sides)


def bench_quickstart(seeds):
    """Trains the quickstart with several seeds. With more than one, writes what README.md shows into docs/:
    the evaluations of all (quickstart.jsonl), what the first one printed, and its curves."""
    prepare.prepare(["python"], "data/python", "bpe", 2048)
    evaluations, seconds = [], []
    for seed in range(1337, 1337 + seeds):
        rows, time_taken = run(TORCHRUN, f"quickstart{seed}", "--seed", str(seed))
        seconds.append(time_taken)
        evaluations += [{"seed": seed, **{name: row[name] for name in ("step", "val_loss", "bits_per_byte")}}
                        for row in rows if "val_loss" in row]
    if seeds > 1:
        docs, first = Path(ROOT, "docs"), Path("quickstart1337")
        write_rows("quickstart.jsonl", evaluations)
        shutil.copy(first / "curves.png", docs / "quickstart.png")
        sampled = subprocess.run(
            [sys.executable, ROOT / "sample.py", "--prompt", "def", "--checkpoint", first], check=True,
            capture_output=True, text=True)
        printed = (first / "printed.txt").read_text().replace(str(first), "out/python")
        (docs / "quickstart.txt").write_text(printed + sampled.stdout, encoding="utf-8")
    last = [row["bits_per_byte"] for row in evaluations if row["step"] == evaluations[-1]["step"]]
    row(f"the quickstart (seeds: {seeds}): bits per byte", f"{statistics.mean(last):.3f}",
        f"in {prepare.duration(statistics.median(seconds))}", "", "≤ 1.40")


def bench_exercises():
    """Trains 200 steps with each exercise that changes training, and writes docs/exercises.jsonl, which the
    tables in README.md and docs/exercises.md show. Checkpointing saves memory: that takes a larger model."""
    from test_readme import EXERCISES, copy_of_the_programs
    prepare.prepare(["python"], "data/python", "bpe")
    flags = {"Another seed": ["--seed", "1"], "Another schedule": ["--schedule", "squared"]}
    results = []
    for name, file, diff in (("Unchanged", "", ""), ("Another seed", "", ""), *EXERCISES):
        if name in ("Min-p sampling", "Another file type"):
            continue        # they change something else
        source = copy_of_the_programs(name.replace(" ", "-"), file, diff)
        rows, _ = run([sys.executable], source / "out", "--max_steps", "200", "--dtype", "float32",
                      *flags.get(name, []), source=source)
        results.append({"change": name.rstrip("."), "bits_per_byte": rows[-1]["bits_per_byte"]})
        if name in ("Unchanged", "Gradient checkpointing"):
            command = [sys.executable, source / "train.py", "--model", "gpt2", "--block_size", "512",
                       "--batch_size", "8", "--dry_run"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            speed, memory = re.search(r"([\d,]+) tokens/s; .* at least ([\d.]+) GB", printed).groups()
            results[-1] |= {"tokens_per_second": int(speed.replace(",", "")), "gb": float(memory)}
        row(f"exercise: {name}, bits per byte after 200 steps", f"{rows[-1]['bits_per_byte']:.3f}", "", "")
    write_rows("exercises.jsonl", results)


def bench_lines(folders):
    """Counts the lines of Python, tests aside, in clones of other projects, and writes docs/lines.jsonl.
    README.md shows their sums."""
    projects = []
    for folder in map(Path, folders):
        def git(*command, folder=folder):
            return subprocess.check_output(["git", "-C", folder, *command], text=True).split()

        files = {name: (folder / name).read_text(encoding="utf-8").count("\n")
                 for name in git("ls-files", "*.py") if not name.startswith("tests/")}
        [commit] = git("rev-parse", "--short", "HEAD")
        projects.append({"project": folder.name, "commit": commit, "files": files})
        row(f"lines of Python in {folder.name}, tests aside", f"{sum(files.values()):,}", "", "")
    write_rows("lines.jsonl", projects)


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
PATTERNS = {
    "GPT-2's": GPT2,
    "GPT-2's, vowel marks kept with letters": GPT2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
        r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),
    "GPT-4's (cl100k)": GPT4,
    "**ours**": prepare.WORD,
    "ours, vowel marks not kept with letters": prepare.WORD.replace(r"\p{M}", ""),
    "ours, and symbols take the next line's indentation": prepare.WORD.replace(
        r"[\r\n]*", r"(?:[\r\n]+[ \t]*)?"),
}


def bench_patterns(folder):
    """Compares ways to split text into words by bytes per token, on the last tenth of each text. The texts
    are LibreOffice's messages, in a folder into which Debian's packages were unpacked, and Python."""
    texts = {}
    for language, code in (("Hindi", "hi"), ("Tamil", "ta"), ("Thai", "th"), ("Arabic", "ar"),
                           ("Russian", "ru"), ("Korean", "ko"), ("Chinese", "zh_CN"), ("Japanese", "ja")):
        messages = {}
        for path in sorted(Path(folder).glob(f"**/{code}/LC_MESSAGES/*.mo")):
            with open(path, "rb") as file:
                messages |= gettext.GNUTranslations(file)._catalog
        texts[language] = "\n".join(messages.values())
    texts["English"] = "\n".join(key[0] if isinstance(key, tuple) else key for key in messages)
    source = prepare.read_pieces(prepare.find_files("python", "."), 200)
    texts["Python"] = "".join(text for text, _ in source)
    lines = [f"| words | {' | '.join(texts)} | geometric mean |", "|---|" + "---|" * (len(texts) + 1)]
    for name, pattern in PATTERNS.items():
        found = [bytes_per_token(pattern, text) for text in texts.values()]
        figures = [f"{figure:.2f}" for figure in (*found, statistics.geometric_mean(found))]
        lines.append(f"| {name} | {' | '.join(figures)} |")
        print(lines[-1], flush=True)
    write_table("patterns", lines)


def bytes_per_token(pattern, text):
    """Learns 2,048 tokens from the first nine tenths of a text, and returns how long they are on the rest."""
    cut = len(text) * 9 // 10
    counts = Counter(word.encode() for word in regex.findall(pattern, text[:cut]))
    ranks = {token: i for i, token in enumerate(prepare.learn_vocabulary_fast(counts, 2047))}
    tokenizer = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return len(text[cut:].encode()) / len(tokenizer.encode_ordinary(text[cut:]))


# What undoes one choice of nano, or tries another: flags of prepare.py, flags of train.py, and a change to a
# file, as a diff.
TRIALS = {
    "nothing": ([], [], "", ""),
    "words begin with a space only, not with any symbol": ([], [], "prepare.py", r"""
-    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",      # letters, after a space or one symbol: " dog", "(x"
+    r" ?[\p{L}\p{M}]+",
""".lstrip()),
    "symbols take the next line's indentation": ([], [], "prepare.py", r"""
-    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",            # symbols, and newlines after them: "):\n"
+    r" ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?",
""".lstrip()),
    "weight decay 1e-4": ([], ["--weight_decay", "1e-4"], "", ""),
    "embeddings at the learning rate of all else": ([], [], "train.py", """\
-    groups = [{"params": for_adamw, "weight_decay": weight_decay, "lr_scale": 4 if for_muon else 1},
+    groups = [{"params": for_adamw, "weight_decay": weight_decay, "lr_scale": 1},
"""),
    "Q, K and V orthogonalized as one matrix": ([], [], "train.py", """\
-        groups = [{"params": [p], "parts": 3 if path.endswith("c_attn.weight") else 1}
+        groups = [{"params": [p], "parts": 1}
"""),
    "Muon's momentum 0.95": ([], [], "train.py", """\
-        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.9})
+        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})
"""),
    "the learning rate falls over the last 65% of the steps, not 40%": ([], [], "train.py", """\
-        height = min(1.0, left / 0.4)
+        height = min(1.0, left / 0.65)
"""),
    "the learning rate falls over all steps": ([], ["--schedule", "linear"], "", ""),
    "the learning rate falls along a cosine": ([], ["--schedule", "cosine"], "", ""),
    "peak learning rate 5e-3": ([], ["--lr", "5e-3"], "", ""),
    "peak learning rate 1e-2": ([], ["--lr", "1e-2"], "", ""),
    "four heads": ([], ["--n_head", "4"], "", ""),
    "one head": ([], ["--n_head", "1"], "", ""),
    "an lm_head with weights of its own": ([], [], "gpt.py", """\
-    "nano": GPTConfig(block_size=128, vocab_size=2048, n_layer=4, n_head=2, n_embd=128),
+    "nano": GPTConfig(block_size=128, vocab_size=2048, n_layer=4, n_head=2, n_embd=128, tied=False),
"""),
    "a vocabulary of 1,024 tokens": (["--vocab_size", "1024"], [], "", ""),
    "a vocabulary of 4,096 tokens": (["--vocab_size", "4096"], [], "", ""),
    "16 sequences per step, twice the steps": (
        [], ["--global_batch_size", "16", "--max_steps", "{twice}"], "", ""),
    "sequences of 256 tokens, 16 per step": (
        [], ["--block_size", "256", "--global_batch_size", "16"], "", ""),
    "sequences of 64 tokens, 64 per step": (
        [], ["--block_size", "64", "--global_batch_size", "64"], "", ""),
    "AdamW alone, at 2e-3": ([], ["--optimizer", "adamw", "--lr", "2e-3"], "", ""),
    "bytes instead of a vocabulary": (["--tokenizer", "bytes"], [], "", ""),
}


def bench_trials(steps, seeds, changes):
    """Plans the recipe of nano for this many steps, trains it with each of these changes and seeds, and
    writes the results into docs/trials.jsonl and docs/benchmarks.md. What trials.jsonl has already is not
    trained again."""
    from test_readme import copy_of_the_programs
    results = read_rows("trials.jsonl") if Path(ROOT, "docs", "trials.jsonl").exists() else []
    done = [(result["change"], result["steps"], result["seed"]) for result in results]
    for seed, what in itertools.product(seeds, changes):
        if (what, steps, seed) in done:
            continue
        prepare_flags, train_flags, file, diff = TRIALS[what]
        source = copy_of_the_programs(f"trial{len(results)}", file, diff)
        subprocess.run([sys.executable, source / "prepare.py", "--overwrite", *prepare_flags], check=True)
        rows, _ = run([sys.executable], source / "out", "--dtype", "float32", "--eval_interval", "9999",
                      "--seed", str(seed), "--max_steps", str(steps),
                      *(flag.format(twice=2 * steps) for flag in train_flags), source=source)
        results.append({"change": what, "steps": steps, "seed": seed,
                        "bits_per_byte": rows[-1]["bits_per_byte"]})
        print(results[-1], flush=True)
        write_rows("trials.jsonl", results)
        write_table("trials", table_of_trials(results))


def table_of_trials(results):
    """For each change and number of steps, the result of seed 1337, then those of other seeds."""
    lengths = sorted({result["steps"] for result in results})
    lines = ["| what changed | " + " | ".join(f"{steps:,} steps" for steps in lengths) + " |",
             "|---|" + "---|" * len(lengths)]
    for what in sorted({result["change"] for result in results}, key=list(TRIALS).index):
        cells = []
        for steps in lengths:
            found = {result["seed"]: f"{result['bits_per_byte']:.3f}" for result in results
                     if (result["change"], result["steps"]) == (what, steps)}
            cells.append(", ".join(bits if seed == 1337 else f"{bits} with seed {seed}"
                                   for seed, bits in sorted(found.items())))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main():
    groups = {"training": bench_training, "generation": bench_generation, "cache": bench_cache,
              "prepare": bench_prepare, "vocabulary": bench_vocabulary,
              "ranks": bench_ranks, "loss": bench_loss,
              "quickstart": lambda repeats: bench_quickstart(args.seeds),
              "exercises": lambda repeats: bench_exercises(),
              "trials": lambda repeats: bench_trials(
                  args.steps, range(1337, 1337 + args.seeds), args.changes),
              "patterns": lambda repeats: bench_patterns(args.texts),
              "lines": lambda repeats: bench_lines(args.clones)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group",
                        help="which rows (default: all but trials, patterns and lines)")
    parser.add_argument("--steps", type=int, default=400, help="for how many steps trials are planned")
    parser.add_argument("--changes", nargs="+", choices=TRIALS, default=TRIALS, metavar="CHANGE",
                        help="which trials (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--nanogpt", type=os.path.abspath, help="a clone of nanoGPT to measure as well")
    parser.add_argument("--texts", type=os.path.abspath, help="where patterns finds its texts")
    parser.add_argument("--clones", nargs="+", type=os.path.abspath, default=[], metavar="FOLDER",
                        help="clones of other projects, whose lines are counted")
    parser.add_argument("--repeats", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--seeds", type=int, default=1,
                        help="how often the quickstart, or each trial, is trained")
    parser.add_argument("--table", metavar="NAME", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        groups = {"training": bench_cuda_training, "generation": lambda n: bench_generation(n, "cuda")}
    if unknown := set(args.groups) - set(groups):
        parser.error(f"there is no group {', '.join(unknown)}, only {', '.join(groups)}")
    if "patterns" in args.groups and not args.texts:
        parser.error("patterns needs --texts FOLDER: see docs/benchmarks.md")
    if "lines" in args.groups and not args.clones:
        parser.error("lines needs --clones FOLDER ...: clones of other projects")
    if args.nanogpt:
        os.environ["NANOGPT"] = args.nanogpt
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        vocabulary = Path(folder, "vocabulary")
        vocabulary.mkdir()
        provide_gpt2_vocabulary(vocabulary)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
        say(f"- {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, PyTorch "
            f"{torch.__version__}, {time.strftime('%B %Y')}")
        if not args.groups or {"training", "generation"} & set(args.groups):
            limits(args.device)
        say("\n| what | ours | other | ratio | target |\n|---|---|---|---|---|")
        for name in args.groups or [name for name in groups if name not in ("trials", "patterns", "lines")]:
            groups[name](args.repeats)
            if args.table:
                write_table(args.table)


if __name__ == "__main__":
    main()
