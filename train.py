"""Tokens to weights: trains a model on a data folder that prepare.py wrote, and writes out/NAME.

    python train.py                                         one process
    torchrun --standalone --nproc_per_node=2 train.py       two processes: one per GPU, or both on the CPU
    python train.py --resume                                continues from out/NAME/last.pt, if there is one
    python train.py --data data/NAME --init gpt2            fine-tunes OpenAI's weights

out/NAME gets last.pt (weights, and all that --resume needs), best.pt (weights with the lowest validation
loss), epoch_0004.pt and so on (weights every --keep_epochs epochs), log.jsonl (one JSON object per line) and,
if matplotlib is installed, curves.png.

A run that is stopped and resumed computes what it would have computed otherwise (on a CPU bit for bit): what
happens at a step depends on the flags, the step and last.pt alone. Left out: models too large for one GPU.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from gpt import DTYPES, GPT, MODELS, ModelError, choose_device, choose_dtype, load_checkpoint, mixed_precision
from gpt import out_of_memory, save_checkpoint
from prepare import Parser, UserError, checked, duration, ending_signals, get_tokenizer, held, load_meta
from prepare import load_tokens, one_line_errors, positive_float, positive_int, seed_int
from sample import complete, load_model


# --------------------------------------------------------------------- the order of the data

class Sequences:
    """Tokens as sequences of block_size + 1, one starting every `stride` tokens. All but the last are inputs,
    all but the first are targets: at each position, the target is the token that comes next. So one sequence
    is block_size exercises at once, each with a context of another length."""

    def __init__(self, tokens, block_size, stride, vocab_size):
        self.tokens, self.block_size, self.stride, self.vocab_size = tokens, block_size, stride, vocab_size

    def __len__(self):
        return (len(self.tokens) - 1 - self.block_size) // self.stride + 1

    def read(self, indices, device):
        """Returns (inputs, targets) of these sequences, two int64 tensors (len(indices), block_size)."""
        starts = np.asarray(indices, dtype=np.int64) * self.stride
        ids = self.tokens[starts[:, None] + np.arange(self.block_size + 1)]     # (B, T + 1)
        check_tokens(ids, self.vocab_size)
        ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        return ids[:, :-1], ids[:, 1:]


@lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """The order in which an epoch reads n sequences, each of them once: a permutation that depends on nothing
    but seed and epoch. It takes 4 bytes a sequence."""
    order = np.arange(n, dtype=np.uint32)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class Batches:
    """batches(offset) returns this rank's share of the global batch at this offset in the order of training:
    a list of micro-batches (inputs, targets). With 10 sequences and 4 of them a step, step 2 (from 0) reads
    offsets 8 to 11: the last two sequences of epoch 0 and the first two of epoch 1. Ranks and micro-batches
    only slice this global batch: one rank with four micro-batches reads what four ranks with one each do. All
    micro-batches are of one size, the largest that batch_size allows."""

    def __init__(self, sequences, global_batch_size, batch_size, seed, world):
        self.sequences, self.seed, self.world = sequences, seed, world
        self.share = global_batch_size // world.size    # without --global_batch_size: batch_size
        sizes = range(1, min(batch_size, self.share) + 1)
        self.micro_batch_size = max(size for size in sizes if self.share % size == 0)

    def __call__(self, offset):
        indices = self.indices(offset + self.world.rank * self.share, self.share)
        return [self.sequences.read(indices[start:start + self.micro_batch_size], self.world.device)
                for start in range(0, self.share, self.micro_batch_size)]

    def indices(self, offset, count):
        """The sequences at offsets offset to offset + count - 1, which may lie in several epochs."""
        parts = [np.empty(0, dtype=np.uint32)]
        while count > 0:
            epoch, start = divmod(offset, len(self.sequences))
            parts.append(epoch_order(len(self.sequences), self.seed, epoch)[start:start + count])
            offset, count = offset + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


# ------------------------------------------------------------------- schedule and optimizers

def learning_rate(step, total_steps, warmup, peak, low, schedule):
    """The learning rate of a step, counted from 0. Warm-up: in this share of all steps it rises linearly to
    its peak, as the first gradients are large and soon point elsewhere. Then it falls, linearly, like a
    cosine (Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983), or, for a trapezoid, after a while
    at the peak. The last, small steps let weights settle. It would reach `low` one step after the last."""
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
            "trapezoid": min(1.0, (1 - done) / DECAY)}[schedule]
    return low + (peak - low) * left


def make_optimizers(name, model, weight_decay, device, dtype):
    """Returns [AdamW] or, for "muon", [AdamW, Muon]: Muon trains the matrices of the blocks, AdamW the rest.

    AdamW (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101) divides a running mean of the
    gradient by its running root mean square: each weight moves by about the learning rate, however large its
    gradient is. Weight decay also shrinks matrices a little at each step, so that they grow only where that
    helps. Vectors, biases and LayerNorms, do not decay: there are few of them, and shrinking a LayerNorm's
    weight to 0 would switch its channel off."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    in_blocks = {p for p in model.h.parameters() if p.dim() >= 2} if name == "muon" else set()
    groups = [{"params": [p for p in matrices if p not in in_blocks], "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    muon = [Muon([p for p in matrices if p in in_blocks], weight_decay, dtype)] if in_blocks else []
    return [adamw, *muon]


class Muon(torch.optim.Optimizer):
    """Moves a matrix by the running mean of its gradient, made orthogonal (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). In a gradient U S V^T, a few directions have large singular
    values S and dominate. U V^T sets all of them to 1, so the weak directions learn as fast as the strong."""

    def __init__(self, matrices, weight_decay, dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}       # batch matrices of the same shape
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                means = torch.stack([self.mean_gradient(matrix, group["momentum"]) for matrix in matrices])
                # Entries of root mean square 0.2, as AdamW's have, so that both can share a learning rate
                # (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, orthogonalize(means, self.dtype), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def mean_gradient(self, matrix, momentum):
        """The running mean of the gradient, with Nesterov's look ahead."""
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        state["mean"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["mean"], momentum)


def orthogonalize(x, dtype):
    """x (N, rows, columns) -> for each matrix U S V^T about U V^T, by five Newton-Schulz iterations. An odd
    polynomial of a matrix applies to each singular value; this one brings all but tiny ones to 0.7 to 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, dtype).mT        # s below is smaller this way
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)       # now no singular value is above 1
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


# --------------------------------------------------------------------------------- one step

def backward(model, micro_batches, scaler, autocast):
    """Adds to each weight's .grad the gradient of the mean loss over all micro-batches and ranks. Returns
    this rank's mean loss.

    With several ranks, model is wrapped in DDP, which averages the gradients of all ranks in the last
    backward pass. All start with the weights of rank 0, which DDP copies, and all take the same step from the
    same gradient: so their weights stay equal.

    Autocast runs matmuls in bfloat16 or float16, several times as fast. The smallest float16 above 0 is 6e-8,
    and many gradients are smaller: so the scaler multiplies the loss, and with it all gradients, by a large
    number, the loss scale. update divides it out again."""
    mean_loss = 0.0
    for i, (inputs, targets) in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = i == len(micro_batches)      # only DDP reads this, in forward too
        with autocast:
            loss = model(inputs, targets) / len(micro_batches)          # gradients add up; we want the mean
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return mean_loss.item()


def update(model, optimizers, scaler, loss, lr, grad_clip):
    """Takes a step of the optimizers, unless the loss or a gradient is not finite: one such step would ruin
    all weights. Returns the norm of the gradient, and whether the step was taken. A norm above grad_clip is
    scaled down to it, so that one odd batch cannot do much harm."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()     # halves the loss scale if gradients overflowed, doubles it after 2,000 steps without
    return grad_norm, finite


# -------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, sequences, count, batch_size, autocast, world):
    """Returns the mean loss in nats per token over `count` evenly spaced sequences, and its standard error.
    Each rank evaluates a share of them."""
    chosen = np.arange(count) * len(sequences) // count
    share = chosen[world.rank::world.size]
    total = squares = batches = 0
    for start in range(0, len(share), batch_size):
        indices = share[start:start + batch_size]
        with autocast:
            loss = model(*sequences.read(indices, world.device)).item()
        total, squares, batches = total + len(indices) * loss, squares + len(indices) * loss ** 2, batches + 1
    total, squares, batches = world.sum(total, squares, batches)
    mean = total / count
    variance_of_mean = max(0.0, squares / count - mean ** 2) / (batches - 1) if batches > 1 else math.nan
    return mean, math.sqrt(variance_of_mean)


def evaluate_and_save(run):
    """Logs the validation loss, keeps the weights if it is the lowest so far, and shows a sample."""
    save(run, "last.pt")    # evaluation is slow and might be interrupted, so save first
    run.model.eval()
    some = min(run.args.eval_sequences, len(run.val_sequences))
    for count in sorted({some, len(run.val_sequences) if run.state.step == run.total_steps else some}):
        loss, error = evaluate(run.model, run.val_sequences, count, run.args.eval_batch_size, run.autocast,
                               run.world)
        if count == some and loss < run.state.best_val_loss:     # always compared on the same sequences
            run.state.best_val_loss = loss
            save(run, "best.pt")
    # Bits per byte compare models whose tokens are of different lengths: a nat is 1 / ln 2 bits.
    bits_per_byte = loss / math.log(2) * run.data["val"]["tokens"] / max(1, run.data["val"]["bytes"])
    run.log.validation(run.state.step, val_loss=loss, val_stderr=error, bits_per_byte=bits_per_byte)
    show_sample_and_curves(run)
    run.model.train()
    run.log.last = run.state.step, time.perf_counter()      # so that tokens/s are those of training alone


# ---------------------------------------------------------------------------------- the loop

@dataclass
class State:
    """Where a run is: with the weights, the optimizers and the loss scale, all that last.pt has to save."""
    step: int = 0                       # steps done, with those that were skipped
    offset: int = 0                     # sequences read: where the next step begins in the order of training
    skipped: int = 0                    # steps in a row that were not taken, as something was not finite
    best_val_loss: float = math.inf     # the lowest so far


@dataclass
class Run:
    """The parts of a run. Training changes the first four, and last.pt has them."""
    model: GPT
    optimizers: list
    scaler: torch.amp.GradScaler        # disabled unless float16
    state: State
    args: argparse.Namespace            # the flags
    world: object                       # the ranks: World, below
    data: dict                          # meta.json
    batches: Batches                    # of training
    val_sequences: Sequences            # for validation
    autocast: object                    # runs matmuls in a faster dtype
    total_steps: int = 0
    wrapped_model: object = None        # model as it is trained, maybe compiled and in DDP
    log: object = None                  # Log, below
    saved_at: float = 0.0               # when last.pt was written


def train(run, told_to_stop):
    """The training loop, from run.state to run.total_steps, or until a rank gets a signal to stop."""
    args, world, state = run.args, run.world, run.state
    while True:
        if state.step > 0 and (state.step % args.eval_interval == 0 or state.step == run.total_steps):
            evaluate_and_save(run)
        if state.step >= run.total_steps:
            break
        lr = learning_rate(state.step, run.total_steps, args.warmup, args.lr, args.min_lr, args.schedule)
        seed_dropout(args.seed, state.step, world.rank)
        loss = backward(run.wrapped_model, run.batches(state.offset), run.scaler, run.autocast)
        # One exchange: the mean loss of all ranks, and whether any of them has to stop.
        loss, stop = world.sum(loss / world.size, told_to_stop())
        grad_norm, taken = update(run.model, run.optimizers, run.scaler, loss, lr, args.grad_clip)
        state.skipped = 0 if taken else state.skipped + 1
        check_finite(run, loss, grad_norm, lr)
        state.step += 1
        state.offset += args.global_batch_size
        if state.step == 1 or state.step % args.log_interval == 0:
            run.log.training(state.step, epoch=state.offset / len(run.batches.sequences), loss=loss, lr=lr,
                             grad_norm=grad_norm, loss_scale=run.scaler.get_scale())
        save_if_due(run)
        if stop:
            break
    save(run, "last.pt")    # again, as the last evaluation may have changed best_val_loss
    if state.step < run.total_steps:
        world.print(f"stopped after step {state.step:,} of {run.total_steps:,} and saved: the same command "
                    "with --resume continues")


# ================================================================================== plumbing
# A first reading may stop here: the training above is complete. Below: ranks and signals, safeguards, how a
# run is set up and resumed, its log and curves, its flags.

LARGE = 50_000_000      # tokens from which on it takes a GPU and, by default, gpt2-92m
DECAY = 0.65            # share of the steps after the warm-up in which a trapezoid falls
SKIPS_IN_A_ROW = 20     # float16 steps that may be skipped before the run ends
SAVE_SECONDS = 600      # most time between two versions of last.pt
PATIENCE = timedelta(minutes=10)        # how long a rank waits for another before it gives up

# Defaults of a model, or of --init. parse_args puts them between the parser's and the flags that are given.
RECIPES = {
    "nano": {"max_steps": 1400, "global_batch_size": 32, "optimizer": "muon", "lr": 7e-3, "warmup": 0.03,
             "schedule": "trapezoid", "eval_interval": 350, "eval_sequences": 512, "log_interval": 50},
    "init": {"epochs": 3.0, "lr": 5e-5},
    "other": {"epochs": 20.0},
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "dropout")        # of --model, which flags can change


# ------------------------------------------------------------------------- ranks and signals

class World:
    """The ranks that train together, and all their communication. This one is number `rank` of `size`, and
    computes on `device`; a single process is a world of size 1. Raises UserError if they cannot start."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        self.device, self.sums = device, weakref.WeakSet()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if self.rank >= self.size or (self.size > 1 and not all(map(os.environ.get, names))):
            raise UserError(f"{', '.join(names)} are not as torchrun sets them: use torchrun, or unset them")
        if device.type == "mps" and self.size > 1:
            raise UserError("several processes cannot share an Apple GPU: leave out torchrun")
        if device.type == "cuda":
            gpu = int(os.environ["LOCAL_RANK"]) if self.size > 1 else device.index or 0
            n_gpus, n_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            if max(gpu + 1, n_local) > n_gpus:      # the same for all ranks, so that none waits for another
                raise UserError(f"{n_local} processes need as many GPUs, but there are {n_gpus}: add "
                                f"--nproc_per_node={n_gpus} to torchrun, or --device cpu to train.py")
            self.device = torch.device("cuda", gpu)
            torch.cuda.set_device(self.device)
        if self.size > 1:       # gloo adds up numbers on CPUs, nccl gradients on GPUs
            store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":    # it outlives ranks that restart
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            nccl = device.type == "cuda" and dist.is_nccl_available()      # Windows has none
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=self.rank,
                                    world_size=self.size, timeout=PATIENCE)

    def wrap(self, model, ids, autocast):
        """Returns the model to train: with several ranks, DDP, which averages their gradients in backward."""
        if self.size == 1:
            return model
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # After its first backward pass, DDP adds up gradients in another order. A resumed run would do so at
        # another step, and round differently: so each run begins with a pass that counts for nothing.
        with autocast:
            loss = model(ids, ids)
        loss.backward()
        model.zero_grad()
        return model

    def sum(self, *numbers):
        """Returns a list: each number, summed over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            self.sums.add(tensor)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def print(self, text):
        if self.rank == 0:
            with suppress(OSError, ValueError):     # nobody can read it any more, but the run continues
                print(text, flush=True)

    def close(self):
        if self.size > 1:
            patience = time.monotonic() + 1
            while self.sums and time.monotonic() < patience:
                time.sleep(0.001)       # Python crashes if a thread of gloo still holds a sum when it ends
            dist.destroy_process_group()


@contextmanager
def stop_signal():
    """Gives a function that says whether Ctrl-C, SIGTERM or SIGHUP (the terminal closes) has come, so that a
    run can stop cleanly. A second Ctrl-C stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):     # not print, which the signal may have interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")

    handlers = {number: signal.signal(number, receive) for number in ending_signals()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------- safeguards

def check_finite(run, loss, grad_norm, lr):
    """Raises UserError if the last step was not taken; in float16, where each such step lowers the loss
    scale, only after many in a row."""
    if run.state.skipped >= (SKIPS_IN_A_ROW if run.scaler.is_enabled() else 1):
        raise UserError(
            f"step {run.state.step + 1:,} has loss {loss:g} and a gradient of norm {grad_norm:g} at learning "
            f"rate {lr:.3g} and loss scale {run.scaler.get_scale():g}: return to the last checkpoint with "
            "--resume and a lower --lr")


def check_tokens(ids, vocab_size):
    if ids.max() >= vocab_size:
        raise UserError(f"the data is damaged: it contains token {ids.max()}, but its vocabulary ends at "
                        f"{vocab_size - 1}: run prepare.py again")


def seed_dropout(seed, step, rank):
    """Makes dropout depend on nothing but these three, in particular not on what this process did before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def keep_freed_memory():
    """Makes the C library keep freed memory for the next step, if it is glibc. By default, it returns large
    blocks to the system, which must fill them with zeros before each use: up to 40% of a step's time."""
    import ctypes
    with suppress(OSError, AttributeError, TypeError):      # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)      # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: what is freed stays


# ------------------------------------------------------------------------------------- a run

def set_up(args, world, dtype, saved):
    """Returns the Run that the flags ask for, from its checkpoint, (model, meta), if there is one. Raises
    UserError if they do not fit the data, the checkpoint or the number of ranks."""
    data = load_meta(args.data)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    torch.manual_seed(args.seed)
    if saved:
        model = saved[0]
    elif args.init:
        model = load_initial(args.init, data, sizes)
    else:
        model = GPT(replace(MODELS[args.model], vocab_size=data["vocab_size"], **sizes))
    model = model.to(world.device).train()
    vars(args).update({**asdict(model.config), **sizes})        # what --resume must find unchanged
    args.stride = args.stride or args.block_size
    args.global_batch_size = args.global_batch_size or args.batch_size * world.size
    if args.global_batch_size % world.size:
        raise UserError(f"--global_batch_size {args.global_batch_size} is not a multiple of {world.size}, "
                        "the number of processes: change one of them")
    sequences = load_sequences(args, "train", args.stride, data["vocab_size"])
    batches = Batches(sequences, args.global_batch_size, args.batch_size, args.seed, world)
    run = Run(model, make_optimizers(args.optimizer, model, args.weight_decay, world.device, dtype),
              torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16), State(),
              args, world, data, batches, load_sequences(args, "val", args.block_size, data["vocab_size"]),
              mixed_precision(world.device, dtype))
    if saved:
        restore(run, saved[1])
    if world.sum(run.state.step) != [run.state.step * world.size]:
        raise UserError("the ranks found different checkpoints: --out must be on a disk that all share")
    ids = torch.zeros(batches.micro_batch_size, args.block_size, dtype=torch.int64, device=world.device)
    trained = compiled(model) if args.compile else model
    run.wrapped_model = world.wrap(trained, ids, run.autocast)
    if args.minutes and not saved:
        args.max_steps = max(1, round(60 * args.minutes / seconds_per_step(run)))
    left = math.ceil(((args.epochs or 0) * len(sequences) - run.state.offset) / args.global_batch_size)
    run.total_steps = args.max_steps or run.state.step + max(0, left)
    run.saved_at = time.monotonic()
    return run


def compiled(model):
    """Returns a model of the same weights whose blocks and loss are compiled: one by one, so that DDP can
    send the gradients of a block while those of earlier blocks are computed."""
    from copy import deepcopy
    model = deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for block in model.h:
        block.compile()
    model.loss = torch.compile(model.loss)
    return model


def seconds_per_step(run, n_steps=5):
    """Measures a few steps at a learning rate of 0, and leaves no trace of them in a run that begins."""
    scaler, seconds = run.scaler.state_dict(), []
    for _ in range(1 + n_steps):
        started = time.perf_counter()
        loss = backward(run.wrapped_model, run.batches(run.state.offset), run.scaler, run.autocast)
        update(run.model, run.optimizers, run.scaler, loss, 0.0, run.args.grad_clip)
        seconds.append(time.perf_counter() - started)
    for optimizer in run.optimizers:
        optimizer.state.clear()
    run.scaler.load_state_dict(scaler)
    [total] = run.world.sum(sorted(seconds[1:])[n_steps // 2])      # in the first one, much is set up
    return total / run.world.size


def load_initial(source, data, sizes):
    """Returns the model that --init begins with: it may get another dropout and a shorter block_size. Raises
    UserError if it cannot read this data, or would have other sizes."""
    model, (tokenizer, vocabulary) = load_model(source)
    if (tokenizer, vocabulary) != (data["tokenizer"], data["vocabulary"]):
        raise UserError(f"{source} has another tokenizer, {tokenizer}: run prepare.py again with --tokenizer "
                        f"{'and the data folder it was trained on' if vocabulary else tokenizer}")
    longest = model.config.block_size
    if sizes.keys() - {"dropout", "block_size"} or sizes.get("block_size", 0) > longest:
        raise UserError("--init has sizes of its own: leave out --n_layer, --n_head, --n_embd and a "
                        f"--block_size above {longest:,}")
    weights = model.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][:sizes.get("block_size")]
    model = GPT(replace(model.config, **sizes))
    model.load_state_dict(weights)
    return model


def load_sequences(args, split, stride, vocab_size):
    tokens = load_tokens(args.data, split)
    if len(tokens) <= args.block_size:
        raise UserError(f"{args.data}/{split}.bin has only {len(tokens):,} tokens and a sequence needs "
                        f"{args.block_size + 1:,}: prepare more text, or lower --block_size")
    return Sequences(tokens, args.block_size, stride, vocab_size)


def save(run, name):
    """Writes a checkpoint, on rank 0. last.pt gets all that a resumed run needs."""
    if run.world.rank > 0:
        return
    meta = {"args": vars(run.args), "data": run.data, **asdict(run.state)}
    if name == "last.pt":
        meta["optimizers"] = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
        meta["scaler"] = run.scaler.state_dict()
        run.saved_at = time.monotonic()
    save_checkpoint(Path(run.args.out, name), run.model, meta)


def save_if_due(run):
    """Saves last.pt every ten minutes, and a checkpoint to keep every --keep_epochs epochs."""
    n_sequences = run.args.keep_epochs * len(run.batches.sequences)
    kept = run.state.offset // n_sequences
    if kept > (run.state.offset - run.args.global_batch_size) // n_sequences:
        save(run, f"epoch_{kept * run.args.keep_epochs:04}.pt")
    if time.monotonic() > run.saved_at + SAVE_SECONDS:
        save(run, "last.pt")


def restore(run, meta):
    """Continues where a checkpoint ends. Raises UserError if that would be another run: another model, other
    data, or another order in which it is read."""
    if meta["data"] != run.data:
        raise UserError(f"cannot resume: {run.args.data} is not the data that this run began with: prepare "
                        "that again, or choose another --out")
    then, now = meta["args"], vars(run.args)
    for name in (*SIZES, "model", "init", "stride", "seed", "optimizer"):
        if then[name] != now[name]:
            raise UserError(f"cannot resume: {name} was {then[name]} in that run, but is {now[name]} now")
    for optimizer, state in zip(run.optimizers, meta["optimizers"], strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if run.scaler.is_enabled() and meta["scaler"]:
        run.scaler.load_state_dict(meta["scaler"])
    run.state = State(**{name: meta[name] for name in asdict(run.state)})


def describe(run):
    """Prints what this run will do."""
    args, batches, sequences, done = run.args, run.batches, run.batches.sequences, run.state.step
    epochs = (run.state.offset + (run.total_steps - done) * args.global_batch_size) / len(sequences)
    run.world.print(
        f"{run.model.num_params():,} parameters; {args.data}: {len(sequences):,} sequences of "
        f"{sequences.block_size} tokens\n"
        f"each step: {run.world.size} processes x {batches.share // batches.micro_batch_size} micro-batches "
        f"x {batches.micro_batch_size} sequences = {tokens_per_step(run):,} tokens\n"
        f"{run.total_steps:,} steps, {epochs:.2f} epochs" + (f", {done:,} of them done" if done else ""))
    if done >= run.total_steps:
        run.world.print("all steps are done: --max_steps or --epochs, with more of them, trains on")


def tokens_per_step(run):
    return run.args.global_batch_size * run.batches.sequences.block_size


def dry_run(run):
    """Prints what all steps would take."""
    seconds = seconds_per_step(run)
    left = duration(seconds * max(0, run.total_steps - run.state.step))
    run.world.print(f"{tokens_per_step(run) / seconds:,.0f} tokens/s; {left} for all steps, without "
                    f"evaluations; at least {peak_memory(run.world.device) / 1e9:.2f} GB in each process")


def peak_memory(device):
    """Returns the most memory in bytes that this process has held so far: tensors on a GPU, all of it on a
    CPU with Linux. Elsewhere returns 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, ValueError):
        words = Path("/proc/self/status").read_text().split()
        return 1024 * int(words[words.index("VmHWM:") + 1])
    return 0


# ---------------------------------------------------------------------------- log and curves

class Log:
    """Prints lines and appends rows, JSON objects, to log.jsonl, on rank 0. The first row of each start says
    how the run was made."""

    def __init__(self, run):
        self.run, self.path, self.tracker = run, Path(run.args.out, "log.jsonl"), None
        self.failed = set()
        if run.world.rank == 0 and self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self.path.open("a").write("\n")     # a killed run left half a row
        if run.world.rank == 0 and run.args.wandb:
            import wandb
            with self.decoration("wandb"):
                self.tracker = wandb.init(project="smallgpt", name=self.path.parent.name,
                                          config=vars(run.args), dir=run.args.out)
        self.write("", started_at_step=run.state.step, args=vars(run.args), commit=commit(),
                   python=sys.version.split()[0], torch=torch.__version__)
        self.start = self.last = run.state.step, time.perf_counter()

    def training(self, step, *, epoch, loss, lr, grad_norm, loss_scale):
        now, total_steps, (last_step, last) = time.perf_counter(), self.run.total_steps, self.last
        rate = (step - last_step) * tokens_per_step(self.run) / (now - last)
        seconds = now - self.start[1]
        left = duration(seconds / (step - self.start[0]) * (total_steps - step))
        self.write(f"step {step:,}/{total_steps:,} | epoch {epoch:.2f} | loss {loss:.4f} | lr {lr:.2e} | "
                   f"{rate:,.0f} tokens/s | {left} left", step=step, epoch=epoch, loss=loss, lr=lr,
                   grad_norm=grad_norm, loss_scale=loss_scale, tokens_per_second=rate, seconds=seconds)
        self.last = step, now

    def validation(self, step, *, val_loss, val_stderr, bits_per_byte):
        self.write(f"step {step:,}/{self.run.total_steps:,} | validation loss {val_loss:.4f} ± "
                   f"{val_stderr:.4f} | {bits_per_byte:.3f} bits per byte", step=step, val_loss=val_loss,
                   val_stderr=val_stderr, bits_per_byte=bits_per_byte)

    def write(self, line, **row):
        """Prints the line and appends the row. JSON has no infinity and no NaN: they become null."""
        row = {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in row.items()}
        if self.run.world.rank == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.tracker and line:
            with self.decoration("wandb"):
                self.tracker.log(row, step=row["step"])
        if line:
            self.run.world.print(line)

    @contextmanager
    def decoration(self, name):
        """For what training does not need: its first failure is reported, and training continues."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                self.run.world.print(f"warning: no {name} ({type(error).__name__}: {error})")
            self.failed.add(name)


def commit():
    """Returns the commit of this code, with "-dirty" if it was changed since, or None outside of git."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def show_sample_and_curves(run):
    if run.world.rank == 0:
        with run.log.decoration("sample"):
            tokenizer = get_tokenizer(run.data["tokenizer"], run.data["vocabulary"])
            parts = complete(run.model, tokenizer, "", 150, temperature=0.8, top_k=50)
            text = "".join(added for [added] in parts)
            run.world.print("sample:\n    " + text.strip().replace("\n", "\n    "))
        with run.log.decoration("curves"):
            draw_curves(run.args.out)


def draw_curves(out):
    """Draws the losses and learning rates of a run into curves.png. Needs the package matplotlib."""
    from matplotlib.figure import Figure
    rows = {}       # a resumed run may have taken a step twice: then its last row counts
    for line in Path(out, "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):     # a killed run leaves half a line
            row = json.loads(line)
            rows["val_loss" in row, row["step"]] = row

    def curve(name):
        steps = sorted((row["step"], row[name]) for row in rows.values() if name in row)
        return np.array(steps, dtype=float).reshape(-1, 2).T        # null becomes NaN

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    losses.set(title=str(out).replace("$", r"\$"), ylabel="loss in nats per token")
    rates.set(ylabel="learning rate", xlabel="step")
    losses.plot(*curve("loss"), alpha=0.5, label="training")
    losses.errorbar(*curve("val_loss"), curve("val_stderr")[1], marker=".", capsize=3,
                    label="validation, ± standard error")
    rates.plot(*curve("lr"))
    losses.legend()
    figure.savefig(Path(out, "curves.png"), dpi=120)


# ------------------------------------------------------------------------------------- flags

def make_parser():
    recipes = "; ".join(f"{model}: " + ", ".join(f"{flag} {value}" for flag, value in recipe.items())
                        for model, recipe in RECIPES.items())
    parser = Parser(description="Train a model on a data folder.", epilog=f"Other defaults of {recipes}.")
    at_least_0 = checked(float, lambda x: 0 <= x < math.inf, "a number, at least 0")
    share = checked(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    add = parser.add_argument
    add("--data", default="data/python", help="folder that prepare.py wrote")
    add("--out", help="folder to write (default: out/ and the name of the data folder)")
    add("--resume", action="store_true", help="continue from last.pt in --out, if there is one")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", choices=MODELS, help="(default: nano, or gpt2-92m with a CUDA GPU and 50 "
                       "million tokens)")
    start.add_argument("--init", metavar="MODEL", help="begin with the weights of a file train.py wrote, of "
                       "a folder in Hugging Face's format, or of a name on their hub, such as gpt2")
    add("--n_layer", type=positive_int, help="number of blocks (default: the model's)")
    add("--n_head", type=positive_int, help="attention heads per block (default: the model's)")
    add("--n_embd", type=positive_int, help="width, C (default: the model's)")
    add("--block_size", type=positive_int, help="tokens per sequence (default: the model's)")
    add("--dropout", type=share, help="share of activations zeroed in training (default: the model's)")
    add("--stride", type=positive_int, help="tokens between the starts of sequences (default: block_size)")
    add("--batch_size", type=positive_int, default=16, help="most sequences per process and micro-batch")
    add("--global_batch_size", type=positive_int, help="sequences per step (default: batch_size x processes)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_float, help="times to go through the data (default: 20)")
    length.add_argument("--max_steps", type=positive_int, help="steps to take")
    length.add_argument("--minutes", type=positive_float, help="take as many steps as fit into these minutes")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon learns more per step, and takes more time for it where batches are small")
    add("--lr", type=positive_float, default=6e-4, help="peak learning rate")
    add("--min_lr", type=at_least_0, default=0.0, help="learning rate that the schedule falls towards")
    add("--warmup", type=share, default=0.1, help="share of all steps in which the learning rate rises")
    add("--schedule", choices=("linear", "cosine", "trapezoid"), default="linear", help="how it then falls")
    add("--weight_decay", type=at_least_0, default=1e-4, help="weight decay of matrices")
    add("--grad_clip", type=positive_float, default=1.0, help="largest norm of the gradient")
    add("--eval_interval", type=positive_int, default=2000, help="steps between evaluations")
    add("--eval_sequences", type=positive_int, default=2048,
        help="most validation sequences to evaluate; all of them after the last step")
    add("--eval_batch_size", type=positive_int, default=16, help="sequences per batch in evaluation")
    add("--log_interval", type=positive_int, default=10, help="steps between log lines")
    add("--keep_epochs", type=positive_int, default=4, help="epochs between checkpoints that are kept")
    add("--dtype", choices=DTYPES, help="of matmuls (default: the fastest that the device has hardware for)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, otherwise cpu)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="train by torch.compile")
    add("--dry_run", action="store_true", help="estimate time and memory; write nothing")
    add("--wandb", action="store_true", help="log to Weights & Biases, too")
    add("--seed", type=seed_int, default=1337, help="of the first weights, the order of data, and dropout")
    add("--max_minutes", type=positive_float, help="stop cleanly after so long, as Ctrl-C does")
    return parser


def parse_args(argv):
    """Returns the flags, and the checkpoint to continue, (model, meta), or None. A flag that is not given is
    that of the run to continue, else of the recipe, else of the parser. Raises UserError if a new run would
    overwrite an earlier one."""
    parser = make_parser()
    given = parser.parse_args(argv)
    out = given.out or str(Path("out", os.path.basename(os.path.abspath(given.data))))
    last, saved = Path(out, "last.pt"), None
    if last.exists() and given.resume:
        saved = load_checkpoint(last)
        if "optimizers" not in saved[1]:
            raise UserError(f"{last} cannot be resumed: it has weights, but not the state of an optimizer")
        defaults = {**saved[1]["args"], "device": None, "dry_run": False}
    elif last.exists() and not given.dry_run:
        raise UserError(f"{last} is from an earlier run: --resume continues it, another --out keeps it")
    elif given.init:
        defaults = RECIPES["init"]
    else:
        large = (not given.model and choose_device(given.device).type == "cuda"
                 and load_meta(given.data)["train"]["tokens"] >= LARGE)
        model = given.model or ("gpt2-92m" if large else "nano")
        defaults = {"model": model, **RECIPES.get(model, RECIPES["other"])}
    if given.epochs or (given.minutes and not saved):
        defaults = {**defaults, "max_steps": None}      # otherwise, max_steps comes first
    parser.set_defaults(**{**defaults, "out": out})
    return parser.parse_args(argv), saved


@record     # so that torchrun's report says which rank failed, and why
def start(argv):
    args, saved = parse_args(argv)
    world = World(choose_device(args.device))
    try:
        dtype = choose_dtype(args.dtype, world.device)
        gpu = "a" if torch.cuda.is_available() else "no"
        writes = "nothing is written" if args.dry_run else f"writing to {args.out}"
        world.print(f"training {args.init or args.model} on {world.device.type} in {str(dtype)[6:]} (there "
                    f"is {gpu} CUDA GPU here); {writes}")
        keep_freed_memory()
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")      # tensor cores for float32
        run = set_up(args, world, dtype, saved)
        del saved       # its memory is needed no more
        describe(run)
        if args.dry_run:
            dry_run(run)
            return
        with held(args.out) if world.rank == 0 else nullcontext():
            run.log = Log(run)
            deadline = time.monotonic() + 60 * (args.max_minutes or math.inf)
            with stop_signal() as signalled:
                train(run, lambda: signalled() or time.monotonic() > deadline)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or args.out} ({error.strerror}): fix that, or choose "
                        "another --out; what was saved before can be resumed") from error
    finally:
        world.close()


def main(argv=None):
    advice = "lower --batch_size, or choose a smaller --model or --block_size"
    with one_line_errors(UserError, ModelError, OSError), out_of_memory(advice):
        start(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
