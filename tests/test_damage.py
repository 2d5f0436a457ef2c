"""Several hundred files, damaged at random: each is read as it stands, or refused in one line."""

import copy
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK

import gpt
import prepare
import train

JUNK = [None, True, -1, 0, 2, 10 ** 30, 0.5, math.inf, math.nan, "", "gpt2", "../../x", "\n", [], [1], {}]


def damaged(content, choose):
    """Flips a bit, cuts the end off, repeats a part, exchanges two parts, or overwrites one."""
    content, n = bytearray(content), len(content)
    a, b, c = sorted(choose.randrange(n) for _ in range(3))
    kind = choose.randrange(5)
    if kind == 0:
        content[a] ^= 1 << choose.randrange(8)
    elif kind == 1:
        del content[a:]
    elif kind == 2:
        content[b:b] = content[a:b]
    elif kind == 3:
        content[a:c] = content[b:c] + content[a:b]
    else:
        content[a:a + 8] = choose.randbytes(len(content[a:a + 8]))
    return bytes(content)


def leaves(tree):
    """Every (dictionary, key) in a tree of dictionaries."""
    return [(tree, key) for key in tree] + [
        leaf for value in tree.values() if isinstance(value, dict) for leaf in leaves(value)]


def rearranged(tree, choose):
    """Exchanges two fields of a tree of dictionaries, or removes one, or puts junk in its place."""
    tree = copy.deepcopy(tree)
    (a, i), (b, j) = choose.choices(leaves(tree), k=2)
    kind = choose.randrange(3)
    if kind == 0:
        a[i], b[j] = b[j], a[i]
    elif kind == 1:
        del a[i]
    else:
        a[i] = choose.choice(JUNK)
    return tree


def damages_of_json(path, times):
    """Writes a JSON file anew so many times: its fields rearranged and its bytes damaged in turn."""
    whole, choose = path.read_bytes(), random.Random(1)
    for i in range(times):
        if i % 2:
            path.write_bytes(damaged(whole, choose))
        else:
            path.write_text(json.dumps(rearranged(json.loads(whole), choose)))
        yield


def refused(error, function, *args):
    """Calls a function, and returns whether it raised that error; the message then has one line."""
    try:
        function(*args)
    except error as refusal:
        assert str(refusal) and "\n" not in str(refusal)
        return True
    return False


@pytest.fixture
def refuses_to_train(capsys, bare):
    """refuses_to_train(flags) runs train.py, and returns whether it ended with one line and exit status 2."""
    def check(*flags):
        try:
            train.main(list(flags))
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
            return True
        return False
    return check


def test_checkpoints(model):
    weights = model.state_dict()
    gpt.save_checkpoint("model.pt", model, {"step": 3})
    whole, choose = Path("model.pt").read_bytes(), random.Random(1)
    n_refused = 0
    for _ in range(400):
        Path("model.pt").write_bytes(damaged(whole, choose))
        if refused(gpt.ModelError, gpt.load_checkpoint, "model.pt"):
            n_refused += 1
        else:
            loaded, meta = gpt.load_checkpoint("model.pt")
            assert loaded.config == model.config and meta == {"step": 3}
            assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert n_refused > 380


def test_model_folders(model):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained("folder")
    path, ids, n_loaded = Path("folder", "config.json"), torch.arange(16).unsqueeze(0), 0
    for _ in damages_of_json(path, 80):
        if not refused(gpt.ModelError, gpt.GPT.from_pretrained, "folder"):
            n_loaded += 1
            loaded, values = gpt.GPT.from_pretrained("folder"), json.loads(path.read_text())
            varied = {"n_head": loaded.config.n_head, "dropout": loaded.config.dropout}
            assert loaded.config == replace(model.config, **varied)
            assert loaded.config.n_head == values.get("n_head", 12)
            assert loaded.config.dropout == values.get("resid_pdrop", 0.1)
            theirs = transformers.GPT2LMHeadModel.from_pretrained("folder", dtype=torch.float32).eval()
            with torch.no_grad():
                assert torch.allclose(loaded(ids), theirs(ids).logits, atol=1e-3)
    assert 15 < n_loaded < 65


def test_weights_of_model_folders(model):
    pytest.importorskip("transformers")
    model.save_pretrained("folder")
    path, choose = Path("folder", "model.safetensors"), random.Random(1)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(100):
        path.write_bytes(damaged(whole[:header], choose) + whole[header:])
        if not refused(gpt.ModelError, gpt.GPT.from_pretrained, "folder"):
            assert gpt.GPT.from_pretrained("folder").config == model.config


def test_token_files(data):
    path, choose = Path(data, "train.bin"), random.Random(1)
    whole = path.read_bytes()

    def read_all():
        tokens = prepare.load_tokens(data, "train")
        return train.Sequences(tokens, 16, 16, 257).read(range(112), "cpu")

    for _ in range(200):
        content = damaged(whole, choose)
        path.unlink()       # rather than change what is mapped into memory
        path.write_bytes(content)
        ids = np.frombuffer(content[:3600], "<u2", len(content[:3600]) // 2)
        sound = len(content) == len(whole) and max(ids[:112 * 16 + 1]) < 257
        assert refused(prepare.UserError, read_all) != sound


def test_descriptions_of_token_files(data, refuses_to_train):
    path = Path(data, "meta.json")
    for _ in damages_of_json(path, 300):
        if not refused(prepare.UserError, prepare.load_meta, data):
            shutil.rmtree("out", ignore_errors=True)
            if not refuses_to_train(*QUICK, "--max_steps", "1"):
                meta = json.loads(path.read_text())
                assert meta["vocab_size"] == 257 and meta["train"]["tokens"] == 1800
