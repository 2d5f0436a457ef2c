"""Tokens to weights: trains a model on a data folder that prepare.py wrote, and writes out/NAME.

    python train.py                                         one process
    torchrun --standalone --nproc_per_node=2 train.py       two processes: one per GPU, or both on the CPU
    python train.py --resume                                continues from out/NAME/last.pt, if there is one

out/NAME gets last.pt (everything --resume needs), best.pt (weights with the lowest validation loss),
epoch_0004.pt and so on (weights every --keep_epochs epochs), log.jsonl and, with matplotlib, curves.png.

Processes that train together are called ranks. `world` knows the number of this one (world.rank), how many
there are (world.size), and its device; world.sum(a, b) sums each over all ranks. A step learns from one
global batch of sequences. Each rank takes an equal share of it, in micro-batches of at most --batch_size
sequences, so that they fit into memory: 64 sequences may be 2 ranks x 2 micro-batches x 16. Then all ranks
update their weights identically.

last.pt is written before each evaluation or epoch_*.pt, every ten minutes in between, and when the run is
done or stopped: first to a temporary file, which then replaces it, so that a crash leaves the old one intact.
A run that is stopped and resumed computes exactly what it would have without the stop (bit for bit on the
same kind of CPU): a step depends only on flags, data, last.pt, ranks and threads. Left out: sharding.
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
from gpt import save_checkpoint
from prepare import Parser, UserError, at_least_0, checked, duration, get_tokenizer, held, load_meta
from prepare import load_tokens, note, on_ending_signals, one_line_errors, positive_float, positive_int
from prepare import seed_int
from sample import complete, load_model


# --------------------------------------------------------------------- the order of the data

class Sequences:
    """Sequences of block_size + 1 tokens, one starting every `stride` tokens (by default, block_size). In
    each, all but the last token are inputs and all but the first are targets: the target is the next token.
    Position 0 predicts it from one token, position 1 from two, and so on: block_size predictions at once.

    A sequence may begin in the middle of a document and contain several. Attention sees across their borders:
    the model learns that <|endoftext|> starts something new."""

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


@lru_cache(maxsize=1)       # called for each sequence, but shuffles only when an epoch begins
def epoch_order(n, seed, epoch):
    """The order in which an epoch reads n sequences, each of them once: a permutation that depends only on
    seed and epoch."""
    order = np.arange(n, dtype=np.uint32)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class Batches:
    """Imagine the shuffled orders of all epochs in one long list. Each step takes the next global_batch_size
    sequences of it, and each rank an equal share of those. With two ranks:

        | rank 0 | rank 1 | rank 0 | rank 1 | rank 0 | ...
        |     step 0      |     step 1      |     step 2

    batches(offset) is this rank's share of the step that begins at that offset of the list: micro-batches
    (inputs, targets) of equal size, at most batch_size. If that is 16, a share of 40 becomes four of 10 each.
    However many ranks and micro-batches share the work, a step reads the same sequences, as long as
    global_batch_size is the same."""

    def __init__(self, sequences, global_batch_size, batch_size, seed, world):
        self.sequences, self.seed, self.world = sequences, seed, world
        self.share = global_batch_size // world.size        # sequences for each rank
        sizes = range(1, min(batch_size, self.share) + 1)
        self.micro_batch_size = max(size for size in sizes if self.share % size == 0)

    def __call__(self, offset):
        n, start = len(self.sequences), offset + self.world.rank * self.share
        indices = [epoch_order(n, self.seed, i // n)[i % n] for i in range(start, start + self.share)]
        return [self.sequences.read(indices[i:i + self.micro_batch_size], self.world.device)
                for i in range(0, self.share, self.micro_batch_size)]


# ------------------------------------------------------------------- schedule and optimizers

def learning_rate(step, total_steps, warmup, peak, low, schedule):
    """The learning rate of a step, counted from 0. It starts small, while AdamW has seen few gradients. Over
    W = warmup * total_steps steps it rises linearly, from peak / (W + 1) at step 0 to the peak at step W.
    Then it falls, so that the weights settle. One step after the last, it would be `low`:

        linear      straight down (the default)
        cosine      along half a cosine (Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983)
        trapezoid   at the peak for 60% of the remaining steps, then straight down (WSD, nano's default)
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = (total_steps - step) / (total_steps - warmup_steps)          # from 1 down to almost 0
    if schedule == "linear":
        height = left
    elif schedule == "cosine":
        height = (1 - math.cos(math.pi * left)) / 2
    elif schedule == "trapezoid":
        height = min(1.0, left / 0.4)
    return low + (peak - low) * height


def make_optimizers(name, model, weight_decay, device, dtype):
    """Returns [AdamW], which trains everything, or for "muon" (nano's default) [AdamW, Muon]: then the
    matrices of the blocks are trained by Muon, explained after the loop. AdamW (Loshchilov and Hutter 2017,
    https://arxiv.org/abs/1711.05101) divides a running mean of the gradient by its running root mean square
    (betas: how much of the old ones it keeps). So a weight moves as far for small gradients as for large.

    Both also shrink every matrix a little at each step, embeddings too, by its learning rate times
    weight_decay, so that weights grow only where it helps. Vectors (biases, LayerNorm weights) do not decay:
    they are few, and a LayerNorm weight of 0 mutes its channel."""
    matrices = {path: p for path, p in model.named_parameters() if p.dim() >= 2}
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for_muon = {path: p for path, p in matrices.items() if name == "muon" and path.startswith("h.")}
    for_adamw = [p for path, p in matrices.items() if path not in for_muon]
    # Found by trials of longer runs: beside Muon, embeddings and lm_head do best at 4 times its rate.
    groups = [{"params": for_adamw, "weight_decay": weight_decay, "lr_scale": 4 if for_muon else 1},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))]
    if for_muon:
        # c_attn holds three matrices, for Q, K and V, one above the other. Muon treats each on its own.
        groups = [{"params": [p], "parts": 3 if path.endswith("c_attn.weight") else 1}
                  for path, p in for_muon.items()]
        optimizers.append(Muon(groups, weight_decay, dtype))
    return optimizers


# --------------------------------------------------------------------------------- one step

def backward(model, micro_batches, scaler, autocast):
    """Leaves in .grad the gradient of the mean loss over the whole global batch (in float16, multiplied by
    the loss scale, explained below). Returns this rank's mean loss, a tensor that a GPU may still compute.

    With several ranks, model is wrapped in DDP (PyTorch's DistributedDataParallel). At the start it copies
    the weights of rank 0 to all ranks; once per step it averages their gradients. So all ranks begin with the
    same weights, take the same steps, and stay equal."""
    mean_loss = 0.0
    for i, (inputs, targets) in enumerate(micro_batches, start=1):
        # Each rank adds up the gradients of its micro-batches, and in the last backward pass, DDP averages
        # these sums over all ranks. This flag, set before forward, tells it which pass is the last (so does
        # DDP's no_sync()); without DDP, it does nothing.
        model.require_backward_grad_sync = i == len(micro_batches)
        with autocast:      # runs matmuls in --dtype: in 16 bits, several times faster; weights stay float32
            part = model(inputs, targets) / len(micro_batches)      # the parts, and their gradients, add up
        # The smallest positive float16 is 6e-8, and many gradients are smaller. So the scaler multiplies the
        # loss, and with it all gradients, by a large number, the loss scale. In other dtypes it is 1.
        scaler.scale(part).backward()
        mean_loss += part.detach()      # not .item(), which would wait for the GPU
    return mean_loss


def clip_gradients(model, optimizers, scaler, grad_clip):
    """If the norm of all gradients together is above grad_clip, scales them down to it, so that one outlier
    batch cannot do much damage. Returns the norm before."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)      # in float16, divides by the loss scale; remembers any inf or NaN
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()     # waits for the GPU


def update(optimizers, scaler, loss, grad_norm, lr):
    """Steps the optimizers, or skips the step if the loss or a gradient is infinite or NaN, which would ruin
    all weights. In float16, gradients overflow now and then: the loss scale was too high, and is halved. In
    other dtypes, or 20 times in a row, training has diverged, and check_finite ends the run. Loss and
    gradients are averages over all ranks, so all decide alike. Returns whether a step was taken."""
    taken = math.isfinite(loss) and math.isfinite(grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        if taken:
            optimizer.step()    # not scaler.step, which might skip just one optimizer
        optimizer.zero_grad()
    scaler.update()     # halves the loss scale if unscale_ met an inf; doubles it after 2,000 good steps
    return taken


# -------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, sequences, count, batch_size, autocast, world):
    """Returns the mean loss in nats per token over `count` evenly spaced sequences, always the same ones, and
    its standard error: how much it would typically vary with other text. The ranks share the batches. The
    caller switches dropout off. After the last step, a second call evaluates all sequences."""
    chosen = np.arange(count) * len(sequences) // count
    batches = [chosen[i:i + batch_size] for i in range(0, count, batch_size)]
    losses, sizes = [0.0] * len(batches), [len(batch) for batch in batches]
    for i in range(world.rank, len(batches), world.size):
        with autocast:
            loss = model(*sequences.read(batches[i], world.device))
        losses[i] = sizes[i] * loss.item()      # summed over the batch; other ranks' batches stay at 0
    losses = world.sum(*losses)     # now each rank has those of all batches
    return sum(losses) / count, standard_error(losses, sizes)


# ---------------------------------------------------------------------------------- the loop

@dataclass
class State:
    """Where a run stands. last.pt has this, plus weights, optimizers, loss scale, flags and vocabulary."""
    step: int = 0                       # the next step's number: how many are done, skipped ones too
    offset: int = 0                     # sequences read (a resumed run may read more or fewer per step)
    skipped: int = 0                    # consecutive steps that update has skipped
    best_val_loss: float = math.inf     # the lowest so far


def train(run, told_to_stop):
    """The training loop. run holds what set_up built from the flags: model, optimizers, batches and so on.
    wrapped_model is what is trained: model itself, compiled, or in DDP. told_to_stop() is true after Ctrl-C,
    for example. Returns whether any rank stopped it. save_if_due, evaluate_and_save and check_finite are in
    the plumbing, and do what their names say."""
    args, world, state = run.args, run.world, run.state
    stop_votes = 0
    while not stop_votes:
        # These come before a step, not after: if the run dies in one of them, the resumed run repeats it. The
        # last evaluation takes a round of its own.
        if state.step > 0:
            save_if_due(run)
            if state.step % args.eval_interval == 0 or state.step == run.total_steps:
                evaluate_and_save(run)
        if state.step >= run.total_steps:
            break
        lr = learning_rate(state.step, run.total_steps, args.warmup, args.lr, args.min_lr, args.schedule)
        seed_dropout(args.seed, state.step, world.rank)     # so last.pt needs no random state
        loss = backward(run.wrapped_model, run.batches(state.offset), run.scaler, run.autocast)
        grad_norm = clip_gradients(run.model, run.optimizers, run.scaler, args.grad_clip)
        # Sums over all ranks: the mean loss, and how many want to stop (True is 1). So all stop together.
        loss, stop_votes = world.sum(loss.item() / world.size, told_to_stop())
        taken = update(run.optimizers, run.scaler, loss, grad_norm, lr)
        # A skipped step counts like any other, and its batch is not repeated.
        state.skipped = 0 if taken else state.skipped + 1
        check_finite(run, loss, grad_norm, lr)
        state.step += 1     # the log counts the steps done: that of step 0 is its "step 1"
        state.offset += args.global_batch_size
        if state.step in (1, run.total_steps) or state.step % args.log_interval == 0:
            run.log.training(state.step, epoch=state.offset / len(run.batches.sequences), loss=loss, lr=lr,
                             grad_norm=grad_norm, loss_scale=run.scaler.get_scale())
    save(run, "last.pt")    # also after the last evaluation, which may have changed best_val_loss
    return stop_votes > 0


# -------------------------------------------------------------- Muon (nano's; else optional)

class Muon(torch.optim.Optimizer):
    """Like AdamW, keeps a running mean of the gradient, but then treats it as a matrix and makes it equally
    strong in all directions (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Every matrix can be written as U S V^T (the singular value decomposition): rotate by V^T, stretch each
    axis by a number in the diagonal matrix S, rotate by U (rotations may also reflect). A gradient stretches
    a few axes far more than the others, and they would dominate the step. Muon replaces the stretches by 1,
    and steps against U V^T: the weak directions learn as fast as the strong ones."""

    def __init__(self, groups, weight_decay, dtype):
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.9})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            [matrix] = group["params"]
            if matrix not in self.state:
                self.state[matrix]["mean"] = torch.zeros_like(matrix)
            grad, momentum = matrix.grad, group["momentum"]
            mean = self.state[matrix]["mean"].lerp_(grad, 1 - momentum)     # 0.9 mean + 0.1 grad
            direction = grad.lerp(mean, momentum)       # once more, with the new mean (Nesterov)
            parts = direction.view(group["parts"], -1, matrix.shape[1])
            # The entries of U V^T have a root mean square of 1 / sqrt(max(rows, columns)). AdamW's steps
            # have 0.2 to 0.4 (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so these are scaled to 0.2.
            scale = 0.2 * math.sqrt(max(parts.shape[1:]))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.sub_(orthogonalize(parts, self.dtype).view_as(matrix), alpha=group["lr"] * scale)


def orthogonalize(x, dtype):
    """Turns each of N matrices, U S V^T, into roughly U V^T. x and the result are (N, rows, columns).

    Computing U, S and V would be slow. But V^T V and U^T U are the identity matrix, so
    x x^T x = (U S V^T) (V S U^T) (U S V^T) = U S^3 V^T. This cubes each stretch s, and keeps U and V. In the
    same way, a x + b x x^T x + c x x^T x x^T x only turns each s into a s + b s^3 + c s^5. Jordan et al.
    chose a, b and c so that five rounds take any s between 0.01 and 1 to between 0.68 and 1.14: for example,
    0.1 becomes 0.34, 0.99, 0.71, 1.11, 0.71. Now all axes are stretched about equally."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, dtype).mT        # x x^T is smaller when x is transposed
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)       # norm^2 = sum of s^2: now s <= 1
    for _ in range(5):      # baddbmm(x, y, z) is beta x + alpha y z, faster than in three operations
        xxt = x @ x.mT
        y = torch.baddbmm(xxt, xxt, xxt, beta=-4.7750, alpha=2.0315)        # -4.7750 xxt + 2.0315 xxt @ xxt
        x = torch.baddbmm(x, y, x, beta=3.4445)                             # 3.4445 x + y @ x
    return x


# ================================================================================== plumbing
# You can stop here on a first reading: the training above is complete. Below: ranks and signals, safeguards,
# how a run is set up and resumed, its log and curves, its flags.

LARGE = 50_000_000      # with at least this many tokens, the default model on a GPU is gpt2-92m
SKIPS_IN_A_ROW = 20     # after this many skipped steps in a row, a float16 run ends
SAVE_SECONDS = 600      # save last.pt again when it is older than this
PATIENCE = timedelta(minutes=10)        # how long a rank waits for another before it gives up
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "dropout")        # of --model, which flags can override


# ------------------------------------------------------------------------- ranks and signals

class World:
    """The ranks that train together, and all communication between them. This one is number `rank` of `size`
    and computes on `device`. A single process is a world of size 1. Raises UserError if they cannot start."""

    def __init__(self, device):
        numbers = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
        self.rank, self.size = (int(number) if number.isdecimal() else -1 for number in numbers)
        self.device, self.sums = device, weakref.WeakSet()      # sums that gloo still holds: see close
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if not 0 <= self.rank < self.size or (self.size > 1 and not all(map(os.environ.get, names))):
            raise UserError(f"{', '.join(names)} are not as torchrun sets them: use torchrun, or unset them")
        if device.type == "mps" and self.size > 1:
            raise UserError("several processes cannot share an Apple GPU: run without torchrun")
        if device.type == "cuda":
            gpu = int(os.environ["LOCAL_RANK"]) if self.size > 1 else device.index or 0
            n_gpus, n_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            if max(gpu + 1, n_local) > n_gpus:      # the same on all ranks, so that none is left waiting
                raise UserError(f"{n_local} processes need as many GPUs, but there are {n_gpus}: use "
                                f"torchrun --nproc_per_node={n_gpus}, or add --device cpu")
            self.device = torch.device("cuda", gpu)
            torch.cuda.set_device(self.device)
        if self.size > 1:       # gloo sums numbers on CPUs, nccl gradients on GPUs
            try:
                store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(f"the processes cannot meet at MASTER_ADDR and MASTER_PORT ({error}): use "
                                "torchrun, or another port") from error
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":    # survives restarts of ranks
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)       # no old keys
            nccl = device.type == "cuda" and dist.is_nccl_available()      # not on Windows
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=self.rank,
                                    world_size=self.size, timeout=PATIENCE)

    def wrap(self, model, batches, autocast):
        """Returns the model to train: with several ranks, wrapped in DDP, which averages their gradients."""
        if self.size == 1:
            return model
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # After its first backward pass, DDP sums gradients in a different order. A resumed run would switch
        # at a different step and round differently, so every run begins with a throwaway pass.
        with autocast:
            loss = model(*batches(0)[0])
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
            note(text, sys.stdout)

    def close(self):
        if self.size > 1:
            patience = time.monotonic() + 1
            while self.sums and time.monotonic() < patience:
                time.sleep(0.001)       # Python crashes on exit if a gloo thread still holds a sum
            dist.destroy_process_group()


def stop_signals():
    """Returns a list, to which each Ctrl-C, SIGTERM or SIGHUP (the terminal closed) is appended, so that a
    run can stop cleanly. A second Ctrl-C stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        if signal.getsignal(signal.SIGINT) == receive:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):     # not print, which may be what was interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")

    on_ending_signals(receive)
    return received


# -------------------------------------------------------------------------------- safeguards

def check_finite(run, loss, grad_norm, lr):
    """Raises UserError if the last step was skipped; in float16, where a skip lowers the loss scale, only
    after many in a row."""
    if run.state.skipped >= (SKIPS_IN_A_ROW if run.scaler.is_enabled() else 1):
        raise UserError(
            f"step {run.state.step + 1:,} has loss {loss:g} and a gradient of norm {grad_norm:g} at learning "
            f"rate {lr:.3g} (loss scale now {run.scaler.get_scale():g}): use a lower --lr, with --resume to "
            "continue from last.pt, if there is one, or with --init from best.pt")


def check_tokens(ids, vocab_size):
    if ids.max() >= vocab_size:
        raise UserError(f"the data is damaged (it contains token {ids.max()}, but its vocabulary ends at "
                        f"{vocab_size - 1}): run prepare.py again")


def seed_dropout(seed, step, rank):
    """Makes dropout depend only on these three, not on what this process did before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def keep_freed_memory():
    """Makes glibc (Linux) keep freed memory for the next step. By default it returns large blocks to the
    system, which zeroes them before each reuse: up to 40% of a step's time. Changes no result."""
    import ctypes
    with suppress(OSError, AttributeError, TypeError):      # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)      # M_MMAP_MAX: never map single blocks
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: what is freed stays


# ------------------------------------------------------------------------------------- a run

@dataclass
class Run:
    """What set_up prepares for the loop."""
    args: argparse.Namespace            # the flags
    data: dict                          # the data folder's meta.json and vocabulary
    world: World                        # all ranks: this one's number, their count, sums over all
    autocast: object                    # runs matmuls in a faster dtype
    model: GPT                          # the plain model
    optimizers: list
    scaler: torch.amp.GradScaler        # disabled unless float16
    batches: Batches                    # for training
    val_sequences: Sequences
    state: State
    wrapped_model: object = None        # what backward runs: model, or model in DDP, or compiled
    total_steps: int = 0
    log: object = None                  # prints lines, and writes log.jsonl
    saved_at: float = 0.0               # when last.pt was written


def set_up(args, world, dtype, saved):
    """Returns the Run that the flags describe, restored from its checkpoint, (model, meta), if there is one.
    Raises UserError if the flags do not fit the data, the checkpoint or the number of ranks."""
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
    # Some defaults depend on the model and the ranks. From here on args has them, and so do log and last.pt.
    vars(args).update({**asdict(model.config), **sizes})        # sizes last: restore refuses changed ones
    args.stride = args.stride or args.block_size
    args.global_batch_size = args.global_batch_size or args.batch_size * world.size
    if args.global_batch_size % world.size:
        raise UserError(f"--global_batch_size {args.global_batch_size} is not a multiple of {world.size}, "
                        "the number of processes: change one of them")
    sequences = load_sequences(args, "train", args.stride, data["vocab_size"])
    run = Run(
        args=args, data=data, world=world, autocast=mixed_precision(world.device, dtype), model=model,
        optimizers=make_optimizers(args.optimizer, model, args.weight_decay, world.device, dtype),
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        batches=Batches(sequences, args.global_batch_size, args.batch_size, args.seed, world),
        val_sequences=load_sequences(args, "val", args.block_size, data["vocab_size"]), state=State(),
        saved_at=time.monotonic())
    if saved:
        restore(run, saved[1])
    if world.sum(run.state.step) != [run.state.step * world.size]:
        raise UserError("the ranks found different checkpoints: --out must be on a disk shared by all")
    trained = compiled(model, block_by_block=world.size > 1) if args.compile else model
    run.wrapped_model = world.wrap(trained, run.batches, run.autocast)
    if args.minutes and not saved:
        args.max_steps = max(1, round(60 * args.minutes / seconds_per_step(run)))
    # --max_steps, or those done and those left of --epochs, whose steps may have had another size.
    left = math.ceil(((args.epochs or 0) * len(sequences) - run.state.offset) / args.global_batch_size)
    run.total_steps = args.max_steps or run.state.step + max(0, left)
    epochs = run.total_steps * args.global_batch_size / len(sequences)
    args.keep_epochs = args.keep_epochs or max(4, math.ceil(epochs / 20))
    return run


def compiled(model, block_by_block):
    """Returns a compiled copy that shares the model's weights. As a whole, it is fastest. Block by block, DDP
    can send the gradients of a block while those of earlier blocks are computed."""
    from copy import deepcopy
    model = deepcopy(model, {id(weight): weight for weight in model.parameters()})     # copies no weights
    for module in model.h if block_by_block else [model]:
        module.compile()
    if block_by_block:
        model.loss = torch.compile(model.loss)
    return model


def seconds_per_step(run, n_steps=5):
    """Times a few steps at a learning rate of 0, without affecting a new run."""
    scaler, seconds = run.scaler.state_dict(), []
    for _ in range(1 + n_steps):
        started = time.perf_counter()
        loss = backward(run.wrapped_model, run.batches(run.state.offset), run.scaler, run.autocast)
        grad_norm = clip_gradients(run.model, run.optimizers, run.scaler, run.args.grad_clip)
        update(run.optimizers, run.scaler, loss, grad_norm, lr=0.0)
        seconds.append(time.perf_counter() - started)
    for optimizer in run.optimizers:
        optimizer.state.clear()
    run.scaler.load_state_dict(scaler)
    [total] = run.world.sum(sorted(seconds[1:])[n_steps // 2])      # the first one includes set-up
    return total / run.world.size


def load_initial(source, data, sizes):
    """Returns the model that --init starts from, with the dropout and block_size that the flags ask for.
    Raises UserError if it cannot read this data, or the flags ask for other sizes."""
    model, (tokenizer, vocabulary) = load_model(source)
    if (tokenizer, vocabulary) != (data["tokenizer"], data["vocabulary"]):
        raise UserError(f"{source} uses another vocabulary: run prepare.py with --tokenizer "
                        f"{'FOLDER, the data folder it was trained on' if vocabulary else tokenizer}")
    longest = model.config.block_size
    if sizes.keys() - {"dropout", "block_size"} or sizes.get("block_size", 0) > longest:
        raise UserError("--init brings its own sizes: leave out --n_layer, --n_head, --n_embd and a "
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


def evaluate_and_save(run):
    """Logs the validation loss of --eval_sequences sequences, and saves best.pt if it is the lowest so
    far. After the last step, logs the loss of the whole validation set."""
    save(run, "last.pt")    # evaluation is slow and might be interrupted, so save first
    run.model.eval()
    n, options = len(run.val_sequences), (run.args.batch_size, run.autocast, run.world)
    loss, error = evaluate(run.model, run.val_sequences, min(n, run.args.eval_sequences), *options)
    if loss < run.state.best_val_loss:
        run.state.best_val_loss = loss
        save(run, "best.pt")
    if run.state.step == run.total_steps and n > run.args.eval_sequences:
        loss, error = evaluate(run.model, run.val_sequences, n, *options)
    # Bits per byte let models with different tokenizers be compared. One nat is 1 / ln 2 bits.
    bits_per_byte = loss / math.log(2) * run.data["val"]["tokens"] / max(1, run.data["val"]["bytes"])
    plus_minus = "" if math.isnan(error) else "± {val_stderr:.4f} "     # unknown for a single batch
    run.log.write("validation loss {val_loss:.4f} " + plus_minus + "| {bits_per_byte:.3f} bits per byte",
                  run.state.step, val_loss=loss, val_stderr=error, bits_per_byte=bits_per_byte)
    show_sample_and_curves(run)
    run.model.train()
    run.log.last = run.state.step, time.perf_counter()      # so that tokens/s leaves out evaluations


def standard_error(losses, sizes):
    """The standard error of the mean loss, from the losses and sizes of successive batches. For n values, it
    is their standard deviation / sqrt(n). Neighbouring sequences are often about the same thing, so these
    values are the mean losses of long stretches of text, at most 32."""
    n = min(32, len(losses))
    stretches = zip(np.array_split(losses, n), np.array_split(sizes, n), strict=True)
    values = torch.tensor([loss.sum() / size.sum() for loss, size in stretches])
    return values.std().item() / math.sqrt(n) if n > 1 else math.nan


def save(run, name):
    """Writes a checkpoint, on rank 0. last.pt gets everything that a resumed run needs."""
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
    before = max(0, run.state.offset - run.args.global_batch_size) // n_sequences
    now = run.state.offset // n_sequences
    name = f"epoch_{now * run.args.keep_epochs:04}.pt"
    # Whether the last step completed another --keep_epochs epochs. A resumed run may have the file already.
    is_due = now > before and not Path(run.args.out, name).exists()
    if is_due or time.monotonic() > run.saved_at + SAVE_SECONDS:
        save(run, "last.pt")    # first, so that there is one to resume if the machine dies in between
    if is_due:
        save(run, name)


def restore(run, meta):
    """Continues where a checkpoint ends. Raises UserError if that would be a different run: another model,
    other data, or another order of the data."""
    if meta["data"] != run.data:
        raise UserError(f"cannot resume: {run.args.data} is not the data that this run began with: "
                        "prepare the same data again, or choose another --out")
    then, now = meta["args"], vars(run.args)
    for name in (*SIZES, "model", "init", "stride", "seed", "optimizer"):
        if then[name] != now[name]:
            raise UserError(f"cannot resume: {name} was {then[name]} in that run, but is {now[name]} now: "
                            f"leave out --{name}, or choose another --out")
    for optimizer, state in zip(run.optimizers, meta["optimizers"], strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})      # rates come from flags
    if meta["scaler"]:      # of a run in float16; if this one is not, it ignores that
        run.scaler.load_state_dict(meta["scaler"])
    run.state = State(**{name: meta[name] for name in asdict(run.state)})


def describe(run, dtype):
    """Prints what this run will do, and in a dry run, how much time and memory that would take."""
    args, batches, sequences, done = run.args, run.batches, run.batches.sequences, run.state.step
    epochs = (run.state.offset + (run.total_steps - done) * args.global_batch_size) / len(sequences)
    tokens_per_step, size = args.global_batch_size * args.block_size, batches.micro_batch_size
    run.world.print(
        f"training {args.init or args.model} on {run.world.device.type} in {str(dtype)[6:]} ("
        f"{'' if torch.cuda.is_available() else 'no '}CUDA GPU available); "
        f"{'nothing is written' if args.dry_run else f'writing to {args.out}'}\n"
        f"{run.model.num_params():,} parameters; {args.data}: {len(sequences):,} sequences of "
        f"{args.block_size} tokens\n"
        f"{tokens_per_step:,} tokens per step: {run.world.size} (processes) x {batches.share // size} "
        f"(micro-batches) x {size} (sequences) x {args.block_size}\n"
        f"{run.total_steps:,} steps, {epochs:.2f} epochs{f', {done:,} of them done' if args.resume else ''}")
    if done >= run.total_steps:
        run.world.print("all steps are done: raise --max_steps or --epochs to train further")
    threads, load = torch.get_num_threads(), getattr(os, "getloadavg", lambda: [0])()[0]    # not on Windows
    if run.world.device.type == "cpu" and 1 < threads < 2 * load:
        run.world.print("the cores have been busy: if this is slow, put OMP_NUM_THREADS=1 before python")
    if args.dry_run:
        seconds = seconds_per_step(run)
        left = duration(seconds * max(0, run.total_steps - done))
        run.world.print(f"{tokens_per_step / seconds:,.0f} tokens/s; {left} for the steps left, without "
                        f"evaluations; at least {peak_memory(run.world.device) / 1e9:.2f} GB in each process")


def peak_memory(device):
    """Returns the peak memory of this process in bytes: tensors on a GPU, everything on a CPU under Linux;
    elsewhere 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, ValueError):
        words = Path("/proc/self/status").read_text().split()
        return 1024 * int(words[words.index("VmHWM:") + 1])
    return 0


# ---------------------------------------------------------------------------- log and curves

class Log:
    """Prints lines and appends rows (JSON objects) to log.jsonl, on rank 0. The first row of each start
    records how the run was made."""

    def __init__(self, run):
        self.run, self.path, self.failed, self.tracker = run, Path(run.args.out, "log.jsonl"), set(), None
        if run.world.rank == 0 and self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self.path.open("a").write("\n")     # a killed run left half a row
        if run.world.rank == 0 and run.args.wandb:
            with self.optional("wandb", unless=ModuleNotFoundError):
                import wandb
                self.tracker = wandb.init(project="smallgpt", name=self.path.parent.name,
                                          config=vars(run.args), dir=run.args.out)
        self.append(started_at_step=run.state.step, args=vars(run.args), commit=commit(),
                    python=sys.version.split()[0], torch=torch.__version__)
        self.started = time.perf_counter()
        self.last = run.state.step, self.started        # a step, and when it was done

    def training(self, step, **metrics):
        now, (last_step, last) = time.perf_counter(), self.last
        pace = (now - last) / (step - last_step)        # seconds per step, lately
        left = duration(pace * (self.run.total_steps - step))
        tokens = self.run.args.global_batch_size * self.run.args.block_size
        self.write("epoch {epoch:.2f} | loss {loss:.4f} | lr {lr:.2e} | {tokens_per_second:,.0f} tokens/s | "
                   f"{left} left", step, **metrics, tokens_per_second=tokens / pace,
                   seconds=now - self.started)
        self.last = step, now

    def write(self, line, step, **metrics):
        self.run.world.print(f"step {step:,}/{self.run.total_steps:,} | {line.format(**metrics)}")
        row = self.append(step=step, **metrics)
        if self.tracker:
            with self.optional("wandb"):
                self.tracker.log(row, step=step)

    def append(self, **row):
        """Appends a row and returns it. JSON has no infinity or NaN: they become null."""
        row = {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in row.items()}
        if self.run.world.rank == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    @contextmanager
    def optional(self, name, unless=()):
        """For extras that training does not need: the first failure is reported, and training continues."""
        try:
            yield
        except unless:
            raise
        except Exception as error:
            if name not in self.failed:
                self.run.world.print(f"warning: skipping {name} ({type(error).__name__}: {error})")
            self.failed.add(name)


def commit():
    """Returns the commit of this folder, with "-dirty" if it was changed since, or None outside git."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode(errors="replace").strip()


def show_sample_and_curves(run):
    if run.world.rank == 0:
        with run.log.optional("sample"):
            tokenizer = get_tokenizer(run.data["tokenizer"], run.data["vocabulary"])
            text = "".join(complete(run.model, tokenizer, "", 150, temperature=0.8, top_k=50)).strip()
            run.world.print("sample:\n    " + (text or "(blank)").replace("\n", "\n    "))
        with run.log.optional("curves"):
            draw_curves(run.args.out)


def draw_curves(out):
    """Draws the losses and learning rates of a run into curves.png. Needs the package matplotlib."""
    from matplotlib.figure import Figure
    rows = {}       # a resumed run may repeat a step: its last row counts
    for line in Path(out, "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):     # a killed run leaves half a line
            row = json.loads(line)
            rows["val_loss" in row, row["step"]] = row

    def curve(name):
        steps = sorted((row["step"], row[name]) for row in rows.values() if name in row)
        return np.array(steps, dtype=float).reshape(-1, 2).T        # null becomes NaN

    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    losses.plot(*curve("loss"), color="0.6")
    losses.errorbar(*curve("val_loss"), curve("val_stderr")[1], color="tab:blue", marker="o", capsize=3)
    rates.plot(*curve("lr"), color="0.6")
    rates.set_xlabel("step")
    for axes, title in ((losses, "loss in nats per token"), (rates, "learning rate")):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    for name, label, color in (("loss", "training", "0.4"), ("val_loss", "validation", "tab:blue")):
        losses.annotate(label, curve(name)[:, 0], (8, 4), textcoords="offset points", color=color)
    figure.savefig(Path(out, "curves.png"), dpi=120)


# ------------------------------------------------------------------------------------- flags

# Recipes override the defaults that --help shows: for --model nano, for --init, and for all other models.
RECIPES = {
    "nano": {"max_steps": 1600, "global_batch_size": 32, "optimizer": "muon", "lr": 7e-3, "warmup": 0.03,
             "schedule": "trapezoid", "weight_decay": 0.1, "eval_interval": 400, "eval_sequences": 512,
             "log_interval": 50},
    "fine-tuning": {"epochs": 3.0, "lr": 5e-5}, "other models": {"epochs": 20.0},
}


def make_parser():
    recipes = "; ".join(f"{model}: " + ", ".join(f"{flag} {value}" for flag, value in recipe.items())
                        for model, recipe in RECIPES.items())
    parser = Parser(description="Train a model on a data folder.", epilog=f"Defaults by recipe: {recipes}.")
    fraction = checked(float, lambda x: 0 <= x < 1, "a number, at least 0 and below 1")
    add = parser.add_argument
    add("--data", default="data/python", help="folder that prepare.py wrote")
    add("--out", help="folder to write (default: out/ and the name of the data folder)")
    add("--resume", action="store_true", help="continue from last.pt in --out, if there is one")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", choices=MODELS, help="(default: nano, or gpt2-92m with a CUDA GPU and at "
                       "least 50 million tokens)")
    start.add_argument("--init", metavar="MODEL", help="start from the weights of a checkpoint, a folder in "
                       "Hugging Face's format, or a model on their Hub, such as gpt2")
    add("--n_layer", type=positive_int, help="number of blocks (default: the model's)")
    add("--n_head", type=positive_int, help="attention heads per block (default: the model's)")
    add("--n_embd", type=positive_int, help="width, C (default: the model's)")
    add("--block_size", type=positive_int, help="tokens per sequence (default: the model's)")
    add("--dropout", type=fraction, help="fraction of activations zeroed in training (default: the model's)")
    add("--stride", type=positive_int, help="tokens between the starts of sequences (default: block_size)")
    add("--batch_size", type=positive_int, default=16, help="maximum sequences per process and micro-batch")
    add("--global_batch_size", type=positive_int, help="sequences per step (default: batch_size x processes; "
        "for nano, 32)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_float, help="passes over the data (default: see below)")
    length.add_argument("--max_steps", type=positive_int, help="steps to take")
    length.add_argument("--minutes", type=positive_float, help="plan a new run's steps for this many minutes")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon learns more per step, but costs more time when batches are small")
    add("--lr", type=positive_float, default=6e-4, help="peak learning rate")
    add("--min_lr", type=at_least_0, default=0.0, help="learning rate at the end of the schedule")
    add("--warmup", type=fraction, default=0.1, help="fraction of all steps in which the learning rate rises")
    add("--schedule", choices=("linear", "cosine", "trapezoid"), default="linear", help="how it then falls")
    add("--weight_decay", type=at_least_0, default=1e-4, help="weight decay of matrices")
    add("--grad_clip", type=positive_float, default=1.0, help="the gradient's norm is clipped to this")
    add("--eval_interval", type=positive_int, default=2000, help="steps between evaluations")
    add("--eval_sequences", type=positive_int, default=2048,
        help="maximum validation sequences per evaluation; the final evaluation uses all")
    add("--log_interval", type=positive_int, default=10, help="steps between log lines")
    add("--keep_epochs", type=positive_int, metavar="N",
        help="keep a checkpoint every N epochs (default: 4; of over 80 epochs planned at first, a 20th)")
    add("--dtype", choices=DTYPES, help="of matmuls (default: the fastest; on mps, float32)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, otherwise cpu)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="train with torch.compile")
    add("--dry_run", action="store_true", help="estimate time and memory; write nothing")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--seed", type=seed_int, default=1337, help="for initial weights, data order and dropout")
    add("--max_minutes", type=positive_float, help="stop cleanly after this many minutes, as with Ctrl-C")
    return parser


def parse_args(argv):
    """Returns the flags, and the checkpoint to continue from, (model, meta), or None. A flag that is not
    given comes from the run to continue (except those for one start only), else from the recipe, else
    from the parser. Raises UserError if a new run would overwrite an earlier one."""
    parser = make_parser()
    given = parser.parse_args(argv)     # for now, only to find out which defaults apply
    out = given.out or str(Path("out", os.path.basename(os.path.abspath(given.data))))
    last, saved = Path(out, "last.pt"), None
    if last.exists() and given.resume:
        written = modified(last)        # asked before reading it, which may take a while
        saved = load_checkpoint(last)
        saved[1]["written"] = written
        if any(name not in saved[1] for name in ("args", "data", "optimizers", "scaler", *asdict(State()))):
            raise UserError(f"{last} cannot be resumed: it has weights, but no state of a run. Start from it "
                            "with --init")
        defaults = {**saved[1]["args"], "device": None, "dry_run": False, "max_minutes": None}
    elif (checkpoints := sorted(Path(out).glob("*.pt"))) and not given.dry_run:
        load_meta(given.data)       # a mistake in --data is reported first
        if last in checkpoints:
            problem = "a broken link: repair it" if given.resume else "from an earlier run: add --resume"
            raise UserError(f"{last} is {problem}, or choose another --out")
        raise UserError(f"{checkpoints[0]} is from an earlier run: there is no last.pt to resume, so choose "
                        "another --out")
    elif given.init:
        defaults = RECIPES["fine-tuning"]
    else:
        large = (not given.model and choose_device(given.device).type == "cuda"
                 and load_meta(given.data)["train"]["tokens"] >= LARGE)
        model = given.model or ("gpt2-92m" if large else "nano")
        defaults = {"model": model, **RECIPES.get(model, RECIPES["other models"])}
    if given.epochs or (given.minutes and not saved):
        defaults = {**defaults, "max_steps": None}      # otherwise the recipe's max_steps would win
    parser.set_defaults(**{**defaults, "out": out})     # flags that are given override these again
    return parser.parse_args(argv), saved


def modified(path):
    """When a file was last written, or None."""
    return path.stat().st_mtime_ns if path.exists() else None


@one_line_errors(ModelError, out_of_memory="lower --batch_size, or choose a smaller --model or --block_size")
@record     # makes torchrun's report say which rank failed, and why
def main(argv=None):
    args, saved = parse_args(argv)
    written = saved and saved[1]["written"]
    world = World(choose_device(args.device))
    try:
        keep_freed_memory()
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")      # tensor cores for float32
        dtype = choose_dtype(args.dtype, world.device)
        run = set_up(args, world, dtype, saved)
        del saved       # its memory is no longer needed
        describe(run, dtype)
        if args.dry_run or run.state.step > run.total_steps:
            return
        with held(args.out) if world.rank == 0 else nullcontext():
            if world.rank == 0 and written != modified(Path(args.out, "last.pt")):
                raise UserError(f"another process has just written to {args.out}: start again")
            run.log = Log(run)
            deadline = time.monotonic() + 60 * (args.max_minutes or math.inf)
            received = stop_signals()
            stopped = train(run, lambda: len(received) > 0 or time.monotonic() > deadline)
        if stopped:
            world.print(f"stopped after step {run.state.step:,} of {run.total_steps:,} and saved: the same "
                        "command with --resume continues")
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename or args.out} ({error.strerror}): fix that, or "
                        "choose another folder; earlier checkpoints can still be resumed") from error
    finally:
        world.close()


if __name__ == "__main__":
    main()
