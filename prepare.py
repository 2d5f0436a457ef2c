"""Text to tokens: writes train.bin, val.bin, vocabulary.tiktoken and meta.json to data/NAME, for train.py.

    python prepare.py                                   this Python's standard library
    python prepare.py books/ more.txt --name books      text files, with GPT-2's tokenizer
    python prepare.py crawl.jsonl.gz --sample_size 100_000
    python prepare.py shakespeare --tokenizer bpe       downloads the text first, then learns a vocabulary

A model computes with numbers, so text is split into parts called tokens, and each token has a number. With
the tokenizer "bytes", each byte is a token. "gpt2" has 50,257 tokens, most of them words or parts of words.
"bpe" learns such a vocabulary from the text itself (roughly, from the part that is for training).

train.bin and val.bin are raw little-endian uint16 tokens without a header: all documents, one after another,
each followed by the token <|endoftext|>. By default, the last tenth of the tokens goes to val.bin (which may
cut a document in two) and is never trained on. A document is a .txt file, a line of .jsonl, a row of .parquet
or a .py file of Python's library. A literal <|endoftext|> in a text also ends a document.

Left out: shuffling (train.py shuffles as it reads), cleaning, deduplication.
"""

import argparse
import base64
import gzip
import http.client
import io
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, cycle, islice
from pathlib import Path

import filelock
import numpy as np
import regex
import tiktoken
import tiktoken_ext.openai_public

TOKEN_DTYPE = np.dtype("<u2")       # of a token on disk: little-endian uint16


# --------------------------------------------------------------------------------- tokenizers

def learn_vocabulary(word_counts, max_tokens):
    """Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). word_counts maps each word
    (bytes) to how often it occurs. Returns the tokens, a list of bytes; a token's number is its index.

    The first 256 tokens are the single bytes. Then the most frequent pair of neighbours becomes a new token
    and is merged everywhere (ties go to the pair with the lowest numbers), and so on, until there are
    max_tokens or no pair occurs twice. With the words low, lower and slow, once each:

        l o w     l o w e r     s l o w         the pair l o occurs 3 times
        lo w      lo w e r      s lo w          the pair lo w occurs 3 times
        low       low e r       s low           no pair occurs twice

    This is greedy: it merges what is most frequent now. Other merges might shorten the text more in the end,
    but there are too many to try.

    Text is cut into words first, and no token spans two words. Otherwise common phrases such as " of the"
    would use up tokens. This also saves time: a word that occurs a million times is merged once.

    Still, this takes minutes: the program uses learn_vocabulary_fast, below, which makes the same merges."""
    # Here a word is a string in which chr(n) stands for token n (latin-1 does that for bytes), so that
    # word.replace(pair, new) merges a pair. b"hello" is "hello" at first, and "heĬo" once "ll" is token 300.
    words = {word.decode("latin-1"): count for word, count in word_counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < max_tokens:
        pair_counts = Counter()
        for word, count in words.items():
            for pair in pairs(word):
                pair_counts[pair] += count
        # The highest count, then the lowest numbers; "", with a count of 0, if no pair is left.
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair), default="")
        if pair_counts[best] < 2:
            break
        new = chr(len(tokens))
        tokens.append(tokens[ord(best[0])] + tokens[ord(best[1])])
        words = {word.replace(best, new): count for word, count in words.items()}
    return tokens


def pairs(word):
    """pairs("abcd") -> ["ab", "bc", "cd"]"""
    return [word[i:i + 2] for i in range(len(word) - 1)]


# What a word is for "bpe": regex.findall(WORD, "def f(x):") gives "def", " f", "(x", "):". Marks (\p{M}) stay
# with their letters (\p{L}), as Hindi, Thai and Tamil write many vowels as marks. docs/benchmarks.md compares
# this pattern with others.
WORD = "|".join([
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",      # letters, after a space or one symbol: " dog", "(x"
    r" ?\p{N}{1,3}",                              # up to three digits
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",            # symbols, and newlines after them: "):\n"
    r"\s+(?!\S)",                                 # white space, except the last space before a word
    r"\s+",                                       # the rest: "\n" in "a\nb"
])


def count_words(texts):
    """Returns how often each word (bytes) occurs in these texts."""
    word_counts = Counter()
    for text in texts:
        word_counts.update(regex.findall(WORD, text))
    return {word.encode(): count for word, count in word_counts.items()}


def tokenizer_arguments(name, vocabulary=""):
    """Returns the arguments of tiktoken.Encoding, OpenAI's fast encoder, for "gpt2", "bytes" or "bpe". For
    "bpe", vocabulary is text in tiktoken's format: a line per token, with its bytes in base 64 and its rank.

    pat_str is the regular expression that splits text into words (for "bytes", into characters). A token's
    rank is its number. To encode a word, tiktoken starts with its bytes. It keeps merging two neighbours that
    together are a token, lowest rank first: as in learning, the most frequent pairs first. So "slower"
    becomes s l o w e r, s lo w e r, s low e r. special_tokens are matched whole, before all that."""
    if name == "gpt2":
        return gpt2_arguments()
    ranks = {bytes([i]): i for i in range(256)}
    for line in vocabulary.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return {"name": name, "pat_str": WORD if name == "bpe" else r"[\s\S]", "mergeable_ranks": ranks,
            "special_tokens": {"<|endoftext|>": len(ranks)}}


@lru_cache(maxsize=1)
def get_tokenizer(name, vocabulary=""):
    """Returns a tiktoken.Encoding. Downloads the vocabulary of "gpt2" once, or raises UserError."""
    return tiktoken.Encoding(**tokenizer_arguments(name, vocabulary))


def encode(tokenizer, pieces):
    """Encodes pieces of text and returns the tokens, uint16. A piece is (text, whether it ends a document): a
    long file is split into several. encode_all calls this in several threads."""
    tokens = []
    for text, ends_document in pieces:
        # "all": a literal <|endoftext|> in the text becomes that token, and so ends a document, too.
        tokens.append(tokenizer.encode_to_numpy(text, allowed_special="all"))
        if ends_document:
            tokens.append(np.array([tokenizer.eot_token], TOKEN_DTYPE))
    return np.concatenate(tokens, dtype=TOKEN_DTYPE)


# -------------------------------------------------------------------------------- token files

def prepare(sources, folder, tokenizer_name, vocab_size=2048, sample_size=None, val_fraction=0.1):
    """Encodes the first sample_size files or rows of the sources (None: all) into a folder; returns its meta.
    tokenizer_name is "gpt2", "bytes", "bpe" (learns a vocabulary) or another data folder (uses that one's).
    If a source is bad, raises UserError and leaves the folder unchanged. Helpers not above are plumbing."""
    with new_folder(Path(folder)) as new:
        files = [file for source in sources for file in find_files(source, new)]
        pieces = read_pieces(files, sample_size)
        # For "bpe", this counts the words of the first pieces, learns from them, and puts them back in front.
        name, vocabulary, pieces = choose_tokenizer(tokenizer_name, vocab_size, pieces, val_fraction)
        with open(new / "train.bin", "wb") as file:
            file.writelines(encode_all(pieces, tokenizer_arguments(name, vocabulary)))      # uint16 arrays
            n_tokens = file.tell() // TOKEN_DTYPE.itemsize
        if not n_tokens:
            raise UserError(f"there is no text in {', '.join(map(str, sources))}")
        # All tokens are in train.bin now: move the last of them to val.bin.
        n_train = int(n_tokens * (1 - val_fraction))
        with open(new / "val.bin", "wb") as file:       # not tofile, which overlooks a full disk
            file.write(np.memmap(new / "train.bin", TOKEN_DTYPE, mode="r")[n_train:])
        os.truncate(new / "train.bin", n_train * TOKEN_DTYPE.itemsize)
        (new / "vocabulary.tiktoken").write_bytes(vocabulary.encode())
        tokenizer = get_tokenizer(name, vocabulary)
        meta = {"format": FORMAT, "tokenizer": name, "vocab_size": tokenizer.n_vocab}
        for split in ("train", "val"):
            meta[split] = statistics(new / f"{split}.bin", tokenizer)
        write_meta(new, meta)
    return load_meta(folder)


def load_tokens(folder, split):
    """Returns a data folder's "train" or "val" split: a read-only uint16 array, memory-mapped rather than
    loaded. Raises UserError if the file is not as long as meta.json says."""
    path = Path(folder, f"{split}.bin")
    expected = load_meta(folder)[split]["tokens"] * TOKEN_DTYPE.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, but meta.json says {expected:,}: run prepare.py again")
    return np.memmap(path, TOKEN_DTYPE, mode="r") if size else np.empty(0, TOKEN_DTYPE)


# ================================================================================== plumbing
# You can stop here on a first reading. Below: where text comes from, its formats, the data folder, and what
# the command lines of all three programs share.

class UserError(ValueError):
    """A user's mistake, or a failed download. The message says in one line what is wrong or how to fix it."""


@lru_cache(maxsize=1)
def gpt2_arguments():
    try:
        return tiktoken_ext.openai_public.gpt2()
    except (OSError, ValueError) as error:      # no connection, or not the bytes that tiktoken expects
        raise UserError("the vocabulary of gpt2 could not be downloaded: set TIKTOKEN_CACHE_DIR to a folder "
                        "that has it, or use --tokenizer bpe in prepare.py, which needs none") from error


def choose_tokenizer(name, vocab_size, pieces, val_fraction):
    """Returns the name and the vocabulary of a tokenizer, and an iterator over the same pieces."""
    if name in ("gpt2", "bytes"):
        return name, "", pieces
    if name != "bpe":       # another data folder
        meta = load_meta(name)
        return meta["tokenizer"], meta["vocabulary"], pieces
    first, size = [], 0
    for piece in pieces:
        first.append(piece)
        size += len(piece[0])
        if size >= LEARN_FROM:
            break
    texts, left = [], size * (1 - val_fraction)     # roughly the part that is for training
    if size >= LEARN_FROM:
        note(f"learning the vocabulary from the first {left:,.0f} characters")
    for text, _ in first:
        texts.append(text[:math.ceil(left)])
        left = max(0, left - len(text))
    words = Counter()       # very long ones, as in DNA, in pieces: each merge rescans the whole word
    for word, count in count_words(texts).items():
        length = 16 if len(word) > 100 else len(word)
        for i in range(0, len(word), length):
            words[word[i:i + length]] += count
    tokens = learn_vocabulary_fast(dict(words.most_common(LEARN_FROM_WORDS)), vocab_size - 1)
    if first and len(tokens) < vocab_size - 1:
        note(f"no pair is left that occurs twice: the vocabulary has only {len(tokens) + 1:,} tokens")
    return name, vocabulary_text({token: i for i, token in enumerate(tokens)}), chain(first, pieces)


def learn_vocabulary_fast(word_counts, max_tokens):
    """The same as learn_vocabulary, but counts all pairs only once, and after each merge corrects the counts
    where it changed a word: for Python's standard library, that takes seconds instead of minutes."""
    # words[i] occurs counts[i] times, and words_with[pair] has the i of every word that contains the pair.
    words, counts = [word.decode("latin-1") for word in word_counts], list(word_counts.values())
    pair_counts, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairs(word):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)       # heappop then quickly finds the smallest entry, which is the most frequent pair
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < max_tokens and heap and heap[0][0] < -1:        # while some pair occurs twice
        negative_count, pair = heappop(heap)
        count = pair_counts[pair]
        # A merge updates pair_counts, but not the heap, so this entry may be out of date. If so, its count is
        # too high: a merge only adds pairs with the new token, and older ones get rarer. Correct the count.
        if -negative_count > count:
            heappush(heap, (-count, pair))
            continue
        new, new_pairs = chr(len(tokens)), set()
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for i in words_with.pop(pair):
            if pair not in words[i]:        # an earlier merge took one of its tokens
                continue
            # Only this stretch changes: from one token before the first pair (of two) to one after the last.
            first, last = words[i].find(pair), words[i].rfind(pair)
            stretch = words[i][max(0, first - 1):last + 3]
            words[i] = words[i].replace(pair, new)
            for old_pair in pairs(stretch):
                pair_counts[old_pair] -= counts[i]
            for new_pair in pairs(stretch.replace(pair, new)):
                pair_counts[new_pair] += counts[i]
                if new in new_pair:
                    words_with[new_pair].add(i)
                    new_pairs.add(new_pair)
        for new_pair in new_pairs:
            heappush(heap, (-pair_counts[new_pair], new_pair))
    return tokens


def vocabulary_text(ranks):
    """Returns mergeable ranks as a text in tiktoken's format, which tokenizer_arguments reads."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def encode_all(pieces, arguments):
    """Yields the tokens of all pieces, in order. Encodes in threads on at most 16 cores: tiktoken releases
    Python's global lock. Reads only a few batches ahead, so that memory does not grow with the text."""
    workers = min(16, os.cpu_count() or 1)
    # Threads that share one tokenizer run at 0.8 of the speed (on two cores). One of gpt2 takes 11 MB.
    tokenizers = [tiktoken.Encoding(**arguments) for _ in range(workers)]
    batches = iter(lambda: list(islice(pieces, 32)), [])    # until [] comes. Many short documents at once.
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for tokenizer, batch in zip(cycle(tokenizers), batches):
            pending.append(pool.submit(encode, tokenizer, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def statistics(path, tokenizer):
    """Counts the documents, bytes of text and tokens of a token file. The CRC-32 identifies its content."""
    bytes_of = np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    bytes_of[tokenizer.eot_token] = 0
    counts, crc32 = np.zeros(tokenizer.n_vocab, dtype=np.int64), 0
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            counts += np.bincount(np.frombuffer(chunk, TOKEN_DTYPE), minlength=tokenizer.n_vocab)
            crc32 = zlib.crc32(chunk, crc32)
    return {"documents": int(counts[tokenizer.eot_token]), "bytes": int(counts @ bytes_of),
            "tokens": int(counts.sum()), "crc32": crc32}


# ------------------------------------------------------------------------------------ sources

CHUNK = 2 ** 15                 # characters read from a file at a time
LEARN_FROM = 100_000_000        # learn a vocabulary from at most this many characters,
LEARN_FROM_WORDS = 200_000      # and from at most this many words of them, the most frequent
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
NAMED_SOURCES = {
    "fineweb": "hf:eliplutchok/fineweb-small-sample",
    "tinystories": "hf:roneneldan/TinyStories",
    "shakespeare":
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}


def find_files(source, folder):
    """Returns the files that a SOURCE stands for, sorted. Downloads go into the folder. A dataset on the Hub
    is returned unchanged, as a string. Raises UserError if there are none."""
    if source in ("python", *NAMED_SOURCES) and os.path.exists(source):
        note(f"{source} is a built-in source: write ./{source} for a file or folder")
    source = str(NAMED_SOURCES.get(source, source))
    if source.startswith("hf:"):
        if os.path.exists(name := source[3:].partition(":")[0]):        # which the library would read
            raise UserError(f"{name} is a file or folder here: leave out hf:, or rename it")
        return [source]
    if source == "python":
        root = Path(sysconfig.get_path("stdlib"))
        # Skip installed packages, tests, and the tables of characters in encodings.
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
        return sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
    if is_url := source.startswith(("https://", "http://")):
        files = [Path(source.partition("?")[0])]
    elif os.path.exists(source):
        files = list(walk(Path(source), set()))
    else:
        raise UserError(f"there is no {source}: a SOURCE is a file, a folder, a URL, hf:OWNER/NAME, "
                        f"{', '.join(NAMED_SOURCES)} or python")
    taken = sorted(file for file in files
                   if file.name.lower().endswith(SUFFIXES) and (is_url or file.is_file()))
    if not taken:
        raise UserError(f"{source}: no file with a known ending ({', '.join(SUFFIXES)}): rename text to .txt")
    if others := set(files) - set(taken):
        kinds = {file.suffix or "no ending" if file.exists() else "broken links" for file in others}
        note(f"{source}: files taken: {len(taken)}, skipped: {len(others)} ({', '.join(sorted(kinds))})")
    return [download(source, folder)] if is_url else taken


def walk(path, seen):
    """Yields a file, or all files in a folder and its subfolders, except hidden ones. Follows links, but
    enters no folder twice: `seen` has their real paths."""
    if not path.is_dir():
        yield path
    elif (real := path.resolve()) not in seen:
        seen.add(real)
        for entry in sorted(path.iterdir()):        # of two links to a folder, always enters the same
            if not entry.name.startswith("."):
                yield from walk(entry, seen)


def download(url, folder):
    """Downloads a file into a folder and returns its path. Raises UserError if that fails."""
    path = Path(tempfile.mkdtemp(dir=folder), os.path.basename(url.partition("?")[0]))
    note(f"downloading {url}")
    try:
        urllib.request.urlretrieve(url, path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} could not be downloaded ({error}): try again, or download it some other "
                        "way and pass the file") from error
    return path


def read_pieces(files, sample_size):
    """Yields (text, whether the document ends with it), in order, until sample_size documents have ended,
    keeping little of a file in memory. Reports progress every ten seconds."""
    n_documents, n_nulls, last = 0, 0, time.monotonic()
    for path, (text, ends_document) in ((file, piece) for file in files for piece in read_file(file)):
        if text is None:
            n_nulls += 1
        else:
            yield text, ends_document
            n_documents += ends_document
        if n_documents == sample_size:
            break
        if time.monotonic() > last + 10:
            note(f"{n_documents:,} documents, reading {path}")
            last = time.monotonic()
    if n_nulls:
        note(f"skipped {n_nulls:,} documents whose text is null")


def read_file(path):
    """Yields (text, whether the document ends here); (None, True) for a text that is null."""
    name = str(path).lower()
    if isinstance(path, str) or name.endswith(".parquet"):
        yield from read_rows(table_rows(path), f"{path}, row")
        return
    with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")     # drops a byte order mark
        is_jsonl = name.removesuffix(".gz").endswith(".jsonl")
        try:
            yield from read_rows(json_rows(text, path), f"{path}, line") if is_jsonl else read_text(text)
        except UnicodeDecodeError as error:
            offset = file.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8 at byte {offset:,}: convert it, or leave it out") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is not a whole gzip file ({error}): leave it out") from error


def read_text(file):
    """Yields a long text in pieces, cut where that does not change the tokens: before the white space that
    follows a word, where every tokenizer starts a new word. "two words" is cut into "two" and " words". If
    there is no such position, the text is cut anyway, and the tokens around the cut may differ."""
    if not (rest := file.read(CHUNK)):
        return
    while block := file.read(CHUNK):
        text = rest + block
        if found := regex.search(r"(?r)(?<=\S) |(?<=[\p{L}\p{N}])\n", text):        # (?r): from the end
            cut = found.start()
        else:       # anywhere but in <|endoftext|>, which may have begun
            mark = text.rfind("<", max(1, len(text) - 12))
            cut = mark if mark > 0 else len(text)
        yield text[:cut], False
        rest = text[cut:]
    yield rest, True


def json_rows(lines, path):
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: each line must be an object") from error


def table_rows(source):
    """Yields the rows of a parquet file, or of a dataset on the Hub. Needs pyarrow or datasets."""
    try:
        if isinstance(source, str):
            import datasets
            name, _, subset = source.removeprefix("hf:").partition(":")
            yield from datasets.load_dataset(name, subset or None, split="train", streaming=True)
        else:
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(source).iter_batches(batch_size=256, columns=["text"]):
                yield from batch.to_pylist()
    except ModuleNotFoundError:
        raise
    except Exception as error:      # whatever else goes wrong in the library
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}): check it, or leave it "
                        "out") from error


def read_rows(rows, where):
    """Yields the pieces of each row's text: none if it is empty, (None, True) if it is null."""
    for number, row in enumerate(rows, start=1):
        text = row.get("text", 0) if isinstance(row, dict) else 0
        if text is None:
            yield None, True
        elif isinstance(text, str):     # JSON may contain a lone surrogate, which is not a character
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from read_text(io.StringIO(text))
        else:
            raise UserError(f'{where} {number} has no string "text": each must look like {{"text": "..."}}')


# ---------------------------------------------------------------------------- the data folder

FORMAT = 3      # version of its files


@contextmanager
def new_folder(folder):
    """Yields a new folder inside `folder`. At the end, its files replace those in `folder`: the old
    meta.json goes first, the new one comes last. After an exception, `folder` is as it was before, or removed
    if it would be empty."""
    new = folder / ".unfinished"
    with held(folder):
        shutil.rmtree(new, ignore_errors=True)      # left by a killed process
        try:
            (new / "old").mkdir(parents=True)
            yield new
            names = ("vocabulary.tiktoken", "train.bin", "val.bin", "meta.json")
            moves = [(folder / name, new / "old" / name) for name in reversed(names)]
            moves += [(new / name, folder / name) for name in names]
            with ExitStack() as undo:
                for source, target in moves:
                    if source.exists():     # say first how to undo it: Ctrl-C may come right after it
                        undo.callback(lambda a=source, b=target: b.exists() and os.replace(b, a))
                        os.replace(source, target)
                undo.pop_all()      # all went well: nothing to undo
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if os.listdir(folder) == [".lock"]:     # nothing else was in it, or came into it
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(folder):
    """Makes a folder and locks it. The lock disappears with this process, even after a crash. Raises
    UserError if another process holds it."""
    os.makedirs(folder, exist_ok=True)
    try:
        with filelock.FileLock(Path(folder, ".lock"), timeout=0):
            yield
    except filelock.Timeout as error:
        raise UserError(f"another process is writing to {folder}: wait, or choose another folder") from error


def write_meta(folder, meta):
    vocabulary = Path(folder, "vocabulary.tiktoken").read_bytes()
    content = json.dumps({**meta, "checksum": checksum(meta, vocabulary)}, indent=2)
    Path(folder, "meta.json").write_text(content + "\n", encoding="utf-8")


def checksum(meta, vocabulary):
    return zlib.crc32(vocabulary, zlib.crc32(json.dumps(meta).encode()))


def load_meta(folder):
    """Returns the meta.json of a data folder, a dictionary, with its vocabulary. Raises UserError if it is
    missing or damaged."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(f"{path.parent.absolute()} contains no prepared data (no meta.json): run prepare.py, "
                        "or pass the right folder, such as --data data/NAME")
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        meta = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = Path(folder, "vocabulary.tiktoken").read_bytes()
        if meta.pop("checksum") == checksum(meta, vocabulary) and meta["format"] == FORMAT:
            return {**meta, "vocabulary": vocabulary.decode()}
    raise UserError(f"{folder} is damaged, half-written, or from another version: run prepare.py again")


def token_text(tokenizer, token):
    """Returns the text of one token. Bytes that form only part of a character are shown as \\xe2."""
    return tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")


def show_tokens(meta, folder):
    """Prints the first and last merges learned, and an example of text split into tokens."""
    tokenizer = get_tokenizer(meta["tokenizer"], meta["vocabulary"])

    def texts(tokens):
        return [token_text(tokenizer, token) for token in tokens if token != tokenizer.eot_token]

    if meta["tokenizer"] == "bpe":
        merges = [repr(text) for text in texts(range(256, tokenizer.eot_token))]
        print("first merges:", *merges[:16])
        print("last merges:", *merges[-16:])
    print("the first tokens for validation:")
    split = texts(load_tokens(folder, "val")[:100])
    coloured = "".join(f"\033[{44 + i % 2}m{text}" for i, text in enumerate(split)) + "\033[0m"
    print(coloured if in_colour() else "|".join(split))


# ------------------------------------------------------------------------------ command lines

class Parser(argparse.ArgumentParser):
    """argparse, but the help shows each default, and errors take one line."""

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, "", argparse.SUPPRESS):
            options["help"] = options.get("help", "") + " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "" and name != "prompt":        # a variable that the shell does not know
                self.error(f"argument --{name}: expected a value, not an empty text")
        return args

    def error(self, message):
        if "expected one argument" in message:
            message += ', as in --flag VALUE, or --flag="-VALUE" if VALUE begins with -'
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")


def checked(kind, fits, description):
    """Makes a type for add_argument: an int or float for which fits(value) holds."""
    def parse(text):
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}")
    return parse


positive_int = checked(int, lambda n: 1 <= n < 2 ** 31, "a whole number above 0 and below 2^31")
positive_float = checked(float, lambda x: 0 < x < 1e35, "a number above 0 and below 1e35")
at_least_0 = checked(float, lambda x: 0 <= x <= 1e35, "a number from 0 to 1e35")
seed_int = checked(int, lambda n: 0 <= n < 2 ** 32, "a whole number from 0 to 2^32 - 1")


@contextmanager
def one_line_errors(*kinds, out_of_memory):
    """Ends the program with one line and exit status 2 on a UserError, an OSError, an exception of these
    kinds, a missing optional package, or a lack of memory. On KeyboardInterrupt it is 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")        # closed by the shell
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with suppress(AttributeError):      # notebooks have a different stdout
        sys.stdout.reconfigure(errors="replace")        # for consoles that cannot show all characters
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:     # as with "| head": the reader is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        note("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        message, root = str(error), error.__cause__ or error
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            message = f"this needs the package {package}: pip install {package}"
        elif isinstance(error, ImportError):
            message = f"a package cannot be imported ({message}): install another version of it"
        elif isinstance(root, MemoryError) or (isinstance(root, RuntimeError) and (
                "out of memory" in str(root) or "allocate memory" in str(root))):
            message = f"out of memory: {out_of_memory}"
        elif isinstance(error, OSError) and error.strerror:
            message = f"cannot read or write {error.filename or 'a file'} ({error.strerror}): fix that first"
        elif not isinstance(error, (UserError, OSError, *kinds)):
            raise
        note(f"error: {' '.join(message.split())}")     # one line, whatever it quotes
        raise SystemExit(2) from error


def note(text, stream=None):
    """Prints a line, by default to stderr. If the disk behind it is full, or its reader gone, that ends
    nothing."""
    with suppress(OSError, ValueError):
        print(text, file=stream or sys.stderr, flush=True)


def on_ending_signals(handler=signal.default_int_handler):
    """Sets the handler of the signals that end a program, except those it was started to ignore, as under
    nohup. By default, each then acts like Ctrl-C, which cleans up."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):        # Windows lacks the last
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)


def in_colour():
    """Whether to use colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def duration(seconds):
    """75 -> "1m15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def default_name(source):
    """books/ -> books, crawl.jsonl.gz -> crawl, hf:owner/name -> name"""
    name = os.path.basename(os.path.abspath(source.removeprefix("hf:").partition("?")[0]))
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.replace(":", "-") or "text"


@one_line_errors(out_of_memory="lower --sample_size")
def main(argv=None):
    parser = Parser(description="Turn text into the token files that train.py reads.")
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE",
        help=f"files ({', '.join(SUFFIXES)}), folders, URLs; hf:OWNER/NAME or hf:OWNER/NAME:SUBSET, a "
        f"dataset on the Hugging Face Hub (its column text); {', '.join(NAMED_SOURCES)}; or python, this "
        "Python's standard library (default: python)")
    add("--name", help="the folder to write is data/NAME (default: the first SOURCE's name)")
    add("--overwrite", action="store_true", help="replace the data in data/NAME")
    add("--tokenizer", metavar="NAME", help="gpt2, bytes, bpe (learns a vocabulary), or a data folder, "
        "to use its vocabulary (default: bpe for python, otherwise gpt2)")
    add("--vocab_size", type=checked(int, lambda n: 257 <= n <= 65536, "a whole number from 257 to 65,536"),
        metavar="N", help="bpe's vocabulary size, including bytes and <|endoftext|> (default: 2048)")
    add("--sample_size", type=positive_int, metavar="N", help="take only the first N files or rows with text")
    add("--val_fraction", type=checked(float, lambda x: 0 < x < 1, "a number between 0 and 1"), default=0.1,
        help="fraction of the tokens, from the end, held out for validation")
    args = parser.parse_args(argv)
    on_ending_signals()
    sources = args.sources or ["python"]
    folder = Path("data", args.name or default_name(sources[0]))
    tokenizer = args.tokenizer or ("bpe" if sources == ["python"] else "gpt2")
    if args.vocab_size and tokenizer != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer bpe: {tokenizer} has its own")
    if tokenizer not in ("gpt2", "bytes", "bpe") and not Path(tokenizer, "meta.json").exists():
        raise UserError(f"there is no tokenizer {tokenizer}: use gpt2, bytes, bpe, or data/NAME")
    if folder.parts[0] != "data" or len(folder.parts) == 1 or any(part[0] == "." for part in folder.parts):
        raise UserError(f"--name must be the name of a folder in data, not {folder}")
    if folder.is_dir() and set(os.listdir(folder)) - {".lock", ".unfinished"} and not args.overwrite:
        raise UserError(f"{folder} already exists: choose another --name, or add --overwrite (runs on "
                        "what it has now can then be resumed only if the new data are the same)")
    started = time.perf_counter()
    meta = prepare(sources, folder, tokenizer, args.vocab_size or 2048, args.sample_size, args.val_fraction)
    seconds = time.perf_counter() - started
    documents, tokens = (meta["train"][unit] + meta["val"][unit] for unit in ("documents", "tokens"))
    print(f"{folder}: {documents:,} documents, {meta['train']['tokens']:,} tokens for training and "
          f"{meta['val']['tokens']:,} for validation, tokenizer {meta['tokenizer']} with "
          f"{meta['vocab_size']:,} tokens\n{duration(seconds)}, {tokens / seconds:,.0f} tokens/s")
    if meta["tokenizer"] != "bytes":
        show_tokens(meta, folder)


if __name__ == "__main__":
    main()
