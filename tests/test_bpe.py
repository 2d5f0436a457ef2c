"""A vocabulary that is learned from the text, wherever it travels."""

import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from conftest import QUICK, RESUME, SHAKESPEARE, run

import gpt
import prepare
import sample
import train
from prepare import WORD, get_tokenizer, learn_vocabulary, learn_vocabulary_fast, load_meta, load_tokens

SCRIPTS = [
    "The dog's 1,234 bones:\n\tdef f(x):\n        return x\r\n", "हिन्दी में लिखा हुआ", "ภาษาไทยง่ายนิดเดียว",
    "தமிழ் மொழி", "العربية", "中文没有空格。\n日本語も", "한국어", "русский язык", "👩‍👩‍👧 ok", " \n\n  \t x"]


def naive_vocabulary(word_counts, n_tokens):
    """Byte-pair encoding of words that are tuples of tokens."""
    words = {tuple(bytes([byte]) for byte in word): count for word, count in word_counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < n_tokens:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < 2:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], *map(tokens.index, pair)))
        tokens.append(a + b)
        merged = {}
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                both = word[i:i + 2] == (a, b)
                new.append(a + b if both else word[i])
                i += 2 if both else 1
            merged[tuple(new)] = count
        words = merged
    return tokens


def test_a_text_without_words_is_learned_from_in_pieces():
    dna = "".join(random.Random(0).choices("ACGT", k=2000))
    Path("dna.txt").write_text(dna)
    meta = prepare.prepare(["dna.txt"], "data/dna", "bpe", 300)
    pieces = Counter(dna[i:min(i + 16, 1800)].encode() for i in range(0, 1800, 16))
    learned = [get_tokenizer("bpe", meta["vocabulary"]).decode_single_token_bytes(i) for i in range(299)]
    assert learned == naive_vocabulary(pieces, 299)


def test_of_very_many_words_the_most_frequent_are_learned_from(monkeypatch):
    monkeypatch.setattr(prepare, "LEARN_FROM_WORDS", 2)
    Path("words.txt").write_text(" xy" * 3 + " ab" * 4 + " zz" * 5 + "\n" * 6)
    meta = prepare.prepare(["words.txt"], "data/words", "bpe", 300)
    tokenizer = get_tokenizer("bpe", meta["vocabulary"])
    learned = [tokenizer.decode([token]) for token in range(256, tokenizer.eot_token)]
    assert learned == [" z", " zz", " a", " ab"]


CHARACTERS = [chr(i) for i in range(32, 0x1FFFF) if regex.match(r"[\p{L}\p{M}\p{N}\p{P}\p{S}\p{Z}]", chr(i))]


def random_text(seed, length=4000):
    chosen = random.Random(seed)
    return "".join(chosen.choice([chosen.choice(CHARACTERS), chosen.choice(" \na")]) for _ in range(length))


@pytest.fixture
def books(tiny):
    """A data folder, data/books, with a vocabulary of 300 tokens of its own."""
    Path("books.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    prepare.main(["books.txt", "--tokenizer", "bpe", "--vocab_size", "300"])
    return "data/books"


# ------------------------------------------------------------------------------------------------ learning

@pytest.mark.parametrize("words", [
    {b"aaaaa": 3, b"aa": 1, b"ab": 7, b"abab": 2}, {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3},
    {b"x": 9}, {}, Counter(bytes(random.Random(i).choices(b"abc", k=6)) for i in range(99))], ids=repr)
def test_both_ways_to_learn_a_vocabulary_make_the_same_merges_ties_included(words):
    assert learn_vocabulary_fast(words, 300) == learn_vocabulary(words, 300) == naive_vocabulary(words, 300)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs the text tinyshakespeare")
def test_both_ways_to_learn_a_vocabulary_make_the_same_merges_of_a_real_text():
    words = prepare.count_words([SHAKESPEARE.read_text(encoding="utf-8")[:200_000]])
    assert learn_vocabulary_fast(words, 400) == learn_vocabulary(words, 400)


def test_words_are_counted_across_texts():
    assert prepare.count_words(["def f(x):", " f "]) == {
        b"def": 1, b" f": 2, b"(x": 1, b"):": 1, b" ": 1}


def test_the_pairs_of_a_word_are_its_neighbours():
    assert prepare.pairs("abcd") == ["ab", "bc", "cd"] and prepare.pairs("a") == []


def test_the_vocabulary_does_not_depend_on_the_number_of_cores(monkeypatch):
    Path("many").mkdir()
    for i in range(30):
        Path(f"many/{i}.txt").write_text(random_text(i, 400))
    for workers in (1, 3):
        monkeypatch.setattr(prepare.os, "cpu_count", lambda workers=workers: workers)
        prepare.prepare(["many"], f"data/{workers}", "bpe", 500)
    for name in ("vocabulary.tiktoken", "train.bin", "val.bin"):
        assert Path("data/1", name).read_bytes() == Path("data/3", name).read_bytes()


def test_nothing_is_learned_from_the_documents_for_validation():
    Path("rows.jsonl").write_text('{"text": "ab ab"}\n' * 9 + '{"text": "xyxyxyxy"}\n')
    prepare.prepare(["rows.jsonl"], "data/rows", "bpe", 300)
    tokenizer = get_tokenizer("bpe", load_meta("data/rows")["vocabulary"])
    assert [tokenizer.decode([token]) for token in range(256, tokenizer.eot_token)] == ["ab", " ab"]


def test_a_large_text_is_learned_from_its_beginning_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "LEARN_FROM", 100)
    rows = ['{"text": "ab ab ab ab ab ab ab ab"}\n'] * 10 + ['{"text": "xyxyxyxy"}\n'] * 90
    Path("rows.jsonl").write_text("".join(rows))
    prepare.prepare(["rows.jsonl"], "data/rows", "bpe", 300)
    assert load_meta("data/rows")["vocab_size"] == 259 and load_meta("data/rows")["val"]["documents"] > 9
    assert "learning the vocabulary from the first 104 characters" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- a tokenizer of it

@pytest.mark.parametrize("text", [*SCRIPTS, random_text(1)], ids=range(len(SCRIPTS) + 1))
def test_words_make_up_the_text_and_tokens_give_it_back(books, text):
    assert "".join(regex.findall(WORD, text)) == text
    tokenizer = get_tokenizer("bpe", load_meta(books)["vocabulary"])
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


@pytest.mark.parametrize("word", ["हिन्दी", "ภาษาไทยง่าย", "தமிழ்", " العَرَبِيَّة", "_name", "(self", ":\n"])
def test_a_word_of_any_script_keeps_its_vowel_signs(word):
    assert regex.findall(WORD, word) == [word]


def test_where_a_long_text_is_cut_does_not_change_the_tokens(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 50)
    Path("a.txt").write_text("\n".join(SCRIPTS) * 20, newline="")
    prepare.prepare(["a.txt"], "data/a", "bpe", 400)
    tokenizer = get_tokenizer("bpe", load_meta("data/a")["vocabulary"])
    tokens = [*load_tokens("data/a", "train"), *load_tokens("data/a", "val")]
    assert tokens == [*tokenizer.encode_ordinary("\n".join(SCRIPTS) * 20), tokenizer.eot_token]


def test_a_vocabulary_can_be_used_for_other_text(books):
    Path("more.txt").write_text("7 times 8 is 56.\n" * 60)
    prepare.main(["more.txt", "--tokenizer", books])
    ours, theirs = load_meta("data/more"), load_meta(books)
    assert (ours["tokenizer"], ours["vocabulary"]) == ("bpe", theirs["vocabulary"])
    run("--max_steps", 2, "--data", books)
    train.main(["--data", "data/more", "--init", "out/text", "--max_steps", "1", "--dtype", "float32"])
    assert gpt.load_checkpoint("out/more/last.pt")[1]["data"]["vocabulary"] == theirs["vocabulary"]


def test_a_checkpoint_alone_can_be_sampled_and_exported(books, capsys):
    pytest.importorskip("transformers")
    run("--max_steps", 2, "--data", books)
    tokenizer = get_tokenizer("bpe", load_meta(books)["vocabulary"])
    for path in Path(books).iterdir():
        path.unlink()
    capsys.readouterr()
    sample.main(["--prompt", "12 times", "--max_new_tokens", "9", "--seed", "1"])
    spoken = capsys.readouterr().out
    sample.main(["--export", "new/one"])
    capsys.readouterr()
    sample.main(["--prompt", "12 times", "--max_new_tokens", "9", "--seed", "1", "--checkpoint", "new/one"])
    assert capsys.readouterr().out == spoken
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained("new/one")
    for text in [*SCRIPTS, random_text(2), random_text(3)]:
        assert theirs.encode(text) == tokenizer.encode_ordinary(text)


def test_how_a_text_is_split_is_shown(books, monkeypatch, capsys):
    meta = load_meta(books)
    prepare.show_tokens(meta, books)
    first, last, split = capsys.readouterr().out.split("\n", 2)
    assert first.startswith("first merges: ' i' ' t'") and last.startswith("last merges: ")
    assert "| times|" in split
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    prepare.show_tokens(meta, books)
    assert "m times\033[4" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    (["--tokenizer", "bpe", "--vocab_size", "256"], "must be a whole number from 257 to 65,536, not '256'"),
    (["--tokenizer", "bpe", "--vocab_size", "65537"], "must be a whole number from 257 to 65,536"),
    (["--tokenizer", "bytes", "--vocab_size", "300"], "--vocab_size is for --tokenizer bpe"),
    (["--tokenizer", "gpt3"], "there is no tokenizer gpt3: use gpt2, bytes, bpe, or data/NAME")])
def test_a_bad_flag_is_reported_in_one_line(fails, flags, says):
    Path("books.txt").write_text("text")
    fails(prepare.main, ["books.txt", *flags], says)


def test_a_text_with_fewer_merges_gets_a_smaller_vocabulary_and_that_is_said(capsys):
    Path("a.txt").write_text("ab ab")
    prepare.prepare(["a.txt"], "data/a", "bpe", 5000)
    assert load_meta("data/a")["vocab_size"] == 258
    assert "no pair is left that occurs twice: the vocabulary has only 258 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda text: text[:-9], lambda text: text.replace("IDE= 264", "IDI= 264"), lambda text: "",
    lambda text: "\xff"])
def test_a_damaged_vocabulary_is_refused(fails, books, damage):
    path = Path(books, "vocabulary.tiktoken")
    assert damage(path.read_text()) != path.read_text()
    path.write_text(damage(path.read_text()), encoding="latin-1")
    fails(train.main, [*QUICK, "--data", books], "data/books is damaged, half-written, or from another")


def test_a_run_is_not_resumed_with_another_vocabulary(fails, books):
    run("--max_steps", 1, "--data", books)
    Path("books.txt").write_text(Path("books.txt").read_text().replace("times", "plus"))
    prepare.prepare(["books.txt"], books, "bpe", 300)
    fails(train.main, [*RESUME, "--max_steps", "2"], "cannot resume: ")


def test_a_model_is_not_fine_tuned_on_the_tokens_of_another_vocabulary(fails, books):
    run("--max_steps", 1, "--data", books)
    Path("more.txt").write_text("some other text " * 99)
    prepare.prepare(["more.txt"], "data/more", "bpe", 262)
    fails(train.main, ["--data", "data/more", "--init", "out/text/best.pt"],
          "uses another vocabulary: run prepare.py with --tokenizer FOLDER, the data folder")
