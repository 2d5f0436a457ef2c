"""Weights and a prompt to text: continues the prompt and prints each character as soon as it is complete.

    python sample.py --prompt "def "                                    uses the newest out/*/best.pt
    python sample.py --prompt_file - --num_samples 3 < question.txt
    python sample.py --prompt "Once upon" --show_probs                  what else could have come
    python sample.py --export FOLDER                                    for Hugging Face's transformers

How the next id is chosen is in gpt.py (GPT.generate and pick). Left out: chat.
"""

import base64
import codecs
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from gpt import GPT, ModelError, load_checkpoint
from prepare import TOKENIZERS, Parser, UserError, count, get_tokenizer, number, one_line_errors, seed_number

DTYPES = ("float32", "float16", "bfloat16")


def choose_device(name=None):
    """Returns the torch.device of that name, by default a CUDA GPU if there is one, otherwise the CPU. Raises
    UserError if this machine does not have it."""
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    name = name or ("cuda" if found["cuda"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= found.get(device.type, 0):
        raise UserError(f"there is no device {name} here: use --device cpu, or leave the flag out")
    return device


def choose_dtype(name, device):
    """Returns the dtype for matrix products: the one of that name, by default the fastest that the device has
    hardware for. Raises UserError if it does not run there."""
    if name is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        # Older versions of PyTorch cannot tell what a CPU has, and get float32.
        abilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32
    dtype = getattr(torch, name)
    try:
        x = torch.ones(8, 8, device=device, requires_grad=True)
        with mixed_precision(device, dtype):
            y = x @ x
        y.sum().backward()
        runs = y.dtype == dtype
    except RuntimeError:
        runs = False
    if not runs:
        raise UserError(f"{name} does not run on this {device.type} device: use --dtype float32")
    return dtype


def mixed_precision(device, dtype):
    """Returns a context manager, which can be used again, in which matrix products compute in that dtype."""
    # Older versions of PyTorch do not have torch.autocast for every device, and float32 does not need it.
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def complete(model, tokenizer, prompt, max_new_tokens, *, num_samples=1, seed=1337, **options):
    """Continues a prompt num_samples times, as one batch; the options are those of GPT.generate. After each
    id, yields what it adds to each sample, a list of strings, and at the end once more, what remains.

    An id that is part of a character adds "" until the character is complete. A sample ends at
    <|endoftext|>, and generation when all samples have ended. An empty prompt starts a new document.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]], device=device)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(num_samples)]
    ended = [False] * num_samples
    options["generator"] = torch.Generator(device).manual_seed(seed)
    for next_ids in model.generate(ids.repeat(num_samples, 1), max_new_tokens, **options):
        added = [""] * num_samples
        for i, next_id in enumerate(next_ids.tolist()):
            ended[i] = ended[i] or next_id == tokenizer.eot_token
            if not ended[i]:
                added[i] = decoders[i].decode(tokenizer.decode_single_token_bytes(next_id))
        yield added
        if all(ended):
            break
    yield [decoder.decode(b"", final=True) for decoder in decoders]


@torch.inference_mode()
def probabilities(model, ids):
    """ids (T,) -> (T - 1, V): how likely each id was to come at each position after the first, given all ids
    before it, or at least the last block_size // 2 of them."""
    block_size = model.config.block_size
    rows = []
    for start in range(0, max(1, len(ids) - 1 - block_size // 2), max(1, block_size // 2)):
        logits = model(ids[start:-1][:block_size].unsqueeze(0))[0]          # (T,) -> (1, T) -> (T, V)
        rows += logits[len(rows) - start:].float().softmax(-1)
    return torch.stack(rows)


def show_probs(model, tokenizer, prompt, max_new_tokens, **options):
    """Continues a prompt and prints a line for each id after the first: its probability and those of its
    three likeliest rivals, before temperature, top_k and top_p. A > marks what is new."""
    device = next(model.parameters()).device
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    n_prompt = len(ids)
    for [next_id] in model.generate(torch.tensor([ids], device=device), max_new_tokens, **options):
        ids.append(next_id.item())
        if ids[-1] == tokenizer.eot_token:
            break

    def shown(i):
        return repr(tokenizer.decode_single_token_bytes(i).decode("utf-8", "backslashreplace"))

    for position, row in enumerate(probabilities(model, torch.tensor(ids, device=device)), start=1):
        this = ids[position]
        rivals = [i for i in row.topk(4).indices.tolist() if i != this][:3]
        line = f"{'>' if position >= n_prompt else ' '} {row[this]:6.1%}  {shown(this):16}"
        if sys.stdout.isatty():
            colour = 32 if row[this] >= 0.5 else 33 if row[this] >= 0.1 else 31     # green, yellow, red
            line = f"\033[{colour}m{line}\033[0m"
        print(line, "  ".join(f"{shown(i)} {row[i]:.1%}" for i in rivals))


def load_model(source):
    """Returns a model on the CPU and the name of its tokenizer, which its number of ids tells. The source is
    a file that train.py wrote, or what GPT.from_pretrained takes. Raises ModelError or UserError."""
    is_file = os.path.isfile(source) or str(source).endswith(".pt")
    model = load_checkpoint(source)[0] if is_file else GPT.from_pretrained(source)
    for name, vocab_size in TOKENIZERS.items():
        if vocab_size == model.config.vocab_size:
            return model, name
    raise UserError(f"{source} has {model.config.vocab_size:,} ids, and no tokenizer here has so many")


def export(model, tokenizer, folder):
    """Writes a folder that transformers.pipeline("text-generation", folder) can use. Needs the packages
    safetensors and transformers."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    model.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        ranks = Path(temporary, "ranks.tiktoken")
        ranks.write_bytes(b"".join(b"%b %d\n" % (base64.b64encode(token), rank)
                                   for token, rank in tokenizer._mergeable_ranks.items()))
        end = tokenizer.decode([tokenizer.eot_token])
        converted = TikTokenConverter(str(ranks), tokenizer._pat_str, extra_special_tokens=[end]).converted()
    PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token=end, eos_token=end, unk_token=end,
        model_max_length=model.config.block_size).save_pretrained(folder)


def newest_checkpoint():
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no out/*/best.pt: run train.py first, or give a file with --checkpoint")
    print(f"sampling from {found[-1]}", file=sys.stderr)
    return found[-1]


def read_prompt(file):
    """Returns the text of a file, or of standard input for "-"."""
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {file} is not UTF-8 at byte {error.start:,}") from error


def parse_args(argv):
    parser = Parser(description="Continue a prompt with a trained model.")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="the text to continue (default: start a new document)")
    prompt.add_argument("--prompt_file", help="a file that contains it, or - for standard input")
    add = parser.add_argument
    add("--checkpoint", help="a file that train.py wrote, a folder with a GPT-2 in Hugging Face's layout, or "
        "its name on their hub, such as gpt2-xl (default: the newest out/*/best.pt)")
    add("--show_probs", action="store_true",
        help="print each id of one sample on a line, with its probability and its likeliest rivals")
    add("--export", metavar="FOLDER",
        help="write the model and its tokenizer for Hugging Face's transformers, and exit")
    add("--num_samples", type=count, default=1, help="how many continuations to generate")
    add("--max_new_tokens", type=count, default=200, help="the most ids that each may have")
    add("--temperature", type=number(float, lambda t: 0 <= t < float("inf"), "at least 0"), default=0.8,
        help="0: always the likeliest id; 1: the model's own odds; above: more varied")
    add("--top_k", type=count, default=50, help="draw from this many of the likeliest ids")
    add("--top_p", type=number(float, lambda p: 0 < p <= 1, "above 0 and at most 1"), default=1.0,
        help="draw from the fewest ids that have this probability together")
    add("--seed", type=seed_number, default=1337, help="same seed and flags, same text")
    add("--dtype", choices=DTYPES, help="(default: the fastest that the device has hardware for)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, otherwise cpu)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(UserError, ModelError, OSError):
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
        model, tokenizer_name = load_model(args.checkpoint or newest_checkpoint())
        tokenizer = get_tokenizer(tokenizer_name)
        if args.export:
            export(model, tokenizer, args.export)
            print(f"wrote {args.export}")
            return
        length, block_size = len(tokenizer.encode_ordinary(prompt)), model.config.block_size
        if length > block_size:
            print(f"the prompt has {length:,} ids: the model sees the last {block_size:,}", file=sys.stderr)

        model = model.to(device, dtype)
        options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        if args.show_probs:
            options["generator"] = torch.Generator(device).manual_seed(args.seed)
            show_probs(model, tokenizer, prompt, args.max_new_tokens, **options)
            return
        texts = [prompt] * args.num_samples
        if args.num_samples > 1:
            print("--- sample 1 ---")
        print(prompt, end="", flush=True)
        for added in complete(model, tokenizer, prompt, args.max_new_tokens, num_samples=args.num_samples,
                              seed=args.seed, **options):
            print(added[0], end="", flush=True)
            texts = [text + new for text, new in zip(texts, added, strict=True)]
        print()
        for i, text in enumerate(texts[1:], start=2):
            print(f"--- sample {i} ---\n{text}")


if __name__ == "__main__":
    main()
