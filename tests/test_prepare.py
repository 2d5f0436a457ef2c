import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHAKESPEARE

import prepare
from prepare import get_tokenizer, load_meta, load_tokens, main

AWKWARD = ("naïve café — 東京 🇫🇷 👩‍👩‍👧 e\u0301 \u202e\ufeff\x00\x85\xa0 <|endoftext|> \r\n\r\n\n   "
           "\t\x1c x  \n's 'S ’s 12345678 !?…  \u3000end ")


def write(name, content):
    content = content.encode("utf-8") if isinstance(content, str) else content
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def tokens_of(folder):
    return np.concatenate([load_tokens(folder, "train"), load_tokens(folder, "val")]).tolist()


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# ----------------------------------------------------------------------------------- text, there and back

@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", ["a", "plain words\n", AWKWARD, AWKWARD * 50], ids=range(4))
def test_decoding_the_files_gives_the_text_back(tokenizer, text):
    prepare.prepare([write("a.txt", text)], "data/a", tokenizer)
    assert get_tokenizer(tokenizer).decode(tokens_of("data/a")) == text + "<|endoftext|>"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE.name} is not beside this checkout")
@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_decoding_the_files_gives_shakespeare_back(tokenizer):
    prepare.prepare([SHAKESPEARE], "data/a", tokenizer)
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert get_tokenizer(tokenizer).decode(tokens_of("data/a")) == text + "<|endoftext|>"


@pytest.mark.parametrize("block", [1, 7, 64])
def test_where_a_long_text_is_cut_changes_neither_text_nor_gpt2_tokens(monkeypatch, block):
    monkeypatch.setattr(prepare, "CHUNK", block)
    text = AWKWARD + " Some   words,\n\n\n  and  more words\n \n" * 5
    prepare.prepare([write("a.txt", text)], "data/a", "gpt2")
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.decode(tokens_of("data/a")) == text + "<|endoftext|>"
    if block == 64:     # then each block has a place where a cut does no harm
        assert tokens_of("data/a") == [
            *tokenizer.encode(text, allowed_special="all"), tokenizer.eot_token]


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character():
    prepare.prepare([write("a.jsonl", '{"text": "a\\ud83db"}')], "data/a", "bytes")
    assert get_tokenizer("bytes").decode(tokens_of("data/a")) == "a\ufffdb<|endoftext|>"


# ---------------------------------------------------------------------------------------------- sources

def test_txt_jsonl_gz_and_folders_give_their_documents_in_order():
    write("in/a.txt", "first")
    write("in/b/c.jsonl", jsonl("second", "", "third") + "\n")
    write("in/d.jsonl.gz", jsonl("fourth"))
    write("in/e.txt.gz", "fifth")
    write("in/f.txt", "")
    write("in/fg.jsonl.TXT", "sixth")
    write("in/image.png", b"\xff")
    write("in/._a.txt", b"\xff")
    write("in/.git/a.txt", b"\xff")
    prepare.prepare(["in", write("h.txt", "seventh")], "data/a", "bytes")
    texts = get_tokenizer("bytes").decode(tokens_of("data/a")).split("<|endoftext|>")
    assert texts == ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", ""]


def test_a_byte_order_mark_before_json_is_skipped():
    prepare.prepare([write("a.jsonl", "\ufeff" + jsonl("text"))], "data/a", "bytes")
    assert get_tokenizer("bytes").decode(tokens_of("data/a")) == "text<|endoftext|>"


def test_a_byte_order_mark_before_text_is_skipped_and_within_it_kept():
    prepare.prepare([write("a.txt", "\ufefftext\ufeff")], "data/a", "bytes")
    assert get_tokenizer("bytes").decode(tokens_of("data/a")) == "text\ufeff<|endoftext|>"


def test_the_default_is_the_standard_library_with_a_vocabulary_of_its_own(capsys):
    main(["--sample_size", "20", "--vocab_size", "300"])
    meta = load_meta("data/python")
    tokenizer = get_tokenizer("bpe", meta["vocabulary"])
    documents = tokenizer.decode(tokens_of("data/python")).split("<|endoftext|>")[:-1]
    assert meta["tokenizer"] == "bpe" and meta["vocab_size"] == 300
    assert documents == [path.read_bytes().decode() for path in prepare.find_files("python", ".")[:20]]
    assert "data/python: 20 documents" in capsys.readouterr().out


def test_the_standard_library_is_without_tests_tables_and_installed_packages():
    paths = prepare.find_files("python", ".")
    assert any(path.name == "argparse.py" for path in paths)
    assert not any({"site-packages", "test", "encodings"} & set(path.parts) for path in paths)


def test_name_and_val_fraction_come_from_their_flags():
    main([write("a.txt", "x" * 99), "--name", "b", "--val_fraction", "0.5", "--tokenizer", "bytes"])
    assert load_meta("data/b")["val"]["tokens"] == 50 and not Path("data/a").exists()


@pytest.mark.parametrize("source, name", [
    ("books", "books"), ("books/", "books"), ("a/b.txt", "b"), ("b.jsonl.gz", "b"), ("v1.5.txt", "v1.5")])
def test_the_folder_is_named_after_the_source(source, name):
    assert prepare.default_name(source) == name


def test_other_sources_get_the_gpt2_tokenizer():
    main([write("a.txt", "Hello world, hello again.")])
    assert load_meta("data/a")["tokenizer"] == "gpt2"


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_sample_size_takes_the_first_documents(limit):
    prepare.prepare([write("a.jsonl", jsonl("one", "two", "three"))], "data/a", "bytes", sample_size=limit)
    expected = "".join(text + "<|endoftext|>" for text in ["one", "two", "three"][:limit])
    assert get_tokenizer("bytes").decode(tokens_of("data/a")) == expected


# ------------------------------------------------------------------------------------------------ files

def test_the_files_are_raw_little_endian_uint16():
    prepare.prepare([write("a.txt", "AB")], "data/a", "bytes", val_fraction=0.34)
    assert Path("data/a/train.bin").read_bytes() == b"A\x00"
    assert Path("data/a/val.bin").read_bytes() == b"B\x00\x00\x01"


@pytest.mark.parametrize("val_fraction, n_train", [(0.1, 900), (0.5, 500), (0.0001, 999), (0.999, 1)])
def test_the_split_is_by_tokens_and_validation_is_the_tail(val_fraction, n_train):
    write("a.txt", "x" * 999)
    meta = prepare.prepare(["a.txt"], "data/a", "bytes", val_fraction=val_fraction)
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (n_train, 1000 - n_train)
    assert tokens_of("data/a") == [ord("x")] * 999 + [256]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_meta_json_counts_documents_bytes_and_tokens_of_each_split(tokenizer):
    texts = ["déjà vu " * 40, "東京" * 30, "x" * 100]
    prepare.prepare([write("a.jsonl", jsonl(*texts))], "data/a", tokenizer, val_fraction=0.4)
    meta, encoding = load_meta("data/a"), get_tokenizer(tokenizer)
    assert (meta["format"], meta["tokenizer"]) == (prepare.FORMAT, tokenizer)
    assert meta["vocab_size"] == encoding.n_vocab
    for split in ("train", "val"):
        content = Path("data/a", f"{split}.bin").read_bytes()
        tokens = load_tokens("data/a", split).tolist()
        text = [token for token in tokens if token != encoding.eot_token]
        assert meta[split] == {
            "documents": len(tokens) - len(text), "bytes": len(encoding.decode_bytes(text)),
            "tokens": len(tokens), "crc32": zlib.crc32(content)}


@pytest.mark.parametrize("workers", [2, 5])
def test_the_result_does_not_depend_on_the_number_of_cores(monkeypatch, workers):
    monkeypatch.setattr(prepare, "CHUNK", 50)
    write("a.jsonl", jsonl(*(f"document {i} " * i for i in range(60))))
    for name, n_cores in (("one", 1), ("many", workers)):
        monkeypatch.setattr(os, "cpu_count", lambda n_cores=n_cores: n_cores)
        prepare.prepare(["a.jsonl"], f"data/{name}", "gpt2")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert Path("data/one", name).read_bytes() == Path("data/many", name).read_bytes()


def test_only_a_few_batches_are_read_ahead_of_the_encoder(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    read = []
    pieces = (read.append(i) or ("x" * i, True) for i in range(1000))
    results = prepare.encode_all(pieces, prepare.tokenizer_arguments("bytes"))
    assert len(next(results)) == sum(range(32)) + 32 and len(read) < 10 * 32
    assert sum(map(len, results)) == sum(range(32, 1000)) + 968


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is in Linux's /proc only")
def test_memory_does_not_grow_with_the_corpus():
    script = ("import os, prepare; os.cpu_count = lambda: 2; prepare.prepare(['a.txt'], 'data/a', 'bytes'); "
              "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    peaks = []
    for megabytes in (10, 40):
        with open("a.txt", "w") as file:
            file.writelines("All work and no play makes Jack a dull boy\n" * 23_256 for _ in range(megabytes))
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT)})
        peaks.append(int(result.stdout) / 1024)
    assert peaks[1] < peaks[0] + 25 and peaks[1] < 200      # MiB


def test_preparing_again_replaces_the_data():
    for text in ("first", "second, longer"):
        prepare.prepare([write("a.txt", text)], "data/a", "bytes")
        assert get_tokenizer("bytes").decode(tokens_of("data/a")) == text + "<|endoftext|>"


def test_a_data_folder_has_three_files_and_keeps_those_of_others():
    write("data/a/notes.txt", "kept")
    for _ in range(2):
        prepare.prepare([write("a.txt", "text")], "data/a", "bytes")
    assert sorted(os.listdir("data/a")) == [
        ".lock", "meta.json", "notes.txt", "train.bin", "val.bin", "vocabulary.tiktoken"]


def test_the_tokens_cannot_be_written_to(data):
    with pytest.raises(ValueError, match="read-only"):
        load_tokens(data, "train")[0] = 1


def test_progress_is_reported_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    prepare.prepare([write("a.jsonl", jsonl("abcd", "efgh", "ijkl"))], "data/a", "bytes")
    assert capsys.readouterr().err.splitlines() == ["2 documents, reading a.jsonl"]


# -------------------------------------------------------------------------------------------- bad input

BAD_SOURCES = [
    ("none.txt", None, "there is no none.txt"),
    ("a.pdf", "x", "a.pdf: no file with a known ending (.txt, .jsonl"),
    ("a.txt", "", "there is no text in a.txt"),
    ("a.jsonl", "\n\n", "there is no text in a.jsonl"),
    ("a.txt", b"good \xff bad", "a.txt is not UTF-8 at byte 5"),
    ("a.txt", b"x" * 3_000_000 + "é".encode() + b"\xc3", "a.txt is not UTF-8 at byte 3,000,002"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8 at byte 25"),
    ("a.jsonl", '{"text": "ok"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    ("a.jsonl", '{"text": "ok"}\n\n{"txt": "x"}\n', 'a.jsonl, line 3 has no string "text"'),
    ("a.jsonl", '["text"]\n', 'a.jsonl, line 1 has no string "text"'),
    ("a.jsonl", '{"text": 5}\n', 'a.jsonl, line 1 has no string "text"'),
    ("a.jsonl", "[" * 100_000, "a.jsonl, line 1 is not JSON"),
]


@pytest.mark.parametrize("name, content, message", BAD_SOURCES)
def test_a_source_at_fault_is_named_in_one_line_and_leaves_nothing_behind(fails, name, content, message):
    if content is not None:
        write(name, content)
    for tokenizer in ("bytes", "bpe"):
        fails(main, [name, "--tokenizer", tokenizer], message)
    assert not list(Path("data").glob("*"))


def test_a_folder_without_text_is_refused(fails):
    Path("empty").mkdir()
    fails(main, ["empty"], "empty: no file with a known ending (.txt")


def test_a_damaged_gzip_file_is_refused(fails):
    write("a.txt.gz", "some text " * 1000)
    whole = Path("a.txt.gz").read_bytes()
    for content in (whole[:40], b"not gzip", whole[:30] + b"\xff" * 9 + whole[39:]):
        Path("a.txt.gz").write_bytes(content)
        fails(main, ["a.txt.gz", "--tokenizer", "bytes"], "a.txt.gz is not a whole gzip file")


def test_a_failure_leaves_the_data_that_was_there(fails, data):
    before = tokens_of(data)
    write("text.txt", b"good " * 99_999 + b"\xff")
    fails(main, ["text.txt", "--tokenizer", "bytes", "--overwrite"], "text.txt is not UTF-8 at byte 499,995")
    assert tokens_of(data) == before and ".unfinished" not in os.listdir(data)


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "gpt5"], "there is no tokenizer gpt5"),
    (["--sample_size", "0"], "--sample_size: must be a whole number above 0 and below 2^31, not '0'"),
    (["--sample_size", "ten"], "--sample_size: must be a whole number above 0 and below 2^31, not 'ten'"),
    (["--val_fraction", "1"], "--val_fraction: must be a number between 0 and 1, not '1'"),
    (["--speed", "9"], "unrecognized arguments: --speed")])
def test_a_bad_flag_is_reported_in_one_line(fails, flags, message):
    fails(main, flags, message)


@pytest.mark.parametrize("failure", [ConnectionError("Name or service not known"), b"not the vocabulary"])
def test_without_the_vocabulary_the_way_out_is_named(fails, monkeypatch, failure):
    def download(url):
        if isinstance(failure, bytes):
            return failure
        raise failure

    prepare.gpt2_arguments.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    monkeypatch.setattr("tiktoken.load.read_file", download)
    fails(main, [write("a.txt", "x")], "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer")
    assert not Path("data/a").exists()


@pytest.mark.parametrize("name, content, message", [
    ("meta.json", None, "contains no prepared data (no meta.json): run prepare.py, or pass"),
    ("meta.json", b'{"format": 1, "tok', "is damaged, half-written, or from another version"),
    ("meta.json", b"null", "is damaged, half-written, or from another version"),
    ("meta.json", b"[]", "is damaged, half-written, or from another version"),
    ("meta.json", b"\xff", "is damaged, half-written, or from another version"),
    ("meta.json", b'{"format": 2}', "is damaged, half-written, or from another version"),
    ("train.bin", None, "train.bin has 0 bytes, but meta.json says 3,600: run prepare.py again"),
    ("train.bin", b"x" * 3601, "train.bin has 3,601 bytes"),
    ("train.bin", b"x" * 3598, "train.bin has 3,598 bytes")])
def test_a_data_folder_that_is_not_whole_is_refused(data, name, content, message):
    Path(data, name).unlink()
    if content is not None:
        Path(data, name).write_bytes(content)
    with pytest.raises(prepare.UserError) as error:
        load_tokens(data, "train")
    assert message in str(error.value)
