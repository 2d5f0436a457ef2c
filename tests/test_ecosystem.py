"""smallgpt beside the libraries of its field: the real ones, without a network."""

import functools
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, documents, log, run, same_weights

import gpt
import prepare
import sample
import train
from prepare import get_tokenizer

AWKWARD = "naïve café — 東京 👩‍👩‍👧 don't  \n\n  x = 12345\t<|endoftext|>\r\n 's"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def gpt2():
    """A small model with GPT-2's vocabulary, also as the checkpoint gpt2.pt. Its weights are ten times
    GPT-2's, so that the likeliest token is likeliest by far."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    gpt.save_checkpoint("gpt2.pt", model, {"data": {"tokenizer": "gpt2", "vocabulary": ""}})
    return model


# ----------------------------------------------------------------------------------------- transformers

@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_an_exported_tokenizer_gives_the_tokens_of_tiktoken(model, gpt2, tokenizer):
    from transformers import AutoTokenizer
    ours = get_tokenizer(tokenizer)
    sample.export(gpt2 if tokenizer == "gpt2" else model, (tokenizer, ""), "folder")
    theirs = AutoTokenizer.from_pretrained("folder")
    text = AWKWARD.replace("<|endoftext|>", "")
    assert theirs(text).input_ids == ours.encode_ordinary(text)
    assert theirs.decode(ours.encode_ordinary(text)) == text
    assert theirs("<|endoftext|>").input_ids == [theirs.eos_token_id] == [ours.eot_token]


def test_an_exported_checkpoint_speaks_in_a_pipeline_as_it_does_here(gpt2, capsys):
    from transformers import pipeline
    sample.main(["--checkpoint", "gpt2.pt", "--export", "folder", "--dtype", "float32"])
    assert capsys.readouterr().out == "wrote folder\n"
    theirs = pipeline("text-generation", "folder")("The sea", max_new_tokens=64, do_sample=False)
    ours = sample.complete(gpt2, get_tokenizer("gpt2"), "The sea", 64, temperature=0)
    assert theirs[0]["generated_text"] == "The sea" + "".join(ours)


def test_a_pipeline_stops_where_the_context_of_an_exported_model_ends(model):
    from transformers import pipeline
    sample.export(model, ("bytes", ""), "folder")
    text = pipeline("text-generation", "folder")("The sea", do_sample=False)[0]["generated_text"]
    assert text.startswith("The sea") and len(text) <= model.config.block_size


def test_a_model_that_computes_something_else_than_gpt2_is_not_exported(model):
    model.h[0].mlp.gelu = torch.nn.ReLU()
    with pytest.raises(gpt.ModelError, match="GPT-2 computes other logits with its weights"):
        sample.export(model, ("bytes", ""), "folder")
    assert not Path("folder").exists()


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_an_exported_model_comes_back_with_its_tokenizer(model, gpt2, tokenizer):
    sample.export(gpt2 if tokenizer == "gpt2" else model, (tokenizer, ""), "folder")
    assert sample.load_model("folder")[1] == (tokenizer, "")


@pytest.mark.parametrize("damaged", [b"hello\n", b"\xff\xfe", b"IQ== 257\nIg== 257\n", b"IQ== 25",
                                     b"!!!! 256\n"])
def test_a_damaged_vocabulary_of_an_exported_model_is_called_so(model, fails, damaged):
    sample.export(model, ("bytes", ""), "folder")
    Path("folder/vocabulary.tiktoken").write_bytes(damaged)
    fails(sample.main, ["--checkpoint", "folder"], "vocabulary.tiktoken is damaged: export the model again")


def test_a_model_of_others_with_weights_that_are_not_finite_is_refused(model, data, fails):
    with torch.no_grad():
        model.ln_f.bias[3] = torch.nan
    sample.export(model, ("bytes", ""), "folder")
    fails(sample.main, ["--checkpoint", "folder"], "cannot be used: its run diverged")
    fails(train.main, ["--init", "folder", "--data", data], "cannot be used: its run diverged")


def test_a_model_with_a_tokenizer_of_its_own_is_refused_rather_than_read_with_gpt2s(model, gpt2, fails):
    sample.export(model, ("bytes", ""), "other")
    os.remove("other/vocabulary.tiktoken")
    gpt2.save_pretrained("other")
    fails(sample.main, ["--checkpoint", "other"], "other has a tokenizer of its own: only models with GPT-2")


def test_code_that_comes_with_a_model_does_not_run(fails, monkeypatch):
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "evil.Evil"}}')
    Path("folder/evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    fails(sample.main, ["--checkpoint", "folder"], "folder cannot be loaded as Hugging Face's GPT-2")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", gpt.MODELS)
def test_each_model_continues_in_transformers_as_it_does_here(name):
    from dataclasses import replace
    from transformers import GPT2LMHeadModel
    torch.manual_seed(0)
    sizes = gpt.MODELS[name]            # as deep and with as many heads, but narrow
    width = 4 * sizes.n_head if sizes.n_embd > 128 else sizes.n_embd
    model = gpt.GPT(replace(sizes, n_embd=width)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained("folder")
    theirs = GPT2LMHeadModel.from_pretrained("folder").eval()
    ids = torch.randint(model.config.vocab_size - 1, (1, 9))
    with torch.no_grad():
        logits = model(ids)
        assert torch.allclose(logits, theirs(ids).logits, atol=1e-4 * logits.abs().max())
    here = torch.stack(list(model.generate(ids, 24, temperature=0)), dim=1)
    there = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    assert here.tolist() == there[:, 9:].tolist()


def test_a_model_of_transformers_comes_back_bit_for_bit_identical():
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=300))
    theirs.save_pretrained("theirs")
    gpt.GPT.from_pretrained("theirs").save_pretrained("ours")
    before, after = load_file("theirs/model.safetensors"), load_file("ours/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------- the hub

@pytest.fixture
def hub(gpt2, monkeypatch):
    """The hub's cache on this machine, with gpt2 and someone/tiny in it as they are laid out there: the
    weights of gpt2 without the prefix that others have."""
    from huggingface_hub import constants
    from safetensors.torch import load_file, save_file
    for name in ("gpt2", "someone/tiny"):
        root = Path("hub", f"models--{name.replace('/', '--')}")
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        snapshot = root / "snapshots" / ("0" * 40)
        gpt2.save_pretrained(snapshot)
        if name == "gpt2":
            weights = load_file(snapshot / "model.safetensors")
            weights = {key.removeprefix("transformer."): weight for key, weight in weights.items()}
            weights["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)       # a mask, in files of old
            save_file(weights, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))


@pytest.mark.parametrize("name", ["gpt2", "someone/tiny"])
def test_a_name_on_the_hub_can_be_sampled_from(hub, gpt2, capsys, name):
    flags = ["--prompt", "The", "--temperature", "0", "--dtype", "float32", "--max_new_tokens", "9"]
    sample.main([*flags, "--checkpoint", name])
    theirs = capsys.readouterr().out
    sample.main([*flags, "--checkpoint", "gpt2.pt"])
    assert theirs == capsys.readouterr().out


def test_a_name_that_is_not_there_is_reported_in_one_line(hub, fails):
    fails(sample.main, ["--checkpoint", "nobody/nothing"],
          "nobody/nothing cannot be loaded as Hugging Face's GPT-2")


# -------------------------------------------------------------------------------------------- fine-tuning

TUNE = ["--data", "data/text", "--dtype", "float32", "--batch_size", "2", "--max_steps", "2", "--init"]


@pytest.fixture
def first(model):
    """A checkpoint, first.pt, that reads the tokens of `data`."""
    gpt.save_checkpoint("first.pt", model, {"data": {"tokenizer": "bytes", "vocabulary": ""}})


@pytest.mark.usefixtures("first")
def test_fine_tuning_begins_with_the_given_weights_and_may_read_less_at_once(data, model):
    train.main([*TUNE, "first.pt", "--lr", "1e-30", "--block_size", "8", "--out", "out/text"])
    tuned, _ = gpt.load_checkpoint("out/text/last.pt")
    assert tuned.config.block_size == 8
    expected = {**model.state_dict(), "wpe.weight": model.wpe.weight[:8]}
    for name, weight in tuned.state_dict().items():
        assert torch.allclose(weight[:257], expected[name][:257], atol=1e-6), name


@pytest.mark.usefixtures("first")
def test_fine_tuning_resumes_bit_for_bit_identical_and_without_the_first_weights(data):
    train.main([*TUNE, "first.pt", "--out", "out/whole", "--eval_interval", "1"])
    train.main([*TUNE, "first.pt", "--out", "out/text", "--eval_interval", "1", "--max_minutes", "1e-9"])
    os.remove("first.pt")
    train.main(["--out", "out/text", "--resume", "--max_minutes", "9"])
    whole, resumed = (gpt.load_checkpoint(f"out/{name}/last.pt")[0] for name in ("whole", "text"))
    assert same_weights(whole, resumed)


@pytest.mark.usefixtures("first")
def test_the_recipe_of_fine_tuning_is_gentle(data):
    train.main([*TUNE[:-3], "--init", "first.pt", "--out", "out/text"])
    args = gpt.load_checkpoint("out/text/last.pt")[1]["args"]
    assert args["lr"] == 5e-5 and args["epochs"] == 3


@pytest.mark.parametrize("flags, message", [
    (["gpt2.pt"], "gpt2.pt uses another vocabulary: run prepare.py with --tokenizer gpt2"),
    (["first.pt", "--n_layer", "3"], "--init brings its own sizes: leave out --n_layer"),
    (["first.pt", "--block_size", "17"], "--n_embd and a --block_size above 16"),
    (["first.pt", "--model", "nano"], "argument --model: not allowed with argument --init"),
    (["odd"], "odd has 99 tokens, but the tokenizer gpt2 has 50,257")])
@pytest.mark.usefixtures("data", "gpt2", "first")
def test_what_cannot_be_fine_tuned_is_reported_in_one_line(fails, flags, message):
    gpt.GPT(gpt.GPTConfig(vocab_size=99, n_layer=1, n_head=1, n_embd=8)).save_pretrained("odd")
    fails(train.main, [*TUNE, *flags, "--out", "out/text"], message)
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------- datasets

def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_each_row_of_a_parquet_file_is_a_document():
    texts = [f"text {i}" for i in range(3000)]
    parquet("rows.parquet", id=list(range(3000)), text=texts)
    prepare.main(["rows.parquet", "--tokenizer", "bytes"])
    assert documents("data/rows") == texts
    prepare.main(["rows.parquet", "--tokenizer", "bytes", "--sample_size", "7", "--overwrite"])
    assert documents("data/rows") == texts[:7]


def test_a_folder_may_mix_parquet_with_other_files():
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("one")
    parquet("mixed/b.parquet", text=["two", "", "three"])
    Path("mixed/c.jsonl").write_text('{"text": "four"}\n')
    prepare.main(["mixed", "--tokenizer", "bytes"])
    assert documents("data/mixed") == ["one", "two", "three", "four"]


def test_parquet_without_text_or_damaged_is_reported_in_one_line(fails):
    parquet("rows.parquet", title=["a"], body=["b"])
    fails(prepare.main, ["rows.parquet"], 'rows.parquet, row 1 has no string "text"')
    Path("rows.parquet").write_bytes(Path("rows.parquet").read_bytes()[:99])
    fails(prepare.main, ["rows.parquet"], "rows.parquet cannot be read")


@pytest.mark.parametrize("source, asked", [
    ("fineweb", ("eliplutchok/fineweb-small-sample", None)), ("hf:some/data", ("some/data", None)),
    ("hf:some/data:part", ("some/data", "part"))])
def test_datasets_of_the_hub_are_streamed_by_name(monkeypatch, source, asked):
    import datasets
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]}).to_iterable_dataset()

    def load_dataset(name, subset, split, streaming):
        assert ((name, subset), split, streaming) == (asked, "train", True)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare.main([source, "--tokenizer", "bytes", "--name", "text"])
    assert documents("data/text") == ["one", "two"]


def test_without_a_network_a_dataset_of_the_hub_is_refused_in_one_line(fails):
    fails(prepare.main, ["hf:no/where", "--tokenizer", "bytes"], "hf:no/where cannot be read")


# -------------------------------------------------------------------------------------------------- URLs

class Handler(BaseHTTPRequestHandler):
    """Serves a text of 1,000 bytes; under /cut only half of it, although it announces all."""

    def do_GET(self):
        self.send_response(404 if "none" in self.path else 200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * (500 if "cut" in self.path else 1000))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_downloaded_prepared_and_not_kept(server):
    prepare.main([f"{server}/books/moby.txt?download=true", "--tokenizer", "bytes"])
    assert documents("data/moby") == ["x" * 1000]
    assert os.listdir("data") == ["moby"]
    assert ".unfinished" not in os.listdir("data/moby")


def test_shakespeare_is_downloaded_from_its_url(server, monkeypatch):
    monkeypatch.setitem(prepare.NAMED_SOURCES, "shakespeare", f"{server}/input.txt")
    prepare.main(["shakespeare", "--tokenizer", "bytes"])
    assert documents("data/shakespeare") == ["x" * 1000]


@pytest.mark.parametrize("path, message", [
    ("cut.txt", "cut.txt could not be downloaded (<urlopen error retrieval incomplete: got only 500 out of"),
    ("none.txt", "none.txt could not be downloaded (HTTP Error 404"),
    ("page.html", "page.html: no file with a known ending (.txt"),
    ("http://127.0.0.1:0/a.txt", "a.txt could not be downloaded"),
    ("https://[x/a.txt", "a.txt could not be downloaded")])
def test_a_download_that_fails_is_reported_and_leaves_nothing_behind(server, capsys, path, message):
    with pytest.raises(SystemExit) as stop:
        prepare.main([path if "://" in path else f"{server}/{path}"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not os.listdir("data")


# -------------------------------------------------------------------------------------- Weights & Biases

def test_wandb_gets_the_rows_of_the_log(data, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    monkeypatch.setattr(wandb.Run, "log", functools.partialmethod(
        lambda self, row, step, log=wandb.Run.log: (logged.append(row), log(self, row, step=step))))
    run("--max_steps", 3, "--log_interval", 1, "--wandb")
    wandb.finish()
    assert len(logged) == 4 and logged == log()
    assert list(Path("out/text/wandb").glob("offline-run-*/*.wandb"))


# --------------------------------------------------------------------------------- without the libraries

OPTIONAL = ["matplotlib", "safetensors", "huggingface_hub", "transformers", "datasets", "wandb"]


@pytest.mark.parametrize("package, main, flags", [
    ("transformers", sample.main, ["--checkpoint", "someone/tiny"]),
    ("transformers", train.main, ["--data", "data/text", "--init", "someone/tiny"]),
    ("transformers", sample.main, ["--checkpoint", "gpt2.pt", "--export", "folder"]),
    ("datasets", prepare.main, ["fineweb"]),
    ("wandb", train.main, ["--data", "data/text", "--model", "nano", "--block_size", "16", "--wandb"])])
def test_a_package_that_is_missing_is_named_in_one_line(fails, data, gpt2, monkeypatch, package, main, flags):
    for name in [package, *sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    fails(main, flags, f"this needs the package {package}: pip install {package}")


def test_all_else_works_without_them(data):
    Path("bare.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import prepare, sample, train\n"
        "prepare.main(['text.txt', '--tokenizer', 'bytes', '--name', 'bare'])\n"
        "train.main(['--data', 'data/bare', '--block_size', '16', '--max_steps', '2'])\n"
        "sample.main(['--prompt', 'a'])\n")
    result = subprocess.run([sys.executable, "bare.py"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
