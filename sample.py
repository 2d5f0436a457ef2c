"""From weights and a prompt to text: prints the continuation token by token, as it is generated.

    python sample.py --prompt "def"                                     uses the newest run in out/
    python sample.py --prompt "def" --num_samples 3
    python sample.py --prompt "Once upon" --show_probs                  shows likely alternatives
    python sample.py --export FOLDER                                    for Hugging Face's transformers

How the next token is chosen is in gpt.py (GPT.generate and next_token). Left out: chat.
"""

import codecs
import io
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from gpt import DTYPES, GPT, ModelError, choose_device, choose_dtype, load_checkpoint
from prepare import Parser, UserError, at_least_0, checked, get_tokenizer, in_colour, note, on_ending_signals
from prepare import one_line_errors, positive_int, read_text, seed_int, token_text, tokenizer_arguments
from prepare import vocabulary_text


def complete(model, tokenizer, prompt, max_new_tokens, *, seed=1337, **options):
    """Continues a prompt, at most until the model ends the document; without a prompt, it starts a new one.
    Yields the new text after each token. The options are those of GPT.generate.

    A token may be only part of a character. Then its text is "", and the character appears once it is
    complete (or as \ufffd, once it is clear that it never will be)."""
    device = next(model.parameters()).device
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    options["generator"] = torch.Generator(device).manual_seed(seed)
    for [token] in model.generate(ids, max_new_tokens, **options):      # a batch of one
        if token == tokenizer.eot_token:
            break
        yield decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
    yield decoder.decode(b"", final=True)


def encode_prompt(tokenizer, prompt):
    """Returns the tokens of a prompt. Unlike in prepare.py, <|endoftext|> in it is ordinary text."""
    pieces = read_text(io.StringIO(prompt))     # cut, as tiktoken fails on a very long run of spaces
    return [token for text, _ in pieces for token in tokenizer.encode_ordinary(text)] or [tokenizer.eot_token]


def token_probabilities(model, ids, max_new_tokens, eot_token, **options):
    """How likely was each token, given those before it? Yields (token, probabilities (V,)) for all ids except
    the first, then for each generated token. temperature, top_k and top_p do not change what they show. If
    there are more than block_size ids, uses only the last block_size."""
    ids = torch.tensor([ids[-model.config.block_size:]], device=next(model.parameters()).device)
    with torch.inference_mode():
        # (1, T) -> (T, V): the last logits predict a token beyond ids.
        for token, logits in zip(ids[0, 1:].tolist(), model(ids)[0], strict=False):
            yield token, logits.float().softmax(-1)
    watched = []        # generate appends the logits (1, V), then yields the token chosen from them
    for [token] in model.generate(ids, max_new_tokens, watch=watched.append, **options):
        yield token.item(), watched.pop()[0].softmax(-1)
        if token == eot_token:
            break


# ================================================================================== plumbing
# You can stop here on a first reading. Below: showing probabilities, loading models, export, flags.

def show_probs(model, tokenizer, prompt, max_new_tokens, **options):
    """Prints a line for each token but the first: its probability and its three likeliest rivals."""
    def shown(token):
        return repr(token_text(tokenizer, token))

    note("probability, token, its likeliest rivals; > marks new tokens")
    ids = encode_prompt(tokenizer, prompt)
    n_prompt = min(len(ids), model.config.block_size)
    for i, (token, row) in enumerate(
            token_probabilities(model, ids, max_new_tokens, tokenizer.eot_token, **options), start=1):
        rivals = [rival for rival in row.topk(min(4, len(row))).indices.tolist() if rival != token][:3]
        line = f"{'>' if i >= n_prompt else ' '} {row[token]:6.1%}  {shown(token):16}"
        if in_colour():
            colour = 32 if row[token] >= 0.5 else 33 if row[token] >= 0.1 else 31       # green, yellow, red
            line = f"\033[{colour}m{line}\033[0m"
        print(line, "  ".join(f"{shown(rival)} {row[rival]:.1%}" for rival in rivals), flush=True)


def print_samples(model, tokenizer, prompt, num_samples, seed, **options):
    """Prints samples as they are generated, each with the next seed."""
    for i in range(num_samples):
        if num_samples > 1:
            print(f"--- sample {i + 1} ---")
        print(prompt, end="", flush=True)
        try:
            for text in complete(model, tokenizer, prompt, seed=seed + i, **options):
                print(text, end="", flush=True)
        finally:
            print()


def load_model(source):
    """Returns a model on the CPU, and its tokenizer's name and vocabulary. The source is a checkpoint or
    folder of train.py, or what GPT.from_pretrained takes. Raises ModelError or UserError."""
    source = newest_checkpoint(source) or source
    if os.path.isfile(source) or str(source).endswith(".pt"):
        model, meta = load_checkpoint(source)
        if "data" not in meta:
            raise UserError(f"{source} cannot be used: it is not from train.py")
        tokenizer = meta["data"]["tokenizer"], meta["data"]["vocabulary"]
    elif "/" in str(source) and not os.path.exists(source) and Path(source).parent.is_dir():
        raise UserError(f"there is no {source}: run train.py first, or pass a file or folder that exists")
    elif os.path.isdir(source) and not Path(source, "config.json").exists():
        raise UserError(f"{source} has no last.pt, and no model in Hugging Face's format: wait until "
                        "train.py has saved one, or pass another file or folder")
    else:
        model, tokenizer = GPT.from_pretrained(source), ("gpt2", "")
        if (exported := Path(source, "vocabulary.tiktoken")).exists():
            tokenizer = read_vocabulary(exported)
        elif has_other_tokenizer(source):
            raise UserError(f"{source} has a tokenizer of its own: only models with GPT-2's can be used")
    ours, theirs = get_tokenizer(*tokenizer).n_vocab, model.config.vocab_size
    if ours != theirs:
        raise UserError(f"{source} has {theirs:,} tokens, but the tokenizer {tokenizer[0]} has {ours:,}: "
                        "only models with GPT-2's tokenizer, or one from prepare.py, can be used")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{source} cannot be used: its run diverged (it has weights that are not finite)")
    return model, tokenizer


def read_vocabulary(path):
    """Returns the name and vocabulary of a tokenizer that `export` wrote, or raises UserError."""
    with suppress(ValueError):
        text = path.read_text(encoding="ascii")
        ranks = tokenizer_arguments("bpe", text)["mergeable_ranks"]
        if [*ranks.values()] == [*range(len(ranks))]:
            return ("bpe", text) if text else ("bytes", "")
    raise UserError(f"{path} is damaged: export the model again")


def has_other_tokenizer(source):
    """Whether a model in Hugging Face's format comes with a tokenizer, and it is not GPT-2's."""
    from transformers import AutoTokenizer
    text = "Wörld 12"
    with suppress(Exception):       # it has none, or one that needs other packages
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False).encode(text)
        return found not in ([], get_tokenizer("gpt2").encode(text))


def export(model, tokenizer, folder):
    """Writes a folder that transformers.pipeline("text-generation", folder) can use. Needs transformers.
    If that fails, raises ModelError and leaves no such folder."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    arguments, parent = tokenizer_arguments(*tokenizer), Path(folder).absolute().parent
    [end] = arguments["special_tokens"]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            # A new path for the vocabulary, because tiktoken caches files by their paths.
            new, path = Path(temporary, "new"), Path(temporary, "vocabulary")
            path.write_text(vocabulary_text(arguments["mergeable_ranks"]))
            converter = TikTokenConverter(str(path), arguments["pat_str"], extra_special_tokens=[end])
            model.save_pretrained(new)
            PreTrainedTokenizerFast(
                tokenizer_object=converter.converted(), bos_token=end, eos_token=end, unk_token=end,
                model_max_length=model.config.block_size).save_pretrained(new)
            if tokenizer[0] != "gpt2":      # load_model looks for it; it is empty for bytes
                (new / "vocabulary.tiktoken").write_text(tokenizer[1])
            os.rename(new, folder)
    except Exception as error:      # the libraries have exceptions of their own
        raise ModelError(f"cannot write {folder} ({error})") from error


def newest_checkpoint(*folders):
    """Returns a checkpoint of the newest run in these folders (its best.pt, or else last.pt), or None."""
    runs = {path.parent: path for name in ("last.pt", "best.pt") for folder in folders
            if (path := Path(folder, name)).exists()}
    return max(runs.values(), default=None, key=lambda path: max(
        file.stat().st_mtime for file in path.parent.glob("*.pt") if file.exists()))      # not broken links


def parse_args(argv):
    parser = Parser(description="Continue a prompt with a trained model.")
    add = parser.add_argument
    add("--prompt", default="", help="the text to continue, better without a trailing space (default: start "
        "a new document)")
    add("--checkpoint", help="a file or folder that train.py wrote, a folder with a GPT-2 in Hugging Face's "
        "format, or its name on their hub, such as gpt2-xl (default: the newest run in out/)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--num_samples", type=positive_int, default=1, help="how many to print (default: 1)")
    output.add_argument("--show_probs", action="store_true", help="print each token on a line (> marks new "
                        "ones), with its probability and its likeliest rivals")
    output.add_argument("--export", metavar="FOLDER",
                        help="write the model and its tokenizer for Hugging Face's transformers, and exit")
    add("--max_new_tokens", type=positive_int, default=200, help="maximum number of tokens in a continuation")
    add("--temperature", type=at_least_0, default=0.8,
        help="0: always the likeliest token; 1: the model's own probabilities; above: more varied")
    add("--top_k", type=positive_int, default=50, help="sample only from this many of the likeliest tokens")
    add("--top_p", type=checked(float, lambda p: 0 < p <= 1, "a number above 0, at most 1"), default=1.0,
        help="sample only from the fewest tokens whose probabilities reach this")
    add("--seed", type=seed_int, default=1337, help="of the first sample; the others use the next seeds")
    add("--dtype", choices=DTYPES, help="of matmuls and weights (default: the fastest; on mps, float32)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, otherwise cpu)")
    return parser.parse_args(argv)


@one_line_errors(ModelError, out_of_memory="choose a smaller --checkpoint")
def main(argv=None):
    args = parse_args(argv)
    on_ending_signals()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    checkpoint = args.checkpoint or newest_checkpoint(*Path("out").glob("*"))
    if not checkpoint:
        raise UserError("there is no checkpoint in out/: run train.py first, or pass one with --checkpoint")
    if not args.checkpoint:
        note(f"sampling from {checkpoint}")
    model, tokenizer = load_model(checkpoint)
    if args.export and os.path.exists(args.export):
        raise UserError(f"{args.export} already exists: choose another folder")
    if args.export:
        export(model, tokenizer, args.export)
        print(f"wrote {args.export}")
        return
    tokenizer = get_tokenizer(*tokenizer)
    length, block_size = len(encode_prompt(tokenizer, args.prompt)), model.config.block_size
    if length > block_size:
        note(f"the prompt has {length:,} tokens: the model sees at most the last {block_size:,}")
    model = model.to(device, dtype)
    if not model(torch.zeros(1, 1, dtype=torch.int64, device=device)).isfinite().all():
        raise UserError("the model's logits are not finite: its run diverged, or try --dtype float32")
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    if args.show_probs:
        generator = torch.Generator(device).manual_seed(args.seed)
        show_probs(model, tokenizer, args.prompt, generator=generator, **options)
    else:
        print_samples(model, tokenizer, args.prompt, args.num_samples, args.seed, **options)


if __name__ == "__main__":
    main()
