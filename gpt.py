"""The model: GPT-2, written out. Tokens go in; logits, a loss, or new tokens come out.

    ids (B, T) --wte + wpe--> (B, T, C) --n_layer blocks--> (B, T, C) --ln_f, lm_head--> logits (B, T, V)
                                                                                             |
                    training: the logits at t are scored on the token at t + 1 --> loss  <---+
                    sampling: the last logits --softmax, draw--> the next token  <-----------+

B is the batch size (sequences side by side), T time (positions in a sequence), C channels (the width of the
vector at each position), H attention heads, D head size (H * D = C), V the vocabulary size. A token is a
number below V, made from text by prepare.py. Logits are scores, one per token, and softmax turns them into
probabilities, exp(score) / sum. Layers are named as in OpenAI's release: wte has a learned vector per token,
wpe one per position (attention itself ignores order), h the blocks; c_attn, c_fc and c_proj are linear.

There are two versions of GELU, attention, cross-entropy and LayerNorm: formulas, for reading, and kernels,
below the banner, which are faster and agree up to rounding. GPT(config), and so train.py, uses KERNELS (to
change a formula, change its kernel, too), and GPT(config, fused=False) uses FORMULAS. Layers get one of these
sets as `ops`. Left out: training, text, and newer architectures.
"""

import math
import os
import sys
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


# -------------------------------------------------------------------------------------- sizes

@dataclass(frozen=True)
class GPTConfig:
    """The sizes of one model. Raises ModelError if they are inconsistent."""
    block_size: int = 1024      # context length: the longest sequence it can read
    vocab_size: int = 50257     # V, the number of tokens (train.py takes that of the data)
    n_layer: int = 12           # blocks, one after the other
    n_head: int = 12            # H, attention heads in each block
    n_embd: int = 768           # C, the width
    mlp_ratio: int = 4          # width inside a block's MLP, as a multiple of C
    dropout: float = 0.0        # fraction of activations zeroed in training, against overfitting
    bias: bool = True           # whether linear layers (except lm_head) and LayerNorms add a bias
    tied: bool = True           # whether lm_head uses the weights of wte

    def __post_init__(self):
        for name, size in asdict(self).items():
            if GPTConfig.__annotations__[name] is int and (type(size) is not int or size < 1):
                raise ModelError(f"{name} must be a whole number above 0, not {size!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


MODELS = {
    "nano": GPTConfig(block_size=128, vocab_size=2048, n_layer=4, n_head=2, n_embd=128),
    # For two 16 GB GPUs: shallower, narrower, half-width MLP, untied lm_head. Its head size is odd: 57.
    "gpt2-92m": GPTConfig(block_size=512, n_layer=6, n_head=12, n_embd=684, mlp_ratio=2, tied=False),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


# ----------------------------------------------------------------------------------- formulas

def gelu(x):
    """x * Phi(x), Phi the standard normal CDF, in GPT-2's tanh approximation: a smooth max(x, 0) (Hendrycks
    and Gimpel 2016, https://arxiv.org/abs/1606.08415)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention(q, k, v, dropout):
    """softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).
    q, k, v and the result are (B, H, T, D) in training.

    Each position makes a query (what am I looking for?), a key (what do I have?) and a value (what do I pass
    on?). The dot product of a query and a key, their score, says how well they match. A softmax turns the
    scores of one query into weights that add up to 1, and the result is the weighted mean of the values.

    Why sqrt(D)? If the entries of queries and keys have variance 1, a score, the sum of D products, has
    variance D. Divided by sqrt(D) it has variance 1 again. Without that, the larger D, the more weight the
    softmax would put on one position, until the gradients of the scores were almost 0.

    The mask is causal: a position attends to itself and to earlier positions. Later ones (x) get a score of
    minus infinity, which the softmax turns into a weight of 0:

            training, T = S = 3                 generation, T = 1, S = 4
                    key 0  1  2                           key 0  1  2  3
        query 0         .  x  x            query 3            .  .  .  .
        query 1         .  .  x
        query 2         .  .  .

    In generation, only the T new positions make queries. The keys and values of all S positions, (B, H, S,
    D), come from KVCache, which kept the earlier ones."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    scores = (q / math.sqrt(D)) @ k.transpose(2, 3)                         # (B, H, T, D) -> (B, H, T, S)
    key_positions = torch.arange(S, device=q.device)
    query_positions = key_positions[S - T:].unsqueeze(1)        # the last T of them: (T, 1)
    weights = scores.masked_fill(key_positions > query_positions, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v                                  # (B, H, T, S) -> (B, H, T, D)


def cross_entropy(x, weight, targets, vocab_size):
    """The mean of -ln(probability of the target) over all B * T positions, in nats (1 nat is 1 / ln 2 = 1.44
    bits). targets are (B, T), x (B, T, C) is the output of ln_f, and weight is lm_head's. The last step of
    the model, from x to logits, is done in here, so that the kernel can do it in chunks."""
    logits = F.linear(x, weight)[..., :vocab_size]      # (B, T, C) -> (B, T, V), without padding: see GPT
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())         # includes the softmax


class LayerNorm(nn.Module):
    """Brings the C channels of each position to mean 0 and variance 1, however large they have grown, then
    scales and shifts each by a learned weight and bias (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)                                     # (B, T, C) -> (B, T, 1)
        variance = x.var(-1, unbiased=False, keepdim=True)                  # (B, T, C) -> (B, T, 1)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * self.weight
        return x if self.bias is None else x + self.bias


# ------------------------------------------------------------------------------------- layers

class CausalSelfAttention(nn.Module):
    """The only place where positions exchange information. H heads work in parallel, each with queries, keys
    and values of its own: one may look for a verb, another for a bracket. c_proj combines their results."""

    def __init__(self, config, ops):
        super().__init__()
        self.attention = ops.attention
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C). With a KVCache, x holds the positions after the cached ones."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                            # (B, T, C) -> three (B, T, C)
        # Each head gets D channels of q, k and v: (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)                                       # T becomes S: cached and new
        y = self.attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                              # (B, H, T, D) -> (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, applied to each position on its own. Without the GELU, they would act as one."""

    def __init__(self, config, ops):
        super().__init__()
        self.gelu = ops.gelu
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                         # (B, T, C) -> (B, T, ratio * C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)       # -> (B, T, C)


class Block(nn.Module):
    """Attention gathers information from other positions, then the MLP processes it. Each reads the residual
    stream x through a LayerNorm and adds its result to x. So x is a running sum, and gradients reach the
    first block directly (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, config, ops):
        super().__init__()
        self.ln_1 = ops.LayerNorm(config)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = ops.LayerNorm(config)
        self.mlp = MLP(config, ops)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# -------------------------------------------------------------------------------------- model

class GPT(nn.Module):
    """model(ids) returns logits, model(ids, targets) the mean loss; model.generate(ids, n) continues ids.

    GPUs prefer matrix sizes that are multiples of 64, and 50,257 is not. So the vocabulary is padded with
    dummy tokens. They get probability 0, and do not count in the loss, the parameter count or an export."""

    def __init__(self, config, fused=True):
        super().__init__()
        ops = KERNELS if fused else FORMULAS
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.config, self.loss = config, ops.cross_entropy
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.ln_f = ops.LayerNorm(config)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        if config.tied:     # one table turns tokens into vectors and, at the end, vectors into logits
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self):
        """Matrices are drawn from a normal distribution with standard deviation 0.02; biases start at 0. The
        2 * n_layer layers that add to the residual stream start smaller, so that their sum does not grow with
        depth. The first logits are small: every token has a probability of about 1 / V, so the first loss is
        close to -ln(1 / V) = ln V. For GPT-2, ln V is 10.8, and the loss 11.0. If not, look for a bug."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                n_added = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(n_added))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V). With targets (B, T), the next token at each position, returns the
        loss, a scalar: see cross_entropy. Raises ValueError if T is above block_size."""
        x = self.hidden(ids)
        if targets is None:
            return self.logits(x)
        return self.loss(x, self.lm_head.weight, targets, self.config.vocab_size)       # makes its own logits

    def hidden(self, ids, caches=None):
        """ids (B, T) -> (B, T, C). With caches, a KVCache per block, ids continue the cached positions."""
        start = caches[0].length if caches else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit into a block_size of {self.config.block_size}")
        x = self.wte(ids) + self.wpe.weight[start:end]                      # (B, T) -> (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        return self.ln_f(x)

    def logits(self, x):
        """(..., C) -> a score for each token of the vocabulary, (..., V)."""
        return self.lm_head(x)[..., :self.config.vocab_size]

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, generator=None,
                 watch=lambda logits: None):
        """Continues ids (B, T), T at least 1: yields (B,) ids, max_new_tokens times. next_token, below,
        chooses them and explains the options. watch gets the logits (B, V) before each choice: sample.py
        shows probabilities with it.

        The model sees at most block_size tokens. When the caches are full, they are cleared, and the newest
        block_size / 2 tokens are read again, as positions 0, 1, 2 and so on. Dropping just the oldest token
        would move all others down one position: the whole cache would be computed again for every token."""
        block_size = self.config.block_size
        unread = ids[:, -block_size:]       # the tokens that are not in the caches yet
        caches = [KVCache(self, batch_size=len(ids)) for _ in self.h]
        for _ in range(max_new_tokens):
            if caches[0].length == block_size:
                unread = ids[:, -max(1, block_size // 2):]      # the unread token is the last of them
                for cache in caches:
                    cache.length = 0
            logits = self.logits(self.hidden(unread, caches)[:, -1]).float()    # (B, T) -> (B, C) -> (B, V)
            watch(logits)
            next_ids = next_token(logits, temperature, top_k, top_p, generator)
            yield next_ids
            unread = next_ids.unsqueeze(1)                                  # (B,) -> (B, 1)
            ids = torch.cat([ids, unread], dim=1)[:, -block_size:]          # for when the caches are full


# --------------------------------------------------------------------------------- generation

class KVCache:
    """The keys and values of one attention layer for all positions read so far. They never change, because no
    position sees later ones. So for a new token, only its own position needs to be computed."""

    def __init__(self, model, batch_size):
        config, like = model.config, model.wte.weight
        shape = (2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys, self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, k, v):
        """Adds k and v of T new positions, (B, H, T, D); returns those of all S so far, (B, H, S, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


def next_token(logits, temperature, top_k, top_p, generator):
    """Draws a token for each row of logits, (B, V) -> (B,), from softmax(logits / temperature). A temperature
    below 1 sharpens the distribution, one above 1 flattens it, and 0 always picks the likeliest (greedy).
    top_k keeps the k likeliest tokens (Fan et al. 2018, https://arxiv.org/abs/1805.04833), and top_p then the
    fewest that reach p together (nucleus, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)."""
    if temperature < 1e-9:      # 0, or so small that dividing by it might overflow
        return logits.argmax(-1)
    logits = (logits - logits.amax(1, keepdim=True)) / temperature          # at most 0: cannot overflow
    V = logits.shape[1]
    k = min(top_k or V, V)
    logits, tokens = logits.topk(k)     # (B, V) -> (B, k), from the likeliest down
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        reached = probabilities.cumsum(-1) >= top_p
        probabilities[:, 1:][reached[:, :-1]] = 0       # drop a token if those before it already reach p
    choice = torch.multinomial(probabilities, 1, generator=generator)       # rescales them to sum to 1
    return tokens.gather(1, choice).squeeze(1)                              # (B, 1) -> (B,)


# ================================================================================== plumbing
# You can stop here on a first reading: the model is complete. Below: fast kernels, checkpoints, Hugging
# Face's format, devices and dtypes.

class ModelError(ValueError):
    """A model that cannot be built, loaded or run here. The message says why in one line."""


def num_params(model):
    """Returns the number of parameters, without the padding of the vocabulary."""
    padding = (model.wte.num_embeddings - model.config.vocab_size) * model.config.n_embd
    return sum(p.numel() for p in model.parameters()) - padding * (1 if model.config.tied else 2)


# ------------------------------------------------------------------------------- fast kernels

PADDED = ("cuda",)      # device types where the head size is padded


def fused_attention(q, k, v, dropout):
    """The same as attention (dropout aside) for T = S or T = 1, with a fused kernel, which never holds all
    scores at once, except for dropout on a CPU."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    # If T == S, is_causal makes the mask. A single new position may attend to all others: it needs no mask.
    assert T == S or T == 1
    if torch.is_grad_enabled() and T <= 256 and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention(q, k, v, dropout)      # the kernel's backward pass is slow there
    if D % 8 and q.device.type in PADDED:   # older GPUs' kernels need multiples of 8; zeros change nothing
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1, scale=1 / math.sqrt(D))
    return y[..., :D]


# For GPT-2, the logits of so many rows take 100 MB in 16 bits. A GPU takes twice as many, which is faster. A
# chunk's gradient of the weight sums over its rows: over many more, it might exceed 65,504, float16's limit.
ROWS_AT_ONCE = 1024


def chunked_cross_entropy(x, weight, targets, vocab_size):
    """The same as cross_entropy, but never holds all logits, by far the largest array, of a large batch."""
    with_gradients = torch.is_grad_enabled()        # asked here, as it is always off inside forward
    x, targets = x.flatten(0, 1), targets.flatten()
    return ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, with_gradients) / len(targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of -ln(probability of the target) over the rows of x (N, C), a chunk of rows at a time. The
    gradient of a row's logits is softmax(logits) - onehot(target), known as soon as the logits are. So
    forward also computes the gradients of x and weight, and discards the logits. backward multiplies these by
    1 / N and the loss scale. (Until then they are N times as large, so float16 holds them.)"""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, with_gradients):
        loss, n_rows = torch.zeros((), device=x.device), ROWS_AT_ONCE * (2 if x.is_cuda else 1)
        if with_gradients:
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, x.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            logits = F.linear(x[rows], weight)                              # (rows, C) -> (rows, padded V)
            logits[:, vocab_size:] = -math.inf                              # padding gets no probability
            log_probs = F.log_softmax(logits, dim=1, dtype=torch.float32)
            target = torch.arange(len(logits), device=x.device), targets[rows]      # one logit in each row
            loss = loss - log_probs[target].sum()       # not -=, which PyTorch 2.11 compiles wrongly
            if with_gradients:
                with torch.no_grad():       # always off here, but the compiler of PyTorch 2.4 misses that
                    grad_logits = torch.exp(log_probs, out=logits)          # softmax, reusing their memory
                grad_logits[target] = torch.expm1(log_probs[target]).to(logits.dtype)       # p - 1
                grad_x[rows] = grad_logits @ weight                         # (rows, padded V) -> (rows, C)
                grad_weight += grad_logits.T @ x[rows]                      # -> (padded V, C)
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None


class FusedLayerNorm(LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


FORMULAS = SimpleNamespace(gelu=gelu, attention=attention, cross_entropy=cross_entropy, LayerNorm=LayerNorm)
KERNELS = SimpleNamespace(gelu=nn.GELU("tanh"), attention=fused_attention,
                          cross_entropy=chunked_cross_entropy, LayerNorm=FusedLayerNorm)


# -------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, meta):
    """Writes a model and meta, a dictionary of tensors and plain values. At any moment, path holds
    either the complete old file or the complete new one. Raises OSError, for example if the disk is full."""
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
        while error.__context__:        # torch.save raises its own error on top of the file's
            error = error.__context__
        raise error from None


def load_checkpoint(path):
    """Returns what save_checkpoint wrote, (model, meta), on the CPU and in evaluation mode. Runs no code
    from the file. Raises ModelError if there is no such file, or it is damaged or not a checkpoint."""
    if not os.path.isfile(path):
        raise ModelError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():       # checksums, which torch.load does not verify
                raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):      # uses no memory and skips initialization
            model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(content["model"], assign=True)
        if model.config.tied:       # assign=True made two parameters of one
            model.lm_head.weight = model.wte.weight
        return model.eval(), dict(content["meta"])
    except PermissionError:
        raise
    except Exception as error:          # anything else means a bad file (or too little memory)
        raise ModelError(f"{path} is damaged, cut short, or not a checkpoint of this program: use another "
                         "one") from error


# ------------------------------------------------------------------------------- Hugging Face

def weight_pairs(model, theirs):
    """Yields (a weight of a GPT, the same weight of a GPT2LMHeadModel) as views of the same shape: like
    OpenAI's release, theirs stores blocks' linear layers as (in, out), without padding."""
    for name, ours in model.named_parameters():
        weight = theirs.get_parameter(name if name == "lm_head.weight" else f"transformer.{name}")
        if name in ("wte.weight", "lm_head.weight"):
            ours = ours[:model.config.vocab_size]
        transposed = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        yield ours, weight.T if transposed else weight


@torch.no_grad()
def save_pretrained(model, folder):
    """Writes a folder for transformers.GPT2LMHeadModel.from_pretrained. Needs the package transformers.
    Raises ModelError if gpt.py was changed: see check_logits."""
    from copy import deepcopy

    import transformers
    transformers.logging.disable_progress_bar()
    config, end_of_text = model.config, model.config.vocab_size - 1
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, n_inner=config.mlp_ratio * config.n_embd,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        tie_word_embeddings=config.tied, bos_token_id=end_of_text, eos_token_id=end_of_text))
    for ours, weight in weight_pairs(model, theirs):
        weight.copy_(ours)      # theirs always has biases; they stay 0 if ours has none
    check_logits(deepcopy(model).to("cpu", torch.float32).eval(), theirs)
    theirs.generation_config.max_length = config.block_size     # where their pipeline stops by default
    theirs.save_pretrained(folder)


@torch.no_grad()
def from_pretrained(source):
    """Loads a GPT-2 in Hugging Face's format, a folder or a name on their Hub (gpt2, owner/name), onto the
    CPU and in evaluation mode. Raises ModelError if it is unavailable, not a GPT-2, or gpt.py was changed:
    see check_logits. Needs the package transformers."""
    import transformers
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)      # runs no code
        gpt2 = transformers.GPT2Config()
        for name in ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
                     "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if (found := getattr(config, name, None)) != (expected := getattr(gpt2, name)):
                raise ModelError(f"its {name} is {found!r}, not {expected!r}")
        theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True)
        if names := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
            raise ModelError(f"its weights do not match: see {names[0]}")
        model = GPT(GPTConfig(
            block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, dropout=float(config.resid_pdrop),
            tied=config.tie_word_embeddings,
            mlp_ratio=(config.n_inner or 4 * config.n_embd) // config.n_embd))
        for ours, weight in weight_pairs(model, theirs):
            ours.copy_(weight)
        check_logits(model.eval(), theirs)
        return model
    except Exception as error:      # also for a bad folder, or trouble with the Hub
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{source} cannot be loaded as Hugging Face's GPT-2 ({reason}): check the folder, "
                         "or the name and the connection") from error


def check_logits(model, theirs):
    """Raises ModelError if a GPT2LMHeadModel computes other logits with the same weights, as it does once
    gpt.py has other positions, for example."""
    ids = torch.arange(min(16, model.config.block_size, model.config.vocab_size)).unsqueeze(0)
    if not torch.allclose(theirs.eval()(ids).logits, model(ids), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ModelError("GPT-2 computes other logits with its weights: was gpt.py changed?")


# Methods of GPT, kept out of its class so that it stays short: model.num_params() and so on.
GPT.num_params, GPT.save_pretrained = num_params, save_pretrained
GPT.from_pretrained = staticmethod(from_pretrained)


# --------------------------------------------------------------------------- device and dtype

DTYPES = ("float32", "float16", "bfloat16")


def choose_device(name=None):
    """Returns the torch.device of that name; the default is a CUDA GPU if there is one, otherwise the CPU.
    Raises ModelError if the device is missing or gives wrong results."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.arange(64.0).reshape(8, 8)
    try:
        y = x.to(name)
        matmuls = torch.cat([y.T @ y, y @ y.T]).cpu()
    except Exception as error:      # PyTorch raises all kinds
        raise ModelError(f"there is no device {name} here: use --device cpu or leave the flag out") from error
    if not torch.allclose(matmuls, torch.cat([x.T @ x, x @ x.T]), rtol=0.01):      # as on some Apple GPUs
        raise ModelError(f"matmuls on {name} are wrong in PyTorch {torch.__version__}: use --device cpu")
    return y.device


def choose_dtype(name, device):
    """Returns the dtype for matmuls: the named one, or by default the fastest that the device is known
    to have hardware for. Raises ModelError if it does not run there."""
    modern = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and not modern:
        print("warning: this GPU has no hardware bfloat16: float16 is faster", file=sys.stderr)
    if name is None and device.type == "cuda":
        return torch.bfloat16 if modern else torch.float16
    if name is None:    # PyTorch before 2.11 cannot report what a CPU has: float32
        abilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32
    dtype = getattr(torch, name)
    try:
        with mixed_precision(device, dtype):
            F.linear(torch.ones(8, 8, device=device), torch.ones(8, 8, device=device))
    except RuntimeError as error:
        raise ModelError(f"{name} does not run on this {device.type}: use --dtype float32") from error
    return dtype


def mixed_precision(device, dtype):
    """Returns a reusable context manager in which matmuls run in this dtype."""
    # float32 needs no autocast, which older versions of PyTorch do not have for every device.
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
