"""Tokens to weights: trains a model on a data folder that prepare.py wrote, and writes out/NAME.

    python train.py                                         one process
    torchrun --standalone --nproc_per_node=2 train.py       two processes: one per GPU, or both on the CPU
    python train.py --resume                                continues from out/NAME/last.pt
    python train.py --data data/NAME --init gpt2            fine-tunes OpenAI's weights

out/NAME gets last.pt (weights, and all that --resume needs), best.pt (weights with the lowest validation
loss), epoch_0004.pt and so on (weights every --keep_epochs epochs), log.jsonl (one JSON object per line) and,
if matplotlib is installed, curves.png. A run that is resumed, at whatever step it was stopped, computes bit
for bit what it would have computed: what happens at a step depends on the seed, the step and last.pt alone.

Run.train, near the end, tells the story; the parts it names come before it. Left out: models too large for
one GPU.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
import weakref
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt import GPT, MODELS, ModelError, load_checkpoint, save_checkpoint
from prepare import Parser, UserError, count, number, one_line_errors, positive, seed_number
from prepare import duration, get_tokenizer, load_meta, load_tokens
from sample import DTYPES, choose_device, choose_dtype, complete, load_model, mixed_precision

# Flags that override the sizes of --model.
SIZES = {"n_layer": "number of blocks", "n_head": "attention heads per block", "n_embd": "width, C",
         "block_size": "ids per sequence", "dropout": "share of activations zeroed in training"}

# Defaults that a model has instead of those in make_parser.
RECIPES = {
    "nano": {"max_steps": 2600, "global_batch_size": 16, "batch_size": 8, "optimizer": "muon", "lr": 5e-3,
             "warmup": 0.03, "eval_interval": 500, "eval_windows": 512, "log_interval": 50},
}

FINE_TUNING = {"epochs": 3, "lr": 5e-5}     # the defaults of --init

USUAL_IDS_PER_STEP = {"nano": 2 ** 11, "gpt2-92m": 2 ** 14}     # others: 2^19, half a million
MANY_EPOCHS = 40        # beyond about so many, data is worth little (Muennighoff et al. 2023)
PATIENCE = timedelta(minutes=10)    # how long a rank waits for another, before it gives up
SKIPS_IN_A_ROW = 20                 # how many float16 steps may be skipped before the run ends


# ------------------------------------------------------------------------------------------------ world

class World:
    """The processes that train together. This one is number `rank` of `size`, and computes on `device`.

    All communication between them happens here. A single process is a world of size 1: it takes the same path
    and has nobody to talk to. Used in a `with` statement, it is left by all ranks together; if one fails, the
    others end with a UserError that names it. Raises UserError if there are more processes than GPUs.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.job = os.environ.get("TORCHELASTIC_RUN_ID", "none")    # the same when torchrun restarts us
        self.device = device
        if device.type == "cuda":
            gpu = int(os.environ["LOCAL_RANK"]) if self.size > 1 else device.index or 0
            if gpu >= torch.cuda.device_count():
                raise UserError(f"there are only {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            self.device = torch.device("cuda", gpu)
            torch.cuda.set_device(self.device)
        if device.type == "mps" and self.size > 1:
            raise UserError("several processes cannot share an Apple GPU: leave out torchrun")
        if self.size > 1:
            # All ranks can read and write the strings in this store. If it is torchrun's, they outlive the
            # ranks, and those that it starts again must not find the old ones.
            self.store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                self.store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], self.store)
            dist.init_process_group(        # gloo adds up numbers on CPUs, nccl gradients on GPUs
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self.store, timeout=PATIENCE,
                rank=self.rank, world_size=self.size)
        self.tensors = weakref.WeakSet()    # a thread of gloo holds each, until just after its sum is known
        self.asked, self.calls, self.interval = time.perf_counter(), 0, 1      # see agree

    def wrap(self, model, rehearse):
        """Returns a wrapper of the model that leaves each rank with the mean gradient of all ranks."""
        if self.size == 1:
            return model
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # After its first backward pass, DDP rearranges the gradients, and three or more ranks then add them
        # up in another order. That must not distinguish a resumed run: so the first is a rehearsal.
        rehearse(net)
        return net

    def sum(self, *numbers):
        """Returns a list: each number, summed over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            self.tensors.add(tensor)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, flag):
        """Returns whether the flag is true on any rank; all get the same answer. It is to be called at each
        step. As asking takes a millisecond or two, they do so twice a second, and in between the answer is
        False."""
        if self.size == 1:
            return flag
        self.calls += 1
        if self.calls < self.interval:
            return False
        flags, seconds = self.sum(flag, time.perf_counter() - self.asked)
        self.interval = max(1, int(self.calls * 0.5 * self.size / seconds))
        self.calls, self.asked = 0, time.perf_counter()
        return flags > 0

    def print(self, *words):
        with suppress(OSError):     # whoever read this may have gone, but the run goes on
            if self.rank == 0:
                print(*words, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.size > 1 and error is None:
            try:
                dist.barrier()
                while self.tensors:     # Python must not end before they are free: it would crash
                    time.sleep(0.001)
                dist.destroy_process_group()
            except RuntimeError as lost:
                self.explain(lost)
                raise
        elif self.size > 1 and isinstance(error, Exception):
            self.explain(error)

    def explain(self, error):
        """Tells the other ranks why this one fails. If it fails because they do, or because of a mistake of
        the user's, raises UserError, which says which rank it was and why."""
        lost_another = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo/" in str(error))
        reason = "" if lost_another else f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(RuntimeError):        # from here on, nothing is certain to work
            self.store.set(f"rank {self.rank}", reason)
        if isinstance(error, (UserError, ModelError, OSError)):
            raise UserError(f"rank {self.rank}: {error}") from error
        if lost_another:
            culprits = []
            patience = time.monotonic() + 5     # the others need a moment to notice
            with suppress(RuntimeError):
                for rank in range(self.size):
                    while not (told := self.store.check([f"rank {rank}"])) and time.monotonic() < patience:
                        time.sleep(0.1)
                    if not told:
                        culprits.append(f"rank {rank} does not answer: it was killed, or hangs")
                    elif reason := self.store.get(f"rank {rank}").decode():
                        culprits.append(f"rank {rank} failed: {reason}")
            raise UserError("; ".join(culprits) or f"rank {self.rank} lost its connection") from error


# ------------------------------------------------------------------------------------------------- data

class Windows:
    """Token ids as overlapping windows of block_size + 1 ids, one starting every `stride` ids: all but the
    last are the inputs, all but the first the targets."""

    def __init__(self, tokens, block_size, stride, vocab_size):
        self.tokens, self.vocab_size = tokens, vocab_size
        self.block_size, self.stride = block_size, stride

    def __len__(self):
        return (len(self.tokens) - 1 - self.block_size) // self.stride + 1

    def read(self, indices):
        """Returns the ids of these windows, (len(indices), block_size + 1), uint16. Raises UserError if an id
        is outside the vocabulary."""
        starts = np.asarray(indices, dtype=np.int64) * self.stride
        ids = self.tokens[starts[:, None] + np.arange(self.block_size + 1)]
        if ids.max() >= self.vocab_size:
            raise UserError(f"the data is damaged: it contains id {ids.max()}, but its vocabulary ends at "
                            f"{self.vocab_size - 1}: run prepare.py again")
        return ids


def inputs_and_targets(ids, device):
    """ids (B, T + 1), a NumPy array -> two int64 tensors (B, T) on the device: all but the last of each row,
    and all but the first."""
    ids = torch.from_numpy(ids.astype(np.int64))
    if device.type == "cuda":
        ids = ids.pin_memory()      # so that the copy need not wait for the GPU
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


def shuffled(places, n, seed):
    """Returns which of n windows is at each of these places in the order of training. Epoch e is places e * n
    to (e + 1) * n - 1 and contains every window once, in an order of its own.

    Nothing is stored and no place depends on another: a generalized Feistel network permutes the cells of a
    table with hardly more than n cells, and from a cell that is not one of the first n it goes on to the next
    until it is (Black and Rogaway 2002).
    """
    rows = np.uint64(math.isqrt(n - 1) + 1)
    columns = (np.uint64(n) + rows - np.uint64(1)) // rows
    epoch, window = np.divmod(np.asarray(places, dtype=np.uint64), np.uint64(n))
    key = mix(epoch + mix(np.full_like(epoch, seed)))
    walking = np.full(window.shape, True)
    while walking.any():
        row, column = np.divmod(window, columns)
        for layer in range(3):      # each depends on the other, and moves round by so much
            row = (row + mix(column + key + np.uint64(2 * layer << 40)) % rows) % rows
            column = (column + mix(row + key + np.uint64(2 * layer + 1 << 40)) % columns) % columns
        window = np.where(walking, row * columns + column, window)
        walking = window >= n
    return window.astype(np.int64)


def mix(x):
    """Hashes uint64s: every bit of x changes about half of the bits of the result (from SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches:
    """batches(place) returns what this rank reads of the global batch that begins at that place in the order
    of training, as a list of micro-batches.

    The global batch depends on nothing but the seed and the place. Ranks and micro-batches are slices of it:
    four processes with one micro-batch each and one process with four see the same ids. A micro-batch is as
    large as batch_size allows for all to be equal. Raises UserError if the ranks' shares would not be equal.
    """

    def __init__(self, windows, global_batch_size, batch_size, seed, world):
        self.windows, self.seed, self.world = windows, seed, world
        self.share, rest = divmod(global_batch_size, world.size)
        if rest:
            raise UserError(f"--global_batch_size {global_batch_size} is not a multiple of {world.size}, the "
                            "number of processes: change one of them")
        sizes = range(1, min(batch_size, self.share) + 1)
        self.micro_batch_size = max(size for size in sizes if self.share % size == 0)

    def __call__(self, place):
        """Returns [(inputs, targets), ...], each (micro_batch_size, block_size), and a checksum of their ids:
        the ranks' checksums add up to the same sum, however many ranks there are."""
        first = place + self.world.rank * self.share
        indices = shuffled(range(first, first + self.share), len(self.windows), self.seed)
        micro_batches, checksum = [], 0
        for start in range(0, self.share, self.micro_batch_size):
            ids = self.windows.read(indices[start:start + self.micro_batch_size])
            checksum += sum(zlib.crc32(window, place) for window in ids)
            micro_batches.append(inputs_and_targets(ids, self.world.device))
        return micro_batches, checksum


# ----------------------------------------------------------------------------------------- optimization

def learning_rate(step, total_steps, warmup_steps, peak, low, schedule):
    """Rises linearly to its peak at step warmup_steps, then falls, linearly or like a cosine (Loshchilov and
    Hutter 2016), towards `low`, which it would reach at total_steps, the step after the last."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * left


def make_optimizer(name, model, weight_decay, device):
    """Returns AdamW (Loshchilov and Hutter 2017), with weight decay for matrices and not for the vectors:
    biases and LayerNorms. If the name is muon, the matrices inside the blocks are left to Muon."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    in_blocks = [p for p in model.h.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() >= 2 and p not in set(in_blocks)]
    groups = [{"params": in_blocks, "weight_decay": weight_decay, "muon": name == "muon"},
              {"params": others, "weight_decay": weight_decay, "muon": False},
              {"params": vectors, "weight_decay": 0.0, "muon": False}]
    kind = Muon if name == "muon" else torch.optim.AdamW
    return kind(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups with "muon", AdamW for the others. Muon moves a matrix by its mean
    gradient, made orthogonal: so it learns at the same speed in all directions, not only the steepest."""
    MOMENTUM = 0.95
    RMS = 0.2       # of an update's entries, about as in AdamW, so that both share learning rates (Liu 2025)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"] if group["muon"] else []:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonal(torch.stack([self.averaged_gradient(weight) for weight in weights]))
                size = group["lr"] * self.RMS * math.sqrt(max(shape))
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(size * update)
                    weight.grad = None      # so that AdamW passes it over
        super().step()

    def averaged_gradient(self, weight):
        """Returns the running mean of the gradient, with Nesterov's look ahead."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(())     # AdamW looks for it when a state is loaded
        mean = state["momentum"].lerp_(weight.grad, 1 - self.MOMENTUM)
        return weight.grad.lerp(mean, self.MOMENTUM)


def orthogonal(x):
    """x (N, rows, columns) -> for each matrix U S V^T about U V^T: five Newton-Schulz iterations, with the
    coefficients of Jordan et al., which bring singular values quickly to between 0.7 and 1.2."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):      # x becomes a x + (b s + c s s) x, where s = x x^T
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def update(net, optimizer, scaler, autocast, micro_batches, lr, grad_clip):
    """Takes one step of the optimizer, on the mean gradient of all micro-batches and ranks, if it is finite.
    Returns this rank's mean loss and the norm of the gradient before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    mean_loss = 0
    for i, (inputs, targets) in enumerate(micro_batches, start=1):
        # Only the last backward pass exchanges gradients. DDP reads this in the forward pass, too.
        net.require_backward_grad_sync = i == len(micro_batches)
        with autocast:
            loss = net(inputs, targets) / len(micro_batches)    # gradients add up, but we want their mean
        scaler.scale(loss).backward()       # scaled up, small gradients survive float16
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)              # clipping needs the true gradients
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip).item()
    if math.isfinite(grad_norm):
        with autocast:                      # for the matrix products of Muon
            scaler.step(optimizer)
    scaler.update()                         # lowers the scale after a skipped step, raises it now and then
    optimizer.zero_grad()
    return mean_loss.item(), grad_norm


@torch.no_grad()
def first_not_finite(model, micro_batches, autocast):
    """Returns the name of the first module whose output on these is not finite, or None."""
    found = []

    def look_at(module, inputs, output):
        if not output.isfinite().all():
            found.append(names[module])

    names = {module: name or "the whole model" for name, module in model.named_modules()}
    hooks = [module.register_forward_hook(look_at) for module in names]
    with autocast:
        for inputs, targets in micro_batches:
            model(inputs, targets)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def keep_freed_memory():
    """Makes the C library keep freed memory for the next step, if it is glibc. By default, it returns large
    blocks to the system, which must fill them with zeros before each use: up to 40% of a step's time."""
    with suppress(OSError, AttributeError, TypeError):      # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)      # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: what is freed stays


def peak_memory(device):
    """Returns the most memory in bytes that this process has held so far: tensors on a GPU, all of it on a
    CPU. On Windows, where it cannot be told, returns 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(OSError, ValueError):     # Linux, where getrusage would count the process that started this
        words = Path("/proc/self/status").read_text().split()
        return 1024 * int(words[words.index("VmHWM:") + 1])
    return 0


def seed_dropout(seed, step, rank):
    """Makes dropout depend on nothing but these three, in particular not on what this process did before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


@torch.no_grad()
def evaluate(model, windows, n_windows, batch_size, autocast, world, told_to_stop):
    """Returns the mean loss, in nats per id, over n_windows evenly spaced windows, and its standard error
    (None if there is only one batch). Each rank evaluates a share of the windows. If a rank is told to stop
    meanwhile, all of them return None instead."""
    chosen = np.arange(n_windows) * len(windows) // n_windows
    mine = chosen[world.rank::world.size]
    seen = total = squares = batches = 0
    for start in range(0, len(mine), batch_size):
        if told_to_stop():
            break
        indices = mine[start:start + batch_size]
        with autocast:
            loss = model(*inputs_and_targets(windows.read(indices), world.device)).item()
        seen, batches = seen + len(indices), batches + 1
        total, squares = total + len(indices) * loss, squares + len(indices) * loss ** 2
    seen, total, squares, batches = world.sum(seen, total, squares, batches)
    if seen < n_windows:
        return None
    mean = total / seen
    if batches == 1:
        return mean, None
    # A batch's mean varies by variance / size around the mean, so the sum of size * (loss - mean)^2 over the
    # batches estimates (batches - 1) * variance, where variance is that of a single window's loss.
    variance = max(0.0, squares - seen * mean ** 2) / (batches - 1)
    return mean, math.sqrt(variance / seen)


# -------------------------------------------------------------------------------------------------- log

class Log:
    """Reports on a run: prints lines and appends objects to log.jsonl. Only rank 0 does so; what the others
    write goes to the null device."""

    def __init__(self, path, world, first_step, total_steps, ids_per_step, tracker=None):
        self.world, self.first_step, self.total_steps = world, first_step, total_steps
        self.ids_per_step, self.tracker = ids_per_step, tracker
        self.path = path if world.rank == 0 else os.devnull
        with cannot_write(self.path):
            self.file = open(self.path, "ab+", buffering=0)
            if self.file.tell() > 0:
                self.file.seek(-1, os.SEEK_END)
                if self.file.read(1) != b"\n":
                    self.file.write(b"\n")      # the last row was cut short
        self.started = time.perf_counter()
        self.restart_clock(first_step)

    def restart_clock(self, step):
        """Tokens per second are counted from here, so that evaluations are not counted."""
        self.clock_step, self.clock = step, time.perf_counter()

    def training(self, step, *, epoch, loss, lr, grad_norm, loss_scale, ids_hash):
        now, memory = time.perf_counter(), peak_memory(self.world.device)
        rate = (step - self.clock_step) * self.ids_per_step / (now - self.clock)
        left = (now - self.started) / (step - self.first_step) * (self.total_steps - step)
        self.write(step=step, epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm, loss_scale=loss_scale,
                   tokens_per_second=rate, seconds=now - self.started, memory=memory,
                   ids_hash=f"{int(ids_hash) % 2 ** 32:08x}")
        scale = f" | loss scale {loss_scale:g}" if loss_scale != 1 else ""
        held = f" | {memory / 1e9:.1f} GB" if memory else ""
        self.world.print(f"step {step:,}/{self.total_steps:,} | epoch {epoch:.2f} | loss {loss:.4f} | "
                         f"lr {lr:.2e}{scale} | {rate:,.0f} tokens/s{held} | {duration(left)} left")
        self.restart_clock(step)

    def validation(self, step, *, val_loss, val_stderr, bits_per_byte):
        self.write(step=step, val_loss=val_loss, val_stderr=val_stderr, bits_per_byte=bits_per_byte)
        error = "" if val_stderr is None else f" ± {val_stderr:.4f}"
        self.world.print(f"step {step:,}/{self.total_steps:,} | validation loss {val_loss:.4f}{error} | "
                         f"{bits_per_byte:.3f} bits per byte")

    def write(self, **values):
        """Appends a row. JSON has no infinity and no NaN: they become null. Raises UserError if the disk is
        full, for example."""
        row = {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in values.items()}
        line = json.dumps(row).encode() + b"\n"
        with cannot_write(self.path):
            while line:     # a disk that is nearly full takes a part of it
                line = line[self.file.write(line):]
        if self.tracker:
            self.tracker.log(row, step=row["step"])


def start_tracker(out, args):
    """Returns a new run of Weights & Biases. Raises UserError if it cannot begin. Needs the package wandb."""
    import wandb
    try:
        return wandb.init(project="smallgpt", name=out.name, config=vars(args), dir=out)
    except wandb.Error as error:
        raise UserError(f"--wandb fails ({error}): run wandb login, or set WANDB_MODE=offline") from error


@contextmanager
def cannot_write(path):
    """Turns an OSError into a UserError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): mend that, or choose another --out; what "
                        "was saved before can be resumed") from error


def read_log(path):
    """Returns the rows of the last run in a log.jsonl: {step: row} of training, and of validation."""
    training, validation = {}, {}       # a resumed run may have taken a step twice
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError, KeyError):     # the run was killed while it wrote this line
                row = json.loads(line)
                if row["step"] == 1 and "loss" in row:      # a run starts; what came before was another
                    training, validation = {}, {}
                (training if "loss" in row else validation)[row["step"]] = row
    return training, validation


def draw_curves(log_paths, picture_path):
    """Draws the losses, learning rates and, where there are any, loss scales of one or several runs. Needs
    the package matplotlib."""
    from matplotlib.figure import Figure

    def column(rows, name):
        return np.array([rows[step].get(name) for step in sorted(rows)], dtype=float)   # None becomes NaN

    runs = {str(Path(path).parent).replace("$", r"\$"): read_log(path) for path in log_paths}
    scaled = any(row.get("loss_scale", 1) != 1 for training, _ in runs.values() for row in training.values())
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, rates, *scales = figure.subplots(2 + scaled, 1, sharex=True, height_ratios=[3, 1, 1][:2 + scaled])
    for i, (name, (training, validation)) in enumerate(runs.items()):
        steps, loss, colour = column(training, "step"), column(training, "loss"), f"C{i}"
        width = 1 + len(steps) // 20
        smooth = np.convolve(loss, np.ones(width) / width, "valid") if width <= len(steps) else loss
        losses.plot(steps, loss, color=colour, linewidth=1, alpha=0.3)
        losses.plot(steps[width // 2:][:len(smooth)], smooth, color=colour,
                    label=f"{name}: training, smoothed")
        losses.errorbar(column(validation, "step"), column(validation, "val_loss"),
                        column(validation, "val_stderr"), color=colour, linestyle="--", marker=".", capsize=3,
                        label=f"{name}: validation, ± standard error")
        rates.plot(steps, column(training, "lr"), color=colour)
        if scaled:
            scales[0].semilogy(steps, column(training, "loss_scale"), color=colour, base=2)
    losses.set(title="Loss", ylabel="nats per id")
    losses.legend()
    rates.set(ylabel="learning rate")
    if scaled:
        scales[0].set(ylabel="loss scale")
    figure.axes[-1].set(xlabel="step")
    figure.savefig(picture_path, dpi=120)


# ------------------------------------------------------------------------------------- stop and resume

class StopSignal:
    """In a `with` statement, told_to_stop() is whether SIGTERM or Ctrl-C has come, or the time is up, so that
    a run can end in good order. A second Ctrl-C is a KeyboardInterrupt, as usual."""

    def __init__(self):
        self.signalled, self.deadline = False, math.inf

    def __call__(self):
        return self.signalled or time.monotonic() > self.deadline

    def allow(self, minutes):
        self.deadline = time.monotonic() + 60 * minutes

    def __enter__(self):
        self.handlers = {name: signal.signal(name, self.receive) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for name, handler in self.handlers.items():
            signal.signal(name, handler)

    def receive(self, name, frame):
        self.signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):
            if os.environ.get("RANK", "0") == "0":      # not print, which this may have interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")


def find_checkpoint(path, resume, job):
    """Returns the checkpoint to continue, (model, meta), or None for a new run. A job that torchrun restarts
    after a failure continues its own. Raises UserError if a new run would overwrite steps of another."""
    if not path.exists() and not resume:
        return None
    model, meta = load_checkpoint(path)
    if not isinstance(meta.get("optimizer"), dict) or not isinstance(meta.get("args"), dict):
        raise UserError(f"{path} cannot be resumed: it has weights, but not the state of an optimizer")
    if resume or meta.get("job") == job != "none":
        return model, meta
    if meta.get("step") == 0:
        return None         # it holds nothing that would be lost
    raise UserError(f"{path} is from an earlier run: --resume continues it, another --out keeps it")


def check_same_run(saved_config, meta, config, data, args):
    """Raises UserError if a run would go on with another model, or other data, or in another order."""
    def values(config, data, args):
        counts = {f"{split}.{name}": data[split][name] for split in ("train", "val") for name in data[split]}
        return {**asdict(config), "tokenizer": data["tokenizer"], **counts,
                "stride": args["stride"], "seed": args["seed"], "optimizer": args["optimizer"]}

    with cannot_resume():
        before = values(saved_config, meta["data"], meta["args"])
    for name, now in values(config, data, vars(args)).items():
        then = before.get(name)
        if str(now) != str(then):
            raise UserError(f"cannot resume: {name} was {then} in that run, but is {now} now")


@contextmanager
def cannot_resume():
    """Turns any exception into a UserError: what goes wrong while last.pt is used is the file's fault, unless
    memory runs out."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError("cannot resume: last.pt is damaged, or of another version") from error


def resized(model, config):
    """Returns a model with the same weights and another config, which may have another dropout and a smaller
    block_size. Raises UserError if they differ in more."""
    if replace(model.config, block_size=config.block_size, dropout=config.dropout) != config:
        raise UserError("--init has sizes of its own: leave out --n_layer, --n_head and --n_embd")
    weights = model.state_dict()
    longest = len(weights["wpe.weight"])
    if config.block_size > longest:
        raise UserError(f"--init reads {longest:,} ids at most: lower --block_size {config.block_size:,}")
    weights["wpe.weight"] = weights["wpe.weight"][:config.block_size]
    model = GPT(config)
    model.load_state_dict(weights)
    return model


# ------------------------------------------------------------------------------------------------ a run

class Run:
    """One run, set up from its flags, args. saved is None or the checkpoint to continue, (model, meta)."""

    def __init__(self, args, world, told_to_stop, saved):
        self.args, self.world, self.told_to_stop, self.out = args, world, told_to_stop, Path(args.out)
        self.data = load_meta(args.data)
        self.tokenizer = get_tokenizer(self.data["tokenizer"])
        dtype = choose_dtype(args.dtype, world.device)
        self.autocast = mixed_precision(world.device, dtype)
        model, meta = saved or (self.load_initial() if args.init else None, None)

        sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
        config = replace(model.config if args.init else MODELS[args.model],
                         vocab_size=self.data["vocab_size"], **sizes)
        # Kept in args, and so in checkpoints: a resumed run takes the same steps on any number of processes.
        args.stride = args.stride or config.block_size
        args.global_batch_size = args.global_batch_size or args.batch_size * world.size
        self.windows = self.load_windows("train", config, args.stride)
        self.val_windows = self.load_windows("val", config, config.block_size)      # each id once
        self.batches = Batches(self.windows, args.global_batch_size, args.batch_size, args.seed, world)

        if saved:
            check_same_run(model.config, meta, config, self.data, args)
        elif args.init:
            model = resized(model, config)
        else:
            torch.manual_seed(args.seed)
            model = GPT(config)
        self.model = model.to(world.device).train()
        self.optimizer = make_optimizer(args.optimizer, self.model, args.weight_decay, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.step = 0                   # how many have been taken
        self.windows_read = 0           # by all of them, so that the next one begins at that place
        self.ids_hash = 0               # of all ids they read; to be summed over all ranks, modulo 2^32
        self.skipped = 0                # how many of the last ones were skipped in a row
        self.evaluated = 0              # the step of the last evaluation
        self.best_val_loss = math.inf   # the lowest of any
        self.stopping = False           # whether all ranks have agreed to stop early
        if saved:
            self.restore(meta)
        self.check_ranks_agree()

        self.ids_per_step = args.global_batch_size * config.block_size
        windows_left = (args.epochs or 0) * len(self.windows) - self.windows_read
        self.total_steps = args.max_steps or self.step + math.ceil(windows_left / args.global_batch_size)
        self.warmup_steps = round(args.warmup * self.total_steps)
        # The model as it is trained. To all else, in particular to checkpoints, it is self.model.
        self.net = world.wrap(self.compile() if args.compile else self.model, self.rehearse)
        self.describe(dtype)

    def check_ranks_agree(self):
        """Raises UserError unless all ranks are at the same step of the same run."""
        found = [self.step, self.ids_hash]
        if self.world.sum(*found) != [number * self.world.size for number in found]:
            raise UserError("the ranks found different checkpoints: --out must be on a disk that all share")
        if self.world.rank > 0:
            self.ids_hash = 0       # rank 0 has that of all

    def describe(self, dtype):
        """Prints what this run will be, and warns of what is unusual."""
        args, world, config = self.args, self.world, self.model.config
        micro = self.batches.micro_batch_size
        windows_left = (self.total_steps - self.step) * args.global_batch_size
        epochs = (self.windows_read + windows_left) / len(self.windows)
        flops = self.model.flops_per_id(config.block_size)
        # last.pt has the weights and two averages of their gradients, twice while it is written.
        copies = 2 * 3 + 1 + int(epochs) // args.keep_epochs
        disk = 4 * self.model.num_params() * copies
        world.print(
            f"{self.model.num_params():,} parameters, {str(dtype).removeprefix('torch.')}; {args.data}: "
            f"{len(self.windows):,} windows of {config.block_size} ids\n"
            f"each step: {world.size} processes x {self.batches.share // micro} micro-batches x {micro} "
            f"windows = {self.ids_per_step:,} ids\n"
            f"{self.total_steps:,} steps, {epochs:.2f} epochs"
            + (f", {self.step:,} of them done" if self.step else "") +
            f"; {flops:.2e} FLOPs per id, {flops * self.ids_per_step * self.total_steps:.2e} in all\n"
            f"up to {disk / 1e9:,.2f} GB of checkpoints in {self.out}")
        usual = USUAL_IDS_PER_STEP.get(args.model, 2 ** 19)
        if args.model and not usual / 8 <= self.ids_per_step <= usual * 8:
            world.print(f"warning: {args.model} is usually trained with about {usual:,} ids per step: change "
                        "--global_batch_size, or --lr with it")
        if self.step >= self.total_steps:
            world.print("all steps are done: --max_steps or --epochs, with more of them, trains on")
        if epochs > MANY_EPOCHS:
            world.print(f"warning: the data will be seen {epochs:.0f} times, and after some {MANY_EPOCHS} it "
                        "teaches nothing new: prepare more, or lower --epochs or --max_steps")

    def load_initial(self):
        """Returns the model that --init names."""
        model, tokenizer_name = load_model(self.args.init)
        if tokenizer_name != self.data["tokenizer"]:
            raise UserError(f"{self.args.init} needs the tokenizer {tokenizer_name}: run prepare.py again "
                            f"with --tokenizer {tokenizer_name}")
        return model

    def load_windows(self, split, config, stride):
        tokens = load_tokens(self.args.data, split)
        if len(tokens) < config.block_size + 1:
            raise UserError(f"{self.args.data}/{split}.bin has only {len(tokens):,} ids and a window needs "
                            f"{config.block_size + 1:,}: prepare more text, or lower --block_size")
        return Windows(tokens, config.block_size, stride, config.vocab_size)

    def compile(self):
        """Returns torch.compile(self.model), or if that does not work on all ranks, self.model."""
        compiled, problem = torch.compile(self.model), ""
        try:
            self.rehearse(compiled)     # compiles
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not any(self.world.sum(bool(problem))):
            return compiled
        self.world.print(f"training without --compile, which fails here ({problem or 'another rank'})")
        return self.model

    def rehearse(self, net):
        """Goes through a step without taking it."""
        [(inputs, targets), *_], _ = self.batches(self.windows_read)
        with self.autocast:
            loss = net(inputs, targets)
        (0 * loss).backward()
        net.zero_grad()

    def try_out(self, n_steps=5):
        """Takes a few steps and keeps nothing of them, to print what all steps would take."""
        seconds = []
        for _ in range(1 + n_steps):
            started = time.perf_counter()
            micro_batches, _ = self.batches(self.windows_read)
            update(self.net, self.optimizer, self.scaler, self.autocast, micro_batches, 0.0,
                   self.args.grad_clip)
            seconds.append(time.perf_counter() - started)
        step_seconds = sorted(seconds[1:])[n_steps // 2]        # in the first one, much is set up
        left = duration(step_seconds * max(0, self.total_steps - self.step))
        self.world.print(f"{self.ids_per_step / step_seconds:,.0f} tokens/s; {left} for all steps, without "
                         f"evaluations; {peak_memory(self.world.device) / 1e9:.2f} GB in each process")

    def train(self):
        """Takes one step after another and evaluates now and then, to the last step or until told to stop."""
        args, world = self.args, self.world
        if world.rank == 0:
            with cannot_write(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out / "log.jsonl", world, self.step, self.total_steps, self.ids_per_step,
                       start_tracker(self.out, args) if args.wandb and world.rank == 0 else None)
        if self.step == 0:
            self.save_last()        # a disk that is full or write-protected is better found out at once
        while not self.stopping:
            if self.evaluation_is_due():
                self.evaluate_and_save()
                continue
            if self.step >= self.total_steps:
                return
            lr = learning_rate(
                self.step, self.total_steps, self.warmup_steps, args.lr, args.min_lr, args.schedule)
            seed_dropout(args.seed, self.step, world.rank)
            micro_batches, checksum = self.batches(self.windows_read)
            loss, grad_norm = update(self.net, self.optimizer, self.scaler, self.autocast, micro_batches, lr,
                                     args.grad_clip)
            self.check_finite(loss, grad_norm, lr, micro_batches)
            self.step += 1
            self.windows_read += args.global_batch_size
            self.ids_hash = (self.ids_hash + checksum) % 2 ** 32
            if self.step == 1 or self.step % args.log_interval == 0:
                loss, ids_hash = world.sum(loss / world.size, self.ids_hash)
                self.log.training(self.step, epoch=self.windows_read / len(self.windows), loss=loss, lr=lr,
                                  grad_norm=grad_norm, loss_scale=self.scaler.get_scale(), ids_hash=ids_hash)
            if epoch := self.epoch_to_keep():
                self.save(f"epoch_{epoch:04}.pt")
            self.stopping = world.agree(self.told_to_stop())
        self.save_last()
        world.print(f"stopped after step {self.step:,} of {self.total_steps:,} and saved: the same command "
                    "with --resume goes on from there")

    def check_finite(self, loss, grad_norm, lr, micro_batches):
        """Raises UserError if the loss or the gradient is not finite. In float16, where such a gradient makes
        the loss scale fall, it does so only when that has not helped many times in a row."""
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        if self.scaler.is_enabled():
            fine = self.skipped < SKIPS_IN_A_ROW
        else:
            fine = math.isfinite(loss + grad_norm)
        if fine:
            return
        seed_dropout(self.args.seed, self.step, self.world.rank)
        module = first_not_finite(self.model, micro_batches, self.autocast)
        where = f"not finite first in {module}" if module else "finite in all modules"
        raise UserError(
            f"step {self.step + 1:,} has loss {loss:g} and a gradient of norm {grad_norm:g} at learning rate "
            f"{lr:.3g} and loss scale {self.scaler.get_scale():g}; computed again, outputs are {where}: "
            "return to the last checkpoint with --resume and a lower --lr")

    def evaluation_is_due(self):
        """Whether the model has to be evaluated after the last step, and was not: also if an evaluation was
        cut short when the run was stopped."""
        due = self.step % self.args.eval_interval == 0 or self.step == self.total_steps
        return due and self.evaluated < self.step

    def evaluate_and_save(self):
        """Measures the validation loss, saves checkpoints, shows how the model starts a document."""
        self.model.eval()
        n_windows = min(self.args.eval_windows or math.inf, len(self.val_windows))
        result = evaluate(self.model, self.val_windows, n_windows, self.args.eval_batch_size, self.autocast,
                          self.world, self.told_to_stop)
        if result is None:
            self.stopping = True
            return
        val_loss, val_stderr = result
        if not math.isfinite(val_loss):
            raise UserError(f"the validation loss after step {self.step:,} is {val_loss:g}: return to the "
                            "last checkpoint with --resume and a lower --lr")
        ids_per_byte = self.data["val"]["tokens"] / max(1, self.data["val"]["bytes"])
        bits_per_byte = val_loss / math.log(2) * ids_per_byte
        self.log.validation(self.step, val_loss=val_loss, val_stderr=val_stderr, bits_per_byte=bits_per_byte)
        self.evaluated = self.step
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.save("best.pt")
        self.save_last()
        if self.world.rank == 0:
            parts = complete(self.model, self.tokenizer, "", 150, temperature=0.8, top_k=50)
            text = "".join(added for [added] in parts)
            self.world.print("sample:\n    " + text.strip().replace("\n", "\n    "))
            with suppress(ModuleNotFoundError):     # matplotlib is optional
                draw_curves([self.out / "log.jsonl"], self.out / "curves.png")
        self.model.train()
        self.log.restart_clock(self.step)

    def epoch_to_keep(self):
        """Returns the epoch that the last step completed, if its weights are to be kept, otherwise 0."""
        every = self.args.keep_epochs
        before, now = (n // len(self.windows) // every * every
                       for n in (self.windows_read - self.args.global_batch_size, self.windows_read))
        return now if now > before else 0

    def save_last(self):
        """Writes last.pt, with all that restore needs."""
        [ids_hash] = self.world.sum(self.ids_hash)
        self.save("last.pt", processes=self.world.size, job=self.world.job, ids_hash=int(ids_hash),
                  skipped=self.skipped, evaluated=self.evaluated, windows_read=self.windows_read,
                  optimizer=self.optimizer.state_dict()["state"], scaler=self.scaler.state_dict())

    def save(self, name, **more):
        if self.world.rank == 0:
            with cannot_write(self.out / name):
                save_checkpoint(self.out / name, self.model, {
                    "step": self.step, "best_val_loss": self.best_val_loss, "data": self.data,
                    "args": vars(self.args), **more})

    def restore(self, meta):
        """Continues where a checkpoint ends. Raises UserError if it is damaged."""
        with cannot_resume():
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": meta["optimizer"]})
            for group in self.optimizer.param_groups:
                for weight in set(group["params"]) & set(self.optimizer.state):
                    for name in ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq"):
                        if self.optimizer.state[weight][name].shape != weight.shape:
                            raise ValueError("the state of the optimizer does not fit the weights")
            if self.scaler.is_enabled() and meta["scaler"]:
                varying = {name: meta["scaler"][name] for name in ("scale", "_growth_tracker")}
                self.scaler.load_state_dict({**self.scaler.state_dict(), **varying})
                self.scaler.scale(torch.zeros(1, device=self.world.device))     # fails if they are no numbers
            for name in ("step", "windows_read", "ids_hash", "skipped", "evaluated"):
                setattr(self, name, int(meta[name]))
                if not 0 <= getattr(self, name) < 2 ** 62:
                    raise ValueError(f"{name} cannot be {meta[name]}")
            self.best_val_loss, processes = float(meta["best_val_loss"]), int(meta["processes"])
        if processes != self.world.size:
            self.world.print(f"this run had {processes} processes, and now has {self.world.size}: its steps "
                             "read the same ids as before, and may differ in rounding")


# ------------------------------------------------------------------------------------------------- main

def make_parser():
    recipes = "; ".join(f"{model}: " + ", ".join(f"{flag} {value}" for flag, value in recipe.items())
                        for model, recipe in RECIPES.items())
    parser = Parser(description="Train a model on a data folder.", epilog=f"Other defaults of {recipes}.")
    at_least_0 = number(float, lambda x: 0 <= x < math.inf, "a number, at least 0")
    share = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    add = parser.add_argument
    add("--data", help="folder that prepare.py wrote (default: data/python)")
    add("--out", help="folder to write (default: out/ and the name of the data folder)")
    add("--resume", action="store_true", help="continue from last.pt in --out, with its flags but --device")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", choices=MODELS, help="(default: gpt2-92m with a CUDA GPU, otherwise nano)")
    start.add_argument("--init", metavar="MODEL", help="begin with the weights of a file that train.py "
                       "wrote, of a folder in Hugging Face's layout, or of a name on their hub, such as gpt2")
    for name, meaning in SIZES.items():
        add(f"--{name}", type=share if name == "dropout" else count, help=f"{meaning} (default: the model's)")
    add("--stride", type=count, help="ids from the start of one window to the next (default: block_size)")
    add("--batch_size", type=count, default=16, help="most windows per process and micro-batch")
    add("--global_batch_size", type=count, help="windows per step (default: batch_size x processes)")
    length = parser.add_mutually_exclusive_group()
    epochs = number(float, lambda x: 0 < x < 1e6, "a number above 0 and below a million")
    length.add_argument("--epochs", type=epochs, help="times to go through the data (default: 20)")
    length.add_argument("--max_steps", type=count, help="steps to take, instead of --epochs")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon learns more per step, and takes more time for it where batches are small")
    add("--lr", type=positive, default=6e-4, help="peak learning rate")
    add("--min_lr", type=at_least_0, default=0.0, help="learning rate that the schedule falls towards")
    add("--warmup", type=share, default=0.1, help="share of all steps in which the learning rate rises")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="how the learning rate falls")
    add("--weight_decay", type=at_least_0, default=1e-4, help="weight decay of matrices")
    add("--grad_clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--eval_interval", type=count, default=2000, help="steps between evaluations")
    add("--eval_windows", type=count, help="validation windows to evaluate (default: all)")
    add("--eval_batch_size", type=count, default=16, help="windows per process and batch in evaluation")
    add("--log_interval", type=count, default=10, help="steps between log lines")
    add("--keep_epochs", type=count, default=4, help="epochs between checkpoints that are kept")
    add("--dtype", choices=DTYPES,
        help="of matrix products (default: the fastest that the device has hardware for)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, otherwise cpu)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="train through torch.compile, where it works: takes a minute first")
    add("--dry_run", action="store_true", help="print what the run would be and take, and exit")
    add("--plot", nargs="+", metavar="RUN",
        help="draw the curves of these folders into one picture, curves.png, and exit")
    add("--wandb", action="store_true", help="log to Weights & Biases, too")
    add("--seed", type=seed_number, default=1337, help="of the first weights, the order of data, and dropout")
    add("--max_minutes", type=positive, help="stop in good order after so long, as Ctrl-C does")
    return parser


def complete_args(parser, argv, given, saved, device):
    """Returns the values of all flags: those given, then those of the run to be resumed, or for a new run
    those of the model's recipe, then the defaults. Raises UserError if a saved run lacks some."""
    if saved:
        values = {name: value for name, value in saved[1]["args"].items() if name in vars(given)}
    else:
        model = given.model or ("gpt2-92m" if device.type == "cuda" else "nano")
        recipe = FINE_TUNING if given.init else {"model": model, **RECIPES.get(model, {"epochs": 20})}
        values = {"data": "data/python", **recipe}
    if given.epochs or given.max_steps:
        values["epochs"] = values["max_steps"] = None
    # Parsed like the flags of a user, they are checked like those, too. What is given comes last, and wins.
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()
             if value is not None and value is not False]
    args = parser.parse_args([*flags, *argv])
    if not (args.data and (args.model or args.init) and (args.epochs or args.max_steps)):
        raise UserError("last.pt cannot be resumed: its flags are not complete")
    if given.data is None and (os.path.isabs(args.data) or ".." in Path(args.data).parts):
        raise UserError(f"this run read {args.data}, which is outside this folder: allow it by --data")
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    given = parser.parse_args(argv)
    out = Path(given.out or Path("out", os.path.basename(os.path.abspath(given.data or "data/python"))))
    with (StopSignal() as told_to_stop, one_line_errors(UserError, ModelError, OSError),
          World(choose_device(given.device)) as world):
        if given.plot:
            picture = Path(given.plot[0] if len(given.plot) == 1 else "", "curves.png")
            draw_curves([Path(folder, "log.jsonl") for folder in given.plot], picture)
            world.print(f"wrote {picture}")
            return
        saved = None
        if given.resume or not given.dry_run:
            saved = find_checkpoint(out / "last.pt", given.resume, world.job)
        args = complete_args(parser, argv, given, saved, world.device)
        args.out = str(out)
        why = "" if given.model or given.init or given.device or saved else (
            ", as there is a CUDA GPU" if world.device.type == "cuda" else ", as there is no CUDA GPU")
        writing = "nothing is written" if args.dry_run else f"writing to {out}"
        world.print(f"training {args.init or args.model} on {world.device.type}{why}; {writing}")
        told_to_stop.allow(args.max_minutes or math.inf)
        keep_freed_memory()
        run = Run(args, world, told_to_stop, saved)
        del saved       # its memory is not needed any more
        if args.dry_run:
            run.try_out()
        else:
            run.train()


if __name__ == "__main__":
    main()
