"""The model: GPT-2, written out. Token ids go in; logits, a loss, or one next id after another come out.

    ids (B, T) --wte + wpe--> (B, T, C) --n_layer blocks--> (B, T, C) --ln_f, head--> logits (B, T, V)
                                                                                          |
                    training: the logits at t against the id at t + 1 --> loss  <---------+
                    sampling: the last logits --softmax--> one more id  <-----------------+

    B  batch: sequences side by side
    T  time: positions in a sequence
    C  channels: the width of the vector that stands for one position
    H  heads of attention
    D  head size: H * D = C
    S  positions that a query can look at: T, or more when a cache holds earlier ones
    V  vocabulary: how many different ids there are

Modules and weights have the names of OpenAI's release (wte: token embedding, wpe: position embedding,
h: blocks; c_attn, c_fc, c_proj: linear layers), so its weights need no renaming here.

Left out: training (train.py), text (prepare.py, sample.py), and all that came after GPT-2.
"""

import json
import math
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class ModelError(ValueError):
    """A model cannot be made: its sizes do not fit together, or its file cannot be read."""


# ------------------------------------------------------------------------------------------------ sizes

@dataclass(frozen=True)
class GPTConfig:
    """The sizes of one model. Raises ModelError if they do not fit together."""
    block_size: int = 1024      # the longest sequence it can read
    vocab_size: int = 50257     # ids it knows
    n_layer: int = 12           # blocks, one after the other
    n_head: int = 12            # attention heads in each block
    n_embd: int = 768           # C, the width
    mlp_ratio: int = 4          # the MLP inside a block is this many times wider than C
    dropout: float = 0.0        # share of activations zeroed in training
    bias: bool = True           # whether linear layers and LayerNorms add a bias
    tied: bool = True           # whether the head is the token embedding, transposed

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_ratio"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ModelError(f"{name} must be a whole number above 0, not {value!r}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd must be divisible by n_head, but {self.n_embd} is not by {self.n_head}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        for name in ("bias", "tied"):
            if type(getattr(self, name)) is not bool:
                raise ModelError(f"{name} must be true or false, not {getattr(self, name)!r}")


MODELS = {
    "nano": GPTConfig(block_size=128, vocab_size=257, n_layer=4, n_head=4, n_embd=128),
    # Made for two 16 GB GPUs: shallower and narrower than GPT-2, its MLP half as wide, its head untied.
    "gpt2-92m": GPTConfig(block_size=512, n_layer=6, n_head=12, n_embd=684, mlp_ratio=2, tied=False),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


# ----------------------------------------------------------------------------------------------- layers
# LayerNorm, attention and GELU each stand here twice: as the formula, to be read, and as PyTorch's fused
# kernel, which computes the same in fewer passes over memory and runs where it is faster, unless
# GPT(config, fused=False).

class LayerNorm(nn.Module):
    """Shifts and scales the C channels of each position to mean 0 and variance 1, then each channel by a
    learned weight and bias (Ba et al. 2016)."""
    EPSILON = 1e-5

    def __init__(self, config, fused):
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        if self.fused:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.EPSILON)
        mean = x.mean(-1, keepdim=True)                                     # (B, T, C) -> (B, T, 1)
        variance = x.var(-1, unbiased=False, keepdim=True)                  # (B, T, C) -> (B, T, 1)
        x = (x - mean) / torch.sqrt(variance + self.EPSILON) * self.weight
        return x if self.bias is None else x + self.bias


class Linear(nn.Linear):
    """x @ weight.T + bias at each position."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """x (..., in), weight (out, in), bias (out,) -> x @ weight.T + bias, (..., out)."""
    n_rows = x.shape[:-1].numel()
    if n_rows > 64 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    # To generate, a few rows meet all the weights. A CPU reads them faster in the order weight @ x.T.
    if n_rows == 1:
        y = weight @ x.flatten()
    else:
        y = (weight @ x.flatten(0, -2).T).T.contiguous()
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class KVCache:
    """The keys and values of one attention layer for the positions read so far, in memory allocated once."""

    def __init__(self, config, batch_size, dtype, device):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k, v):
        """Adds k and v of T new positions, (B, H, T, D); returns those of all S so far, (B, H, S, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and at those before it, and takes a weighted mean of what they offer:
    softmax(q k^T / sqrt(D)) v, in each of H heads (Vaswani et al. 2017)."""

    def __init__(self, config, fused):
        super().__init__()
        self.fused = fused
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)   # (B, T, C) -> (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # -> three of (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                                       # (B, H, T, D) -> (B, H, S, D)
        y = self.attend(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)                              # (B, H, T, D) -> (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        T, S, D = q.shape[2], k.shape[2], q.shape[3]
        dropout = self.dropout if self.training else 0.0
        # On a CPU the kernel's backward pass is slow in bfloat16: for short sequences the formula is faster.
        kernel_is_slow = self.training and T <= 256 and q.device.type == "cpu" and q.dtype == torch.bfloat16
        if self.fused and not kernel_is_slow:
            assert T == S or T == 1     # the cache was empty, or gets one position, which may look at all
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        scores = q / math.sqrt(D) @ k.transpose(2, 3)                       # (B, H, T, D) -> (B, H, T, S)
        mask = torch.full((T, S), -math.inf, dtype=scores.dtype, device=q.device).triu(S - T + 1)
        weights = (scores + mask).softmax(-1)                               # none for later positions
        return F.dropout(weights, dropout) @ v                              # (B, H, T, S) -> (B, H, T, D)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on each position by itself."""

    def __init__(self, config, fused):
        super().__init__()
        self.fused = fused
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                         # (B, T, C) -> (B, T, ratio * C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)       # -> (B, T, C)

    def gelu(self, x):
        """x * P(N < x) for a standard normal N, in its tanh approximation (Hendrycks and Gimpel 2016)."""
        if self.fused:
            return F.gelu(x, approximate="tanh")
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on it. Both add to the residual stream x
    and read it through a LayerNorm of their own (pre-norm, Radford et al. 2019)."""

    def __init__(self, config, fused):
        super().__init__()
        self.ln_1 = LayerNorm(config, fused)
        self.attn = CausalSelfAttention(config, fused)
        self.ln_2 = LayerNorm(config, fused)
        self.mlp = MLP(config, fused)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# ------------------------------------------------------------------------------------------------- loss

class LinearCrossEntropy(torch.autograd.Function):
    """The sum over N rows of -log softmax(x @ weight.T)[target], without ever holding all N * V logits: they
    are computed, turned into their own gradients, used and dropped, a few rows at a time.

    The gradient with respect to a row's logits is softmax(logits) - onehot(target), which is known as soon as
    the logits are. So forward computes the gradients of x and weight as well, and backward only multiplies
    them by the incoming gradient.
    """
    LOGITS_AT_ONCE = 2 ** 26    # 128 MiB in bfloat16
    SOFTMAX_AT_ONCE = 2 ** 21   # the part of them that a CPU turns into float32 at a time: 8 MiB
    ROWS_AT_ONCE = 2048         # so that sums of grad_logits.T @ x stay below float16's limit of 65,504

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, with_gradients):
        """x (N, C), weight (padded V, C), targets (N,) -> a scalar. Ids from vocab_size on are padding.
        Without gradients, as in an evaluation, only the loss is computed."""
        loss = torch.zeros((), device=x.device)
        if with_gradients:
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        n_rows = max(1, min(LinearCrossEntropy.ROWS_AT_ONCE,
                            LinearCrossEntropy.LOGITS_AT_ONCE // weight.shape[0]))
        few = n_rows if x.is_cuda else max(1, LinearCrossEntropy.SOFTMAX_AT_ONCE // weight.shape[0])
        for start in range(0, x.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            logits = F.linear(x[rows], weight)                              # (rows, C) -> (rows, padded V)
            logits[:, vocab_size:] = -math.inf                              # padding gets no probability
            for part, target in zip(logits.split(few), targets[rows].split(few), strict=True):
                log_softmax = F.log_softmax(part.float(), dim=1)            # (few, padded V)
                at_target = torch.arange(len(part), device=x.device), target
                loss -= log_softmax[at_target].sum()
                if with_gradients:
                    grad_part = log_softmax.exp_()
                    grad_part[at_target] -= 1
                    part.copy_(grad_part)                                   # logits are now grad_logits
            if with_gradients:
                grad_x[rows] = logits @ weight                              # (rows, padded V) -> (rows, C)
                grad_weight += logits.T @ x[rows]                           # -> (padded V, C)
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None


# ------------------------------------------------------------------------------------------ the next id

def pick(logits, temperature, top_k, top_p, generator):
    """Chooses one id for each row of logits, (B, V) -> (B,). The options are those of GPT.generate."""
    if temperature < 1e-9:      # 0, or too little for float32 to divide by
        return logits.argmax(-1)
    logits = (logits - logits.amax(1, keepdim=True)) / temperature          # at most 0: no overflow
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]                           # (B, V) -> (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True)
        mass_before = falling.cumsum(-1) - falling                          # of all likelier ids together
        falling[mass_before >= top_p] = 0
        probabilities = torch.zeros_like(falling).scatter(1, order, falling)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


# ------------------------------------------------------------------------------------------------ model

class GPT(nn.Module):
    """model(ids) returns logits, model(ids, targets) the mean loss; model.generate(ids, n) yields n next ids.

    Inside, the vocabulary is padded to a multiple of 64, a size that matrix units are fast at. The padding
    gets no probability: it is never sampled and adds nothing to a loss, nor is it counted or exported.
    """

    def __init__(self, config, fused=True):
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, fused) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, fused)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Weights are normal with standard deviation 0.02, biases 0. The 2 * n_layer layers that add to the
        residual stream start smaller, so that their sum does not grow with depth (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def head(self):
        """The matrix that turns the output of ln_f into logits, (padded V, C)."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def num_params(self):
        """The number of parameters, not counting the padding of the vocabulary."""
        padding = (self.wte.num_embeddings - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding * (1 if self.config.tied else 2)

    def flops_per_id(self, length):
        """Floating-point operations to train on one id of a sequence of that length: 6 for each weight that
        it is multiplied with, and 12 * length * C for each layer's attention (Chowdhery et al. 2022)."""
        weights = sum(p.numel() for p in self.h.parameters() if p.dim() == 2) + self.head.numel()
        return 6 * weights + 12 * length * self.config.n_embd * self.config.n_layer

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V). With targets (B, T), the id that follows each position: -> the mean
        cross-entropy in nats per id, a scalar. Raises ValueError if T is above block_size."""
        x = self.hidden(ids)
        if targets is None:
            return linear(x, self.head)[..., :self.config.vocab_size]       # (B, T, C) -> (B, T, V)
        total = LinearCrossEntropy.apply(x.flatten(0, 1), self.head, targets.flatten(),
                                         self.config.vocab_size, torch.is_grad_enabled())
        return total / targets.numel()

    def hidden(self, ids, caches=None):
        """ids (B, T) -> (B, T, C), what the head reads. With caches, one per layer, ids continue what they
        hold."""
        start = caches[0].length if caches else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit into a block_size of {self.config.block_size}")
        x = self.wte(ids) + self.wpe.weight[start:end]                      # (B, T) -> (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        return self.ln_f(x)

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continues ids (B, T), T at least 1: yields (B,) ids, max_new_tokens times.

        Temperature 0 takes the likeliest id (greedy). Otherwise the id is drawn, with the torch.Generator,
        from softmax(logits / temperature), restricted to the top_k likeliest ids (Fan et al. 2018) and to the
        fewest ids whose probabilities add up to top_p (nucleus sampling, Holtzman et al. 2019).

        Each id depends on all ids before it, until they fill block_size. Then the cache is dropped, the last
        block_size // 2 ids are read again from position 0, and generation continues from there: so an id
        always depends on at least that many. Of a longer prompt only the last block_size ids count.
        """
        assert temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
        block_size = self.config.block_size
        caches = [KVCache(self.config, ids.shape[0], self.head.dtype, ids.device) for _ in self.h]
        context = unread = ids[:, -block_size:]
        for _ in range(max_new_tokens):
            if caches[0].length == block_size:
                context = unread = context[:, -max(1, block_size // 2):]
                for cache in caches:
                    cache.length = 0
            x = self.hidden(unread, caches)[:, -1]                          # (B, T) -> (B, C)
            logits = linear(x, self.head)[:, :self.config.vocab_size]       # (B, C) -> (B, V)
            next_ids = pick(logits.float(), temperature, top_k, top_p, generator)
            yield next_ids
            unread = next_ids.unsqueeze(1)                                  # (B,) -> (B, 1)
            context = torch.cat([context, unread], dim=1)[:, -block_size:]

    @classmethod
    def from_pretrained(cls, source):
        """Loads a GPT-2 in Hugging Face's layout (config.json, model.safetensors) onto the CPU, in evaluation
        mode: from a folder, or, by a name such as gpt2 or owner/name, from their hub. Neither file can run
        code. Raises ModelError if one cannot be had or is damaged, or the model is not a GPT-2. Needs the
        packages safetensors and, for the hub, huggingface_hub."""
        from safetensors.torch import load_file
        folder = source if os.path.isdir(source) else fetch_from_hub(source)
        try:
            values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            found = load_file(Path(folder, "model.safetensors"))
            found = {name.removeprefix("transformer."): weight for name, weight in found.items()}
            model = without_memory(config_from_hugging_face(values, bias="ln_f.bias" in found), found)
            weights = {}
            for name, ours in model.state_dict().items():
                if name not in found:
                    raise ModelError(f"the weight {name} is missing")
                weight = found[name].T.contiguous() if is_transposed(name) else found[name]
                if has_row_per_id(name):
                    weight = F.pad(weight, (0, 0, 0, ours.shape[0] - model.config.vocab_size))
                if weight.shape != ours.shape:
                    raise ModelError(f"the weight {name} has shape {tuple(weight.shape)}, but by config.json "
                                     f"it must have {tuple(ours.shape)}")
                weights[name] = weight
            model.load_state_dict(weights, assign=True)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
        except Exception as error:      # whatever else goes wrong while a file is read is the file's fault
            raise ModelError(f"{source} has no config.json and model.safetensors that can be read") from error
        return model.eval()

    def save_pretrained(self, folder):
        """Writes a folder that transformers.GPT2LMHeadModel.from_pretrained loads, with equal logits. Needs
        the package safetensors."""
        from safetensors.torch import save_file
        weights = {}
        for name, weight in self.state_dict().items():
            weight = weight[:self.config.vocab_size] if has_row_per_id(name) else weight
            weight = weight.T if is_transposed(name) else weight
            weights[name if name == "lm_head.weight" else f"transformer.{name}"] = weight.contiguous()
        os.makedirs(folder, exist_ok=True)
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        config = json.dumps(config_to_hugging_face(self.config), indent=2)
        Path(folder, "config.json").write_text(config + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------- weights on disk

def save_checkpoint(path, model, meta):
    """Writes a model and meta, a dictionary of tensors and plain values. At any moment, path is either the
    complete old file or the complete new one. Raises OSError if there is no room, for example."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save({"config": asdict(model.config), "model": model.state_dict(), "meta": meta}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        while error.__context__:        # torch.save may add errors of its own to the file's
            error = error.__context__
        raise error from None


def load_checkpoint(path):
    """Returns what save_checkpoint wrote, (model, meta), on the CPU, the model in evaluation mode. Runs no
    code from the file. Raises ModelError if there is no such file, or it is damaged or not a checkpoint."""
    if not os.path.isfile(path):
        raise ModelError(f"there is no checkpoint {path}")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights, meta = content["model"], content["meta"]
        model = without_memory(GPTConfig(**content["config"]), weights)
        # A tensor that is not contiguous could pretend to be larger than its memory.
        if not all(weight.is_contiguous() for weight in weights.values()) or not isinstance(meta, dict):
            raise ValueError("not what save_checkpoint writes")
        model.load_state_dict(weights, assign=True)
        return model.eval(), meta
    except (PermissionError, MemoryError):
        raise
    except Exception as error:      # whatever else goes wrong while a file is read is the file's fault
        raise ModelError(f"{path} is damaged, cut short, or not a checkpoint of this program") from error


def check_archive(path):
    """Raises an exception unless a file is a zip archive of the kind that torch.save writes: not compressed,
    so that it takes no more memory than disk, and with right checksums, which torch.load does not check."""
    with open(path, "rb") as file:
        magic = file.read(4)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            plain = all(r.compress_type == zipfile.ZIP_STORED and r.external_attr == 0 for r in records)
            size = sum(r.file_size for r in records)
            if magic != b"PK\3\4" or not plain or size > os.path.getsize(path) or archive.testzip():
                raise ValueError("damaged, or of another kind")


def without_memory(config, names):
    """Returns a model whose weights are shapes only, to be replaced by load_state_dict(..., assign=True) with
    weights of these names. Raises ModelError if they do not contain the last block, before it builds any."""
    if f"h.{config.n_layer - 1}.ln_1.weight" not in names:
        raise ModelError(f"there are no weights for {config.n_layer} layers")
    with torch.device("meta"):
        return GPT(config)


def fetch_from_hub(name):
    """Returns a local folder with the model of this name on Hugging Face's hub."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:
        raise ModelError(f"there is no folder {name}, and Hugging Face's hub gave no model of that name "
                         f"({type(error).__name__})") from error


def has_row_per_id(name):
    """Whether a weight has one row for each id of the vocabulary."""
    return name in ("wte.weight", "lm_head.weight")


def is_transposed(name):
    """Whether Hugging Face, like OpenAI's release, stores a weight as (in, out) instead of (out, in)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


HUGGING_FACE_NAMES = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "dropout": "resid_pdrop", "tied": "tie_word_embeddings"}
HUGGING_FACE_ARCHITECTURE = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": LayerNorm.EPSILON,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def config_to_hugging_face(config):
    values = {theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE_NAMES.items()}
    end_of_text = config.vocab_size - 1
    return {"architectures": ["GPT2LMHeadModel"], **HUGGING_FACE_ARCHITECTURE, **values,
            "n_inner": config.mlp_ratio * config.n_embd, "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout, "bos_token_id": end_of_text, "eos_token_id": end_of_text}


def config_from_hugging_face(values, bias):
    for name, value in HUGGING_FACE_ARCHITECTURE.items():
        if values.get(name, value) != value:
            raise ModelError(f"config.json: {name} is {values[name]!r}, but GPT-2 has {value!r}")
    sizes = {ours: values[theirs] for ours, theirs in HUGGING_FACE_NAMES.items() if theirs in values}
    mlp_ratio, rest = divmod(values.get("n_inner") or 4 * sizes["n_embd"], sizes["n_embd"])
    if rest:
        raise ModelError(f"config.json: n_inner {values['n_inner']} is not a multiple of n_embd")
    return GPTConfig(**sizes, mlp_ratio=mlp_ratio, bias=bias)
