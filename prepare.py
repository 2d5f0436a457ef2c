"""Text to tokens: encodes documents on all cores and writes data/NAME/{train.bin, val.bin, meta.json}.

    python prepare.py                                   this Python's standard library, as bytes
    python prepare.py books/ more.txt --name books      text files, with GPT-2's tokenizer
    python prepare.py crawl.jsonl.gz --sample_size 100_000
    python prepare.py shakespeare                       a text that is downloaded first
    python prepare.py hf:OWNER/NAME                     a data set of Hugging Face's hub

A .txt file is one document; a .jsonl file has one per line, under "text". Both may be compressed (.gz). A
.parquet file has one per row, as has a data set of the hub. A folder stands for all such files below it.

train.bin and val.bin are raw little-endian uint16 ids without a header: the documents one after the other,
each followed by <|endoftext|>. The last --val_fraction of all ids is val.bin. meta.json describes them and is
written last: a folder that has one is complete.

Here, too: load_tokens, which reads these files, the tokenizers, and the helpers for command lines that all
programs share. Left out: shuffling (train.py shuffles as it reads), cleaning, deduplication.
"""

import argparse
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken

TOKENIZERS = {"gpt2": 50257, "bytes": 257}      # and how many ids each has
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
NAMED_SOURCES = {
    "fineweb": "hf:eliplutchok/fineweb-small-sample",
    "tinystories": "hf:roneneldan/TinyStories",
    "shakespeare":
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}
SHA256 = {      # of files whose content is known
    NAMED_SOURCES["shakespeare"]: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
FORMAT = 1                      # version of the files
ID = np.dtype("<u2")            # an id on disk: little-endian uint16
CHUNK = 2 ** 20                 # how many bytes are read, or characters encoded, at a time


class UserError(ValueError):
    """A mistake of the user's. The message says in one line what is wrong and what to do."""


# ------------------------------------------------------------------------------------------- tokenizers

def get_tokenizer(name):
    """Returns a tiktoken.Encoding: "gpt2" (50,257 ids; tiktoken downloads it once) or "bytes" (256 bytes and
    <|endoftext|>). Raises UserError for any other name, or if the download fails."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256})
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer {name!r}, only {' and '.join(TOKENIZERS)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:      # no connection, or not the bytes that tiktoken expects
        raise UserError(f"the vocabulary of {name} could not be downloaded: set TIKTOKEN_CACHE_DIR to a "
                        "folder that has it, or use --tokenizer bytes, which needs no download") from error


def encode_with_own(tokenizer):
    """Returns a function like encode, to be called from several threads. Each uses its own copy of the
    tokenizer: threads that share one wait for each other, and take a quarter longer."""
    own = threading.local()

    def encode_pieces(pieces):
        if not hasattr(own, "tokenizer"):
            own.tokenizer = tiktoken.Encoding(
                tokenizer.name, pat_str=tokenizer._pat_str, mergeable_ranks=tokenizer._mergeable_ranks,
                special_tokens=tokenizer._special_tokens)
        return encode(own.tokenizer, pieces)
    return encode_pieces


def encode(tokenizer, pieces):
    """Encodes a list of (text, whether the document ends here). Returns the ids, uint16."""
    to_ids = partial(tokenizer.encode_to_numpy, disallowed_special=())      # <|endoftext|> in a text is text
    ids = []
    for text, ends_document in pieces:
        try:
            ids.append(to_ids(text))
        except UnicodeEncodeError:      # JSON may contain half a surrogate pair, which is not a character
            ids.append(to_ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")))
        if ends_document:
            ids.append(np.array([tokenizer.eot_token], ID))
    return np.concatenate(ids, dtype=ID)


# -------------------------------------------------------------------------------------------- documents

def find_files(source, folder):
    """Returns the files that a SOURCE stands for, sorted; one that has to be downloaded is put into the
    folder. A data set of the hub is returned as it is: a string. Raises UserError if there are none."""
    source = str(NAMED_SOURCES.get(source, source))
    path = Path(source)
    if source.startswith("hf:"):
        return [source]
    if source.startswith(("https://", "http://")):
        return [download(source, folder)]
    if source == "python":
        root = Path(sysconfig.get_path("stdlib"))
        # Neither installed packages, nor tests, nor the tables of characters in encodings.
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
        return sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_text(file) and file.is_file()
                       and not any(part.startswith(".") for part in file.relative_to(path).parts))
        if not files:
            raise UserError(f"{source} contains no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise UserError(f"there is no {source}: a SOURCE is a file, a folder, an https:// address, "
                        f"hf:OWNER/NAME, python, {' or '.join(NAMED_SOURCES)}")
    if not is_text(path):
        raise UserError(f"{source} must end in one of {', '.join(SUFFIXES)}, which says how to read it")
    return [path]


def is_text(path):
    return path.name.lower().endswith(SUFFIXES)


def download(address, folder):
    """Downloads a file into a folder and returns its path. Raises UserError if it does not come whole."""
    name = os.path.basename(address.partition("?")[0])
    if not is_text(Path(name)):
        raise UserError(f"{address} must end in one of {', '.join(SUFFIXES)}, which says how to read it")
    path = Path(tempfile.mkdtemp(dir=folder), name)
    print(f"downloading {address}", file=sys.stderr)
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(path, "wb") as file:
            shutil.copyfileobj(response, file)
            expected = int(response.headers.get("Content-Length", file.tell()))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{address} could not be downloaded ({error}): try again, or download it in another "
                        "way and give the file") from error
    if path.stat().st_size != expected:
        raise UserError(f"the download of {address} was cut short: {path.stat().st_size:,} of {expected:,} "
                        "bytes came; try again")
    if address in SHA256 and hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[address]:
        raise UserError(f"{address} is not the file it was: download it yourself and give the file, if you "
                        "trust it")
    return path


def read_pieces(files, progress):
    """Yields (text, whether the document ends here), in order, with little of a file in memory at a time."""
    for path in files:
        if is_table(path):
            for text in read_table(path):
                yield text, True
                progress.advance(0, True)
            continue
        name = path.name.lower()
        read = read_jsonl if name.removesuffix(".gz").endswith(".jsonl") else read_text
        with open(path, "rb") as raw:
            file = gzip.open(raw) if name.endswith(".gz") else raw
            try:
                for text, ends_document in read(file, path):
                    yield text, ends_document
                    progress.advance(raw.tell(), ends_document)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is damaged or not a gzip file ({error})") from error
        progress.finish_file(path)


def read_text(file, path):
    text, rest = io.TextIOWrapper(file, "utf-8-sig", newline=""), ""        # without a byte order mark
    try:
        while block := text.read(CHUNK):
            block = rest + block
            cut = last_cut(block)
            yield block[:cut], False
            rest = block[cut:]
    except UnicodeDecodeError as error:
        raise not_utf8(path, file.tell() - len(error.object) + error.start) from error
    if file.tell():
        yield rest, True


def last_cut(text):
    """Returns the last position at which text can be cut in two without changing its GPT-2 ids: between
    anything but white space and a space or newline, where the tokenizer always ends a word. If there is no
    such position, returns the end, where the ids may then differ."""
    places = range(len(text) - 1, 0, -1)
    return next((i for i in places if text[i] in " \n" and not text[i - 1].isspace()), len(text))


def read_jsonl(file, path):
    offset = 0
    for line_number, line in enumerate(file, start=1):
        try:
            text = json.loads(line.decode("utf-8").lstrip("\ufeff"))["text"] if line.strip() else ""
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line_number} is not JSON") from error
        except (KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {line_number} has no "text": lines must be like {{"text": "..."}}')
        if text:
            yield text, True
        offset += len(line)


def is_table(file):
    """Whether the package datasets reads it: a parquet file, or a data set of the hub."""
    return isinstance(file, str) or file.name.lower().endswith(".parquet")


def read_table(file):
    from datasets import load_dataset
    try:
        if isinstance(file, str):
            name, _, subset = file.removeprefix("hf:").partition(":")
            rows = load_dataset(name, subset or None, split="train", streaming=True)
        else:
            rows = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        for row_number, row in enumerate(rows, start=1):
            if not isinstance(row.get("text"), str):
                raise UserError(f'{file}, row {row_number} has no "text", only {", ".join(row)}')
            if row["text"]:
                yield row["text"]
    except UserError:
        raise
    except Exception as error:      # whatever else goes wrong in the library
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def not_utf8(path, offset):
    return UserError(f"{path} is not UTF-8 at byte {offset:,}: convert the file, or leave it out")


def first_documents(pieces, limit):
    for text, ends_document in pieces:
        yield text, ends_document
        limit -= ends_document
        if limit == 0:
            return


# ------------------------------------------------------------------------------------------ token files

def prepare(sources, folder, tokenizer_name, sample_size=None, val_fraction=0.1, workers=None):
    """Encodes the first sample_size documents of the sources (None: all) into a folder and returns its meta.
    The result does not depend on workers, the number of threads (None: one per core). Raises UserError if
    something is wrong with a source; the folder is then left as it was."""
    tokenizer = get_tokenizer(tokenizer_name)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.tmp") as temporary:
        files = [file for source in sources for file in find_files(source, temporary)]
        progress = Progress(files, sample_size)
        pieces = read_pieces(files, progress)
        if sample_size is not None:
            pieces = first_documents(pieces, sample_size)
        train, val, meta_json = (Path(temporary, name) for name in ("train.bin", "val.bin", "meta.json"))
        with open(train, "wb") as file, closing(progress):
            for ids in in_order(encode_with_own(tokenizer), batches(pieces), workers):
                file.write(ids.tobytes())
        move_tail(train, val, int(train.stat().st_size // ID.itemsize * (1 - val_fraction)))
        meta = {"format": FORMAT, "tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab,
                "train": statistics(train, tokenizer, workers), "val": statistics(val, tokenizer, workers)}
        if not meta["train"]["tokens"] + meta["val"]["tokens"]:
            raise UserError(f"there is no text in {', '.join(sources)}")
        meta_json.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for path in (train, val, meta_json):
            os.replace(path, folder / path.name)
    return meta


def batches(pieces):
    """Groups pieces into lists of about CHUNK characters, so that short documents, too, keep a core busy."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_order(function, items, workers):
    """Like map(function, items), but on several threads, and items are read only a few ahead. Threads do use
    all cores: tiktoken releases Python's global lock while it encodes."""
    workers = workers or os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def move_tail(path, tail_path, n_ids):
    """Moves all but the first n_ids of a token file to another file."""
    with open(path, "rb+") as file, open(tail_path, "wb") as tail:
        file.seek(n_ids * ID.itemsize)
        shutil.copyfileobj(file, tail)
        file.truncate(n_ids * ID.itemsize)


def statistics(path, tokenizer, workers):
    """Counts the documents that end in a token file, the bytes of text that it encodes, and its ids. CRC-32
    tells files apart that have the same counts."""
    bytes_of = np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    bytes_of[tokenizer.eot_token] = 0
    times, crc32 = np.zeros(tokenizer.n_vocab, dtype=np.int64), 0

    def count_ids(start):
        ids = np.fromfile(path, ID, CHUNK, offset=start)
        return ids, np.bincount(ids, minlength=tokenizer.n_vocab)

    for ids, counts in in_order(count_ids, range(0, path.stat().st_size, CHUNK * ID.itemsize), workers):
        times += counts
        crc32 = zlib.crc32(ids, crc32)
    return {"documents": int(times[tokenizer.eot_token]), "bytes": int(times @ bytes_of),
            "tokens": int(times.sum()), "crc32": crc32}


def load_meta(folder):
    """Returns the meta.json of a data folder, a dictionary. Raises UserError if it is missing or damaged."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(f"{folder} contains no prepared data (no meta.json): run prepare.py first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        numbers = [meta["vocab_size"], *(meta[split][unit] for split in ("train", "val")
                                         for unit in ("documents", "bytes", "tokens"))]
        whole = (meta["format"] == FORMAT and meta["vocab_size"] == TOKENIZERS[meta["tokenizer"]]
                 and all(type(n) is int and n >= 0 for n in numbers))
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged, half-written, or of another version: run prepare.py again")
    return meta


def load_tokens(folder, split):
    """Returns the ids of a data folder's "train" or "val" split: a read-only uint16 array that is mapped into
    memory, not read. Raises UserError if the file is not as long as meta.json says."""
    path = Path(folder, f"{split}.bin")
    expected = load_meta(folder)[split]["tokens"] * ID.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, but meta.json says {expected:,}: run prepare.py again")
    return np.memmap(path, ID, mode="r") if size else np.empty(0, ID)


# ---------------------------------------------------------------------------------------- command lines

class Parser(argparse.ArgumentParser):
    """argparse, but the help shows each default, and a mistake takes one line."""

    def __init__(self, **options):
        super().__init__(**options)
        with suppress(AttributeError):      # in a notebook, stdout is of another kind
            sys.stdout.reconfigure(errors="replace")        # for consoles that do not know all characters

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")


def number(kind, fits, description):
    """Makes a type for add_argument: an int or float for which fits(value) holds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}")
        return value
    return parse


count = number(int, lambda n: 1 <= n < 2 ** 31, "a whole number above 0 and below 2^31")
positive = number(float, lambda x: 0 < x < float("inf"), "a number above 0")
seed_number = number(int, lambda n: 0 <= n < 2 ** 32, "a whole number from 0 to 2^32 - 1")


@contextmanager
def one_line_errors(*kinds):
    """Ends the program on an exception of these kinds, or if an optional package is not installed, with one
    line and exit status 2, on Ctrl-C with 130."""
    try:
        yield
    except (*kinds, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            message = f"this needs the package {package}: pip install {package}"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)       # one line, whatever it quotes
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def duration(seconds):
    """75 -> "1m15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Progress:
    """Reports how much has been read: on a terminal in one changing line, else a line every ten seconds."""

    def __init__(self, files, sample_size):
        self.sample_size = sample_size
        # How much of a table has been read cannot be told.
        self.total = float("inf") if any(map(is_table, files)) else sum(path.stat().st_size for path in files)
        self.finished = self.documents = 0
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.perf_counter()

    def advance(self, position, ends_document):
        """Notes that the reader is at this byte of the current file, and whether a document has ended."""
        self.documents += ends_document
        now = time.perf_counter()
        if now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown = now
        read, seconds = self.finished + position, now - self.started
        done = max(read / self.total, self.documents / self.sample_size if self.sample_size else 0)
        line = f"{self.documents:,} documents"
        if read:
            line += f" | {read / 1e6 / seconds:.1f} MB/s"
        if done:
            line = f"{done:4.0%} | {line} | {duration(seconds / done - seconds)} left"
        print(f"\r{line}\033[K" if self.terminal else f"{line}\n", end="", file=sys.stderr, flush=True)

    def finish_file(self, path):
        self.finished += path.stat().st_size

    def close(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------- main

def default_name(source):
    """books/ -> books, crawl.jsonl.gz -> crawl, hf:owner/name -> name"""
    if "://" in source:
        source = source.partition("?")[0]
    name = os.path.basename(os.path.abspath(source.removeprefix("hf:"))).replace(":", "-")
    for suffix in (".gz", ".txt", ".jsonl", ".parquet"):
        name = name.removesuffix(suffix)
    return name or "text"


def main(argv=None):
    parser = Parser(description="Turn text into the token files that train.py reads.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help=f"files ({', '.join(SUFFIXES)}), folders, https:// addresses, hf:OWNER/NAME or "
                        "hf:OWNER/NAME:SUBSET for a data set of Hugging Face's hub with a column text, "
                        f"{', '.join(NAMED_SOURCES)}, or python: this Python's standard library (default: "
                        "python)")
    parser.add_argument("--name", help="the folder to write is data/NAME (default: the first SOURCE's name)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="(default: bytes for python, otherwise gpt2)")
    parser.add_argument("--sample_size", type=count, metavar="N", help="take only the first N documents")
    parser.add_argument("--val_fraction", type=number(float, lambda x: 0 < x < 1, "above 0 and below 1"),
                        default=0.1, help="share of the ids, at the end, that is kept for validation")
    args = parser.parse_args(argv)

    sources = args.sources or ["python"]
    folder = Path("data", args.name or default_name(sources[0]))
    tokenizer_name = args.tokenizer or ("bytes" if sources == ["python"] else "gpt2")
    started = time.perf_counter()
    with one_line_errors(UserError, OSError):
        meta = prepare(sources, folder, tokenizer_name, args.sample_size, args.val_fraction)
    seconds = time.perf_counter() - started
    documents, tokens = (meta["train"][unit] + meta["val"][unit] for unit in ("documents", "tokens"))
    print(f"{folder}: {documents:,} documents, {meta['train']['tokens']:,} ids for training and "
          f"{meta['val']['tokens']:,} for validation, tokenizer {tokenizer_name}")
    print(f"{duration(seconds)}, {tokens / seconds:,.0f} ids/s")


if __name__ == "__main__":
    main()
