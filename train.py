"""Tokens to weights: trains a model on a data folder that prepare.py made, and writes out/NAME.

    python train.py                                         one process
    torchrun --standalone --nproc_per_node=2 train.py       two: one a GPU, or both on the CPU
    python train.py --resume                                goes on from out/NAME/last.pt

out/NAME gets last.pt (weights, and what --resume needs), best.pt (the weights of the lowest validation loss),
epoch_0004.pt and so on (the weights every --keep_epochs epochs), log.jsonl (a JSON object a line) and, where
matplotlib is installed, curves.png.

Run.train, near the end, is the whole story; what it names stands above it. Left out: models that do not fit
on one GPU.
"""

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt import GPT, MODELS, ModelError, load_checkpoint, save_checkpoint
from prepare import Parser, UserError, count, duration, number, one_line_errors, positive, seed
from prepare import get_tokenizer, load_meta, load_tokens
from sample import choose_device, complete

# Flags that change a model of MODELS.
SIZES = {"n_layer": "blocks", "n_head": "attention heads in each", "n_embd": "the width, C",
         "block_size": "ids in a sequence", "dropout": "share of activations zeroed in training"}

# What stands in for flags that are not given, where a model has a recipe of its own.
DEFAULT_RECIPE = {"epochs": 20}
RECIPES = {
    "nano": {"max_steps": 1000, "global_batch_size": 32, "lr": 2e-3, "schedule": "cosine",
             "eval_interval": 250, "eval_windows": 256},
}


# ------------------------------------------------------------------------------------------------ world

class World:
    """The processes that train together: `size` of them, of which this is number `rank`, on its `device`.

    torch.distributed is touched here and nowhere else. A process by itself is a world of size 1, which takes
    the same path and has nobody to talk to. Raises UserError where there are fewer GPUs than processes.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device
        if self.size == 1:
            return
        if device.type == "cuda":
            gpu = int(os.environ["LOCAL_RANK"])
            if gpu >= torch.cuda.device_count():
                raise UserError(f"there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            self.device = torch.device("cuda", gpu)
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def wrap(self, model):
        """A module like model, whose backward pass leaves each rank the mean of all ranks' gradients."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.size > 1 else model

    def sum(self, *numbers):
        """Each number summed over all ranks, as a list."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def print(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------- data

class Windows:
    """Token ids as windows of block_size + 1, one every `stride` ids: the inputs and, one further on, the
    targets. Raises UserError where there is not one."""

    def __init__(self, tokens, block_size, stride, vocab_size):
        self.tokens, self.vocab_size = tokens, vocab_size
        self.block_size, self.stride = block_size, stride
        if len(tokens) < block_size + 1:
            raise UserError(f"{len(tokens):,} ids are too few for a window of {block_size + 1:,}: prepare "
                            "more text, or lower --block_size")

    def __len__(self):
        return (len(self.tokens) - 1 - self.block_size) // self.stride + 1

    def read(self, indices, device):
        """The windows of these indices: inputs and targets, each (len(indices), block_size), int64. Raises
        UserError where an id is outside the vocabulary."""
        starts = np.asarray(indices, dtype=np.int64) * self.stride
        ids = self.tokens[starts[:, None] + np.arange(self.block_size + 1)]
        if ids.max() >= self.vocab_size:
            raise UserError(f"the data is damaged: it has id {ids.max()}, and its vocabulary ends at "
                            f"{self.vocab_size - 1}: run prepare.py again")
        ids = torch.from_numpy(ids.astype(np.int64))
        if device.type == "cuda":
            ids = ids.pin_memory()      # lets the copy run beside the GPU's work
        ids = ids.to(device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:]


def shuffled(places, n, seed):
    """The windows at these places of an endless sequence, in which the first n places have each of n windows
    once, in an order of their own, the next n again each once, in another order, and so on.

    Nothing is stored, and any place can be asked for first: a Feistel network (Luby and Rackoff 1988)
    permutes all numbers of an even number of bits, and one that is sent to n or above goes through it again
    until it is below (cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))       # a number is two halves of so many bits
    mask = (np.uint64(1) << half) - np.uint64(1)
    epoch, window = np.divmod(np.asarray(places, dtype=np.uint64), np.uint64(n))
    key = mix(epoch + mix(np.full_like(epoch, seed)))
    outside = np.full(window.shape, True)
    while outside.any():
        for round in range(6):
            left, right = window >> half, window & mask
            left ^= mix(right + key + np.uint64(round << 40)) & mask
            window = np.where(outside, right << half | left, window)
        outside = window >= n
    return window.astype(np.int64)


def mix(x):
    """Hashes uint64s: any bit of x changes each bit of the result as if by chance (end of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches:
    """batches(step) gives what this rank reads at that step, a list of micro-batches.

    The global batch of a step depends on the seed and the step alone. Ranks and micro-batches are slices of
    it: four processes with one micro-batch each and one process with four see the same ids.
    """

    def __init__(self, windows, global_batch_size, batch_size, seed, world):
        self.windows, self.global_batch_size, self.batch_size = windows, global_batch_size, batch_size
        self.seed, self.world = seed, world

    def __call__(self, step):
        """[(inputs, targets), ...], each (batch_size, block_size)."""
        share = self.global_batch_size // self.world.size
        first = step * self.global_batch_size + self.world.rank * share
        indices = shuffled(range(first, first + share), len(self.windows), self.seed)
        return [self.windows.read(indices[start:start + self.batch_size], self.world.device)
                for start in range(0, share, self.batch_size)]

    def epochs(self, step):
        """How often the data has been seen when so many steps have been taken."""
        return step * self.global_batch_size / len(self.windows)


# ----------------------------------------------------------------------------------------- optimization

def learning_rate(step, total_steps, warmup_steps, peak, low, schedule):
    """Rises along a line to its peak at step warmup_steps, then falls, along a line or half a cosine wave
    (Loshchilov and Hutter 2016), and would reach `low` at total_steps, one after the last."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * left


def make_optimizer(model, weight_decay, device):
    """AdamW (Loshchilov and Hutter 2017). Matrices decay; biases and LayerNorms, the vectors, do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


def update(net, optimizer, scaler, autocast, micro_batches, lr, grad_clip):
    """One step of the optimizer along the mean gradient of all micro-batches and ranks. Gives this rank's
    mean loss and the gradient's norm before clipping, as tensors: to read them is to wait for the GPU."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    mean_loss = 0
    for i, (inputs, targets) in enumerate(micro_batches, start=1):
        # Ranks exchange gradients in the last backward pass only. DDP reads this in the forward pass, too.
        net.require_backward_grad_sync = i == len(micro_batches)
        with autocast:
            loss = net(inputs, targets) / len(micro_batches)    # gradients add up, and are to be a mean
        scaler.scale(loss).backward()       # scaled up, small gradients do not become 0 in float16
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)              # clipping is about the true gradients
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
    scaler.step(optimizer)                  # not taken where a gradient is not finite
    scaler.update()                         # in that case to a smaller scale, from time to time to a larger
    optimizer.zero_grad()
    return mean_loss, grad_norm


def seed_dropout(seed, step, rank):
    """Makes what dropout drops depend on these three alone, not on what this process computed before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def choose_dtype(name, device):
    """The dtype of matrix products: the one of that name or, without one, the fastest that this device has
    units for. Raises UserError where it does not run."""
    if name is None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name is None:
        abilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32
    dtype = getattr(torch, name)
    try:
        x = torch.ones(8, 8, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = x @ x
        y.sum().backward()
        runs = y.dtype == dtype
    except RuntimeError:
        runs = False
    if not runs:
        raise UserError(f"{name} does not run on this {device.type}: use --dtype float32")
    return dtype


@torch.no_grad()
def evaluate(model, windows, n_windows, batch_size, autocast, world):
    """The mean loss, nats per id, over n_windows windows spread evenly over all, and its standard error
    (None for a single batch). Each rank computes a share."""
    chosen = np.arange(n_windows) * len(windows) // n_windows
    mine = chosen[world.rank::world.size]
    seen = total = squares = batches = 0
    for start in range(0, len(mine), batch_size):
        indices = mine[start:start + batch_size]
        with autocast:
            loss = model(*windows.read(indices, world.device)).item()
        seen, batches = seen + len(indices), batches + 1
        total, squares = total + len(indices) * loss, squares + len(indices) * loss ** 2
    seen, total, squares, batches = world.sum(seen, total, squares, batches)
    mean = total / seen
    if batches == 1:
        return mean, None
    variance = max(0.0, squares - seen * mean ** 2) / (batches - 1)     # of a window, from the batch means
    return mean, math.sqrt(variance / seen)


# -------------------------------------------------------------------------------------------------- log

class Log:
    """Reports on a run: lines on the terminal, objects in log.jsonl, after an evaluation curves.png. Only
    rank 0 does; for the others log.jsonl is the null device."""

    def __init__(self, folder, world, first_step, total_steps, ids_per_step):
        self.folder, self.world = folder, world
        self.first_step, self.total_steps, self.ids_per_step = first_step, total_steps, ids_per_step
        self.file = open(folder / "log.jsonl" if world.rank == 0 else os.devnull, "a", encoding="utf-8")
        self.started = time.monotonic()
        self.training_from(first_step)

    def training_from(self, step):
        """The clock behind tokens per second starts here: evaluations do not count."""
        self.clock_step, self.clock = step, time.monotonic()

    def training(self, step, *, epoch, loss, lr, grad_norm, loss_scale):
        now = time.monotonic()
        rate = (step - self.clock_step) * self.ids_per_step / (now - self.clock)
        left = (now - self.started) / (step - self.first_step) * (self.total_steps - step)
        self.write(step=step, epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm, loss_scale=loss_scale,
                   tokens_per_second=rate, seconds=now - self.started)
        scale = f" | loss scale {loss_scale:g}" if loss_scale != 1 else ""
        self.world.print(f"step {step:,}/{self.total_steps:,} | epoch {epoch:.2f} | loss {loss:.4f} | "
                         f"lr {lr:.2e}{scale} | {rate:,.0f} tokens/s | {duration(left)} left")
        self.training_from(step)

    def validation(self, step, *, val_loss, val_stderr, bits_per_byte):
        self.write(step=step, val_loss=val_loss, val_stderr=val_stderr, bits_per_byte=bits_per_byte)
        error = "" if val_stderr is None else f" ± {val_stderr:.4f}"
        self.world.print(f"step {step:,}/{self.total_steps:,} | validation loss {val_loss:.4f}{error} | "
                         f"{bits_per_byte:.3f} bits per byte")
        if self.world.rank == 0:
            draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")

    def write(self, **values):
        """Appends a line. JSON knows no infinity, so what is not finite becomes null."""
        finite = {name: x if x is None or math.isfinite(x) else None for name, x in values.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()


def draw_curves(log_path, picture_path):
    """Draws a log.jsonl: losses and learning rate over the steps. Does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(log_path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def column(name, kind):     # where a resumed run took a step again, its later row counts
        return [row[name] for _, row in sorted({row["step"]: row for row in rows if kind in row}.items())]

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses.plot(column("step", "loss"), column("loss", "loss"), label="training", linewidth=1)
    losses.errorbar(column("step", "val_loss"), column("val_loss", "val_loss"),
                    [error or 0 for error in column("val_stderr", "val_loss")],
                    label="validation", marker="o", capsize=3)
    losses.set(title=log_path.parent, ylabel="loss (nats per id)")
    losses.legend()
    rates.plot(column("step", "loss"), column("lr", "loss"), color="gray")
    rates.set(xlabel="step", ylabel="learning rate")
    figure.savefig(picture_path, dpi=120)


# ------------------------------------------------------------------------------------------------ a run

class Run:
    """One run, set up from its flags, args; `saved` is None or the checkpoint, (model, meta), to resume."""

    def __init__(self, args, world, saved):
        self.args, self.world = args, world
        self.data = load_meta(args.data)
        self.tokenizer = get_tokenizer(self.data["tokenizer"])
        sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
        config = replace(MODELS[args.model], vocab_size=self.data["vocab_size"], **sizes)
        windows, self.val_windows = (
            Windows(load_tokens(args.data, split), config.block_size, args.stride or config.block_size,
                    config.vocab_size) for split in ("train", "val"))
        dtype = choose_dtype(args.dtype, world.device)
        self.autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)

        at_once = args.batch_size * world.size
        global_batch_size = args.global_batch_size or at_once
        if global_batch_size % at_once:
            raise UserError(f"--global_batch_size {global_batch_size} is no multiple of {args.batch_size} "
                            f"sequences (--batch_size) x {world.size} processes: change one of them")
        self.batches = Batches(windows, global_batch_size, args.batch_size, args.seed, world)
        self.total_steps = args.max_steps or math.ceil(args.epochs * len(windows) / global_batch_size)
        self.warmup_steps = round(args.warmup * self.total_steps)

        torch.manual_seed(args.seed)
        self.model = GPT(config).to(world.device)
        self.optimizer = make_optimizer(self.model, args.weight_decay, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.step, self.best_val_loss = 0, math.inf
        if saved:
            self.restore(*saved)
        self.net = world.wrap(torch.compile(self.model) if args.compile else self.model)
        ids_per_step = global_batch_size * config.block_size
        self.log = Log(Path(args.out), world, self.step, self.total_steps, ids_per_step)
        world.print(
            f"{self.model.num_params():,} parameters, {str(dtype).removeprefix('torch.')}; {args.data} has "
            f"{len(windows):,} windows of {config.block_size} ids\n"
            f"a step: {args.batch_size} sequences x {world.size} processes x {global_batch_size // at_once} "
            f"micro-batches = {ids_per_step:,} ids\n"
            f"{self.total_steps:,} steps = {self.batches.epochs(self.total_steps):.2f} epochs")

    def train(self):
        args = self.args
        while self.step < self.total_steps:
            lr = learning_rate(
                self.step, self.total_steps, self.warmup_steps, args.lr, args.min_lr, args.schedule)
            seed_dropout(args.seed, self.step, self.world.rank)
            loss, grad_norm = update(self.net, self.optimizer, self.scaler, self.autocast,
                                     self.batches(self.step), lr, args.grad_clip)
            self.step += 1
            if self.step == 1 or self.step % args.log_interval == 0:
                loss = self.world.sum(loss.item())[0] / self.world.size
                self.log.training(self.step, epoch=self.batches.epochs(self.step), loss=loss, lr=lr,
                                  grad_norm=grad_norm.item(), loss_scale=self.scaler.get_scale())
            if self.step % args.eval_interval == 0 or self.step == self.total_steps:
                self.evaluate()
            if epoch := self.epoch_to_keep():
                self.save(f"epoch_{epoch:04}.pt")

    def evaluate(self):
        """Validation loss, checkpoints, and a sample of how the model begins a document."""
        self.model.eval()
        n_windows = min(self.args.eval_windows or math.inf, len(self.val_windows))
        val_loss, val_stderr = evaluate(self.model, self.val_windows, n_windows, self.args.eval_batch_size,
                                        self.autocast, self.world)
        bits_per_byte = val_loss / math.log(2) * self.data["val"]["tokens"] / self.data["val"]["bytes"]
        self.log.validation(self.step, val_loss=val_loss, val_stderr=val_stderr, bits_per_byte=bits_per_byte)
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.save("best.pt")
        self.save("last.pt", optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        if self.world.rank == 0:
            text = "".join(grown[0] for grown in complete(self.model, self.tokenizer, "", max_new_tokens=150))
            self.world.print("    " + text.strip().replace("\n", "\n    "))
        self.model.train()
        self.log.training_from(self.step)

    def epoch_to_keep(self):
        """The epoch that the last step completed, if its weights are to be kept, else 0."""
        every = self.args.keep_epochs
        before, now = (int(self.batches.epochs(step)) // every * every for step in (self.step - 1, self.step))
        return now if now > before else 0

    def save(self, name, **more):
        if self.world.rank == 0:
            save_checkpoint(Path(self.args.out, name), self.model, {
                "step": self.step, "best_val_loss": self.best_val_loss, "data": self.data,
                "args": vars(self.args), **more})

    def restore(self, saved_model, meta):
        """Goes on where a checkpoint ends. Raises UserError where it is of another model or other data."""
        before = {**asdict(saved_model.config), **meta["data"]}
        for name, now in {**asdict(self.model.config), **self.data}.items():
            if now != before[name]:
                raise UserError(f"cannot resume: {name} was {before[name]} in that run, and is {now} now")
        self.model.load_state_dict(saved_model.state_dict())
        self.optimizer.load_state_dict(meta["optimizer"])
        if self.scaler.is_enabled() and meta["scaler"]:
            self.scaler.load_state_dict(meta["scaler"])
        self.step, self.best_val_loss = meta["step"], meta["best_val_loss"]


# ------------------------------------------------------------------------------------------------- main

def make_parser():
    parser = Parser(description="Train a model on a folder of tokens.")
    at_least_0 = number(float, lambda x: 0 <= x < math.inf, "a number, at least 0")
    share = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    add = parser.add_argument
    add("--data", default="data/python", help="the folder that prepare.py wrote")
    add("--out", help="the folder to write (default: out/ and the name of the data folder)")
    add("--resume", action="store_true", help="go on from last.pt in the out folder, with its flags")
    add("--model", choices=MODELS, help="(default: gpt2-92m where there is a CUDA GPU, else nano)")
    for name, meaning in SIZES.items():
        add(f"--{name}", type=share if name == "dropout" else count, help=f"{meaning} (default: the model's)")
    add("--stride", type=count, help="ids from one window to the next (default: block_size)")
    add("--batch_size", type=count, default=16, help="sequences per process and micro-batch")
    add("--global_batch_size", type=count, help="sequences per step (default: batch_size x processes)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="how often to see the data (default: 20)")
    length.add_argument("--max_steps", type=count, help="how many steps to take, in place of --epochs")
    add("--lr", type=positive, default=6e-4, help="the highest learning rate")
    add("--min_lr", type=at_least_0, default=0.0, help="the learning rate at the end")
    add("--warmup", type=share, default=0.1, help="share of all steps in which it rises")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="how it falls after that")
    add("--weight_decay", type=at_least_0, default=1e-4, help="of matrices")
    add("--grad_clip", type=positive, default=1.0, help="the largest norm a gradient may have")
    add("--eval_interval", type=count, default=2000, help="steps from one evaluation to the next")
    add("--eval_windows", type=count, help="how many validation windows to evaluate (default: all)")
    add("--eval_batch_size", type=count, default=16, help="sequences per process in an evaluation")
    add("--log_interval", type=count, default=10, help="steps from one line to the next")
    add("--keep_epochs", type=count, default=4, help="epochs from one kept checkpoint to the next")
    add("--dtype", choices=("float32", "float16", "bfloat16"),
        help="of matrix products (default: the fastest that the device has units for)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--seed", type=seed, default=1337, help="same seed, same run")
    return parser


def main(argv=None):
    parser = make_parser()
    given = parser.parse_args(argv)
    with one_line_errors(UserError, ModelError, OSError):
        device = choose_device(given.device)
        out = given.out or os.path.join("out", Path(given.data).resolve().name)
        last = Path(out, "last.pt")
        if last.exists() and not given.resume:
            raise UserError(f"{last} is of an earlier run: go on with it by --resume, or name another --out")
        saved = load_checkpoint(last) if given.resume else None

        # What the command line leaves open the run to resume decides, or else the model's recipe.
        model = given.model or ("gpt2-92m" if device.type == "cuda" else "nano")
        defaults = saved[1]["args"] if saved else {"model": model, **RECIPES.get(model, DEFAULT_RECIPE)}
        if given.epochs or given.max_steps:
            defaults = {**defaults, "epochs": None, "max_steps": None}
        parser.set_defaults(**{**defaults, "out": out})
        args = parser.parse_args(argv)

        world = World(device)
        why = "" if given.model or saved else f" ({'a' if device.type == 'cuda' else 'no'} CUDA GPU is here)"
        world.print(f"training {args.model} on {device}{why}, to {out}")
        if world.rank == 0:
            os.makedirs(out, exist_ok=True)
        Run(args, world, saved).train()
        world.close()


if __name__ == "__main__":
    main()
