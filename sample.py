"""Weights and a prompt to text: continues the prompt, and prints each character as soon as it is whole.

    python sample.py --prompt "def "                    from the newest out/*/best.pt
    python sample.py --prompt_file - --num_samples 3 < question.txt

Left out: the choice of the next id and the cache that makes it fast (GPT.generate in gpt.py), and chat.
"""

import codecs
import sys
from pathlib import Path

import torch

from gpt import ModelError, load_checkpoint
from prepare import Parser, UserError, count, get_tokenizer, number, one_line_errors, seed


def choose_device(name=None):
    """The torch.device of that name, or without one a CUDA GPU where there is one and the CPU where not.
    Raises UserError where this machine, or this PyTorch, does not have it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            there = (device.index or 0) < torch.cuda.device_count()     # takes no memory on the GPU
        else:
            there = torch.empty(1, device=device) is not None
    except (RuntimeError, AssertionError, NotImplementedError):
        there = False
    if not there:
        raise UserError(f"there is no device {name} here: use --device cpu, or leave the flag out")
    return device


def complete(model, tokenizer, prompt, *, num_samples=1, max_new_tokens=200, temperature=0.8, top_k=50,
             top_p=1.0, seed=1337):
    """Continues prompt num_samples times, as one batch. Yields lists of num_samples strings, by what each
    has grown: one list an id, and a last one.

    A sample that comes to <|endoftext|> has ended, and when all have, it stops. An id that is part of a
    character adds "" until the other parts are there. An empty prompt begins a new document.
    """
    device = next(model.parameters()).device
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(num_samples)]
    ended = [False] * num_samples
    for next_ids in model.generate(
            torch.tensor([ids] * num_samples, device=device), max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, generator=torch.Generator(device).manual_seed(seed)):
        grown = [""] * num_samples
        for i, next_id in enumerate(next_ids.tolist()):
            ended[i] = ended[i] or next_id == tokenizer.eot_token
            if not ended[i]:
                grown[i] = decoders[i].decode(tokenizer.decode_single_token_bytes(next_id))
        yield grown
        if all(ended):
            break
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def newest_checkpoint():
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no out/*/best.pt: run train.py first, or name a file with --checkpoint")
    print(f"sampling from {found[-1]}", file=sys.stderr)
    return found[-1]


def read_prompt(file):
    """The text of a file, or of standard input where it is "-"."""
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {file} is not UTF-8 at byte {error.start:,}") from error


def parse_args(argv):
    parser = Parser(description="Continue a prompt with a trained model.")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="the text to continue (default: begin a new document)")
    prompt.add_argument("--prompt_file", help="a file that has it, or - for standard input")
    add = parser.add_argument
    add("--checkpoint", help="a file that train.py wrote (default: the newest out/*/best.pt)")
    add("--num_samples", type=count, default=1, help="how many continuations to make")
    add("--max_new_tokens", type=count, default=200, help="how many ids each may have")
    add("--temperature", type=number(float, lambda t: 0 <= t < float("inf"), "at least 0"), default=0.8,
        help="0: always the likeliest id; 1: the model's own odds; more: wilder")
    add("--top_k", type=count, default=50, help="draw from the so many likeliest ids")
    add("--top_p", type=number(float, lambda p: 0 < p <= 1, "above 0 and at most 1"), default=1.0,
        help="draw from the fewest ids that have this probability together")
    add("--seed", type=seed, default=1337, help="same seed, same text")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(UserError, ModelError, OSError):
        device = choose_device(args.device)
        prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
        model, meta = load_checkpoint(args.checkpoint or newest_checkpoint())
        tokenizer = get_tokenizer(meta["data"]["tokenizer"])
        length, block_size = len(tokenizer.encode_ordinary(prompt)), model.config.block_size
        if length > block_size:
            print(f"the prompt has {length:,} ids: the model sees the last {block_size:,}", file=sys.stderr)

        texts = [prompt] * args.num_samples
        print(prompt, end="", flush=True)
        for grown in complete(model.to(device), tokenizer, prompt, num_samples=args.num_samples,
                              max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                              top_k=args.top_k, top_p=args.top_p, seed=args.seed):
            print(grown[0], end="", flush=True)
            texts = [text + new for text, new in zip(texts, grown, strict=True)]
        print()
        for i, text in enumerate(texts[1:], start=2):
            print(f"--- sample {i} ---\n{text}")


if __name__ == "__main__":
    main()
