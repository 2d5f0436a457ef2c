import math
import os
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import GPT, MODELS, GPTConfig, ModelError, load_checkpoint, save_checkpoint


def random_ids(config, *shape, seed=1):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ sizes

@pytest.mark.parametrize("name, parameters", [
    ("nano", 1_071_872), ("gpt2-92m", 91_605_384), ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_each_model_has_exactly_its_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        assert GPT(MODELS[name]).num_params() == parameters


@pytest.mark.parametrize("sizes, complaint", [
    ({"n_embd": 10, "n_head": 3}, r"n_embd \(10\) must be divisible by n_head \(3\)"),
    ({"n_layer": 0}, "n_layer must be a whole number above 0, not 0"),
    ({"block_size": 2.5}, "block_size must be a whole number above 0, not 2.5"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ({"dropout": True}, "dropout must be at least 0 and below 1, not True"),
    ({"dropout": "0"}, "dropout must be at least 0 and below 1, not '0'")])
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, complaint):
    with pytest.raises(ModelError, match=complaint):
        GPTConfig(**sizes)


def test_a_whole_number_is_a_dropout():
    assert GPTConfig(dropout=0) == GPTConfig(dropout=0.0)


# ----------------------------------------------------------------------------------------------- layers

def test_a_fresh_model_finds_all_tokens_about_equally_likely():
    model = GPT(MODELS["nano"])
    ids = random_ids(model.config, 4, 65)
    assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(2048)) < 0.1


def test_logits_have_a_row_for_each_position_and_a_column_for_each_token(model):
    assert model(random_ids(model.config, 3, 5)).shape == (3, 5, 257)


def test_a_later_token_cannot_change_an_earlier_logit(model):
    ids = random_ids(model.config, 1, 16)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 257
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("attention", [gpt.attention, gpt.fused_attention])
def test_dropout_zeroes_attention_as_often_as_it_says(attention):
    ones = torch.ones(64, 2, 16, 16)
    y = attention(ones, ones, ones, 0.25)       # each position's mean of ones, of which a quarter is dropped
    assert y.mean().item() == pytest.approx(1.0, abs=0.05) and y[:, :, 0].unique().tolist() == [
        0.0, pytest.approx(4 / 3)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_formulas_agree_with_the_fused_kernels_in_values_and_gradients(tiny, bias):
    config = replace(tiny, bias=bias)
    fused, formula = GPT(config), GPT(config, fused=False)
    formula.load_state_dict(fused.state_dict())
    ids = random_ids(config, 2, 17)
    losses = [model(ids[:, :-1], ids[:, 1:]) for model in (fused, formula)]
    assert torch.allclose(fused(ids[:, :-1]), formula(ids[:, :-1]), atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, gradient in gradients(fused).items():
        assert torch.allclose(gradient, gradients(formula)[name], atol=1e-6), name


def test_dropout_zeroes_in_training_and_not_in_evaluation(tiny):
    model = GPT(replace(tiny, dropout=0.5))
    ids = random_ids(tiny, 1, 16)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_residual_projections_start_smaller_the_deeper_the_model():
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=8, n_head=2, n_embd=128))
    assert model.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (model.h[0].attn.c_proj, model.h[0].mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.h[0].mlp.c_fc.bias.abs().max() == 0


def test_a_tied_lm_head_is_the_token_embedding_itself_and_an_untied_one_is_not(tiny):
    tied, untied = GPT(tiny), GPT(replace(tiny, tied=False))
    assert tied.lm_head.weight is tied.wte.weight and "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() - tied.num_params() == 257 * 32


def test_a_sequence_longer_than_block_size_is_refused(model):
    with pytest.raises(ValueError, match="17 positions do not fit into a block_size of 16"):
        model(random_ids(model.config, 1, 17))


# ------------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows_at_once", [1, 7, 48, 1024])
def test_the_loss_is_plain_cross_entropy_in_value_and_gradients(tiny, monkeypatch, tied, fused, rows_at_once):
    monkeypatch.setattr(gpt, "ROWS_AT_ONCE", rows_at_once)
    model = GPT(replace(tiny, tied=tied), fused)
    ids = random_ids(tiny, 3, 17)
    loss = model(ids[:, :-1], ids[:, 1:])
    (3 * loss).backward()
    found = gradients(model)
    model.zero_grad()
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    (3 * plain).backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name


def test_the_loss_never_holds_the_logits_of_more_rows_at_once(monkeypatch):
    monkeypatch.setattr(gpt, "ROWS_AT_ONCE", 5)
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: sizes.append(x.shape[0] * w.shape[0]) or linear(x, w))
    x, weight = torch.ones(48, 32, requires_grad=True), torch.ones(320, 32)
    gpt.ChunkedCrossEntropy.apply(x, weight, torch.zeros(48, dtype=torch.int64), 257, True)
    assert sizes == [320 * 5] * 9 + [320 * 3]


def test_the_loss_without_gradients_is_the_same(model):
    ids = random_ids(model.config, 3, 17)
    loss = model(ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        assert model(ids[:, :-1], ids[:, 1:]) == loss


def test_in_bfloat16_the_loss_and_its_gradients_stay_close(tiny):
    model = GPT(tiny)
    ids = random_ids(tiny, 4, 17)
    exact = model(ids[:, :-1], ids[:, 1:])
    exact.backward()
    gradient = model.wte.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids[:, :-1], ids[:, 1:])
    rounded.backward()
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), abs=0.01)
    assert F.cosine_similarity(model.wte.weight.grad.flatten(), gradient.flatten(), dim=0) > 0.999


def test_it_learns_one_batch_by_heart(tiny):
    torch.manual_seed(0)
    model = GPT(tiny)
    ids = random_ids(tiny, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ------------------------------------------------------------------------------------------- generation

def generate_without_a_cache(model, ids, n, **options):
    """What the docstring of GPT.generate promises, the slow way: for each token, all that counts is read."""
    block_size = model.config.block_size
    start = max(0, ids.shape[1] - block_size)
    for _ in range(n):
        if ids.shape[1] - start > block_size:
            start = ids.shape[1] - block_size // 2
        logits = model(ids[:, start:])[:, -1]
        ids = torch.cat([ids, gpt.next_token(logits, **options).unsqueeze(1)], dim=1)
    return ids[:, -n:]


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 40])
@pytest.mark.parametrize("temperature, top_k, top_p", [(0, None, None), (0.9, 20, 0.95)])
@pytest.mark.parametrize("fused", [True, False])
def test_generation_with_a_cache_equals_generation_without_also_past_block_size(
        model, prompt_length, temperature, top_k, top_p, fused):
    weights, model = model.state_dict(), GPT(model.config, fused).eval()
    model.load_state_dict(weights)
    ids = random_ids(model.config, 2, prompt_length)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    cached = list(model.generate(ids, 40, generator=torch.Generator().manual_seed(7), **options))
    plain = generate_without_a_cache(model, ids, 40, generator=torch.Generator().manual_seed(7), **options)
    assert torch.equal(torch.stack(cached, dim=1), plain)


def test_watch_sees_the_logits_that_each_token_is_drawn_from(model):
    ids, watched = random_ids(model.config, 2, 5), []
    for next_ids in model.generate(ids, 11, temperature=0, watch=watched.append):
        with torch.inference_mode():
            assert torch.allclose(watched[-1], model(ids)[:, -1], atol=1e-5)
        assert torch.equal(next_ids, watched[-1].argmax(-1))
        ids = torch.cat([ids, next_ids.unsqueeze(1)], dim=1)
    assert len(watched) == 11


def test_the_cache_is_allocated_once(model, monkeypatch):
    caches = []
    init = gpt.KVCache.__init__
    monkeypatch.setattr(gpt.KVCache, "__init__", lambda cache, *args, **options: caches.append(
        cache) or init(cache, *args, **options))
    pointers = {(cache.keys.data_ptr(), cache.values.data_ptr())
                for _ in model.generate(random_ids(model.config, 1, 3), 40) for cache in caches}
    assert len(caches) == len(pointers) == model.config.n_layer


def test_the_same_seed_draws_the_same_tokens_and_greedy_needs_none(model):
    ids = random_ids(model.config, 1, 4)

    def draw(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        drawn = model.generate(ids, 30, temperature=temperature, generator=generator)
        return torch.stack(list(drawn)).tolist()

    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    assert draw(1, 0) == draw(2, 0)


def test_padding_gets_no_probability_no_loss_and_no_column_in_the_logits(model):
    ids = random_ids(model.config, 2, 17)
    loss = model(ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        model.wte.weight[257:] = 100 * model.wte.weight[:1].sign()      # were they tokens, the likeliest
    assert model.wte.num_embeddings == 320
    assert model(ids[:, :-1]).shape[-1] == 257
    assert model(ids[:, :-1], ids[:, 1:]) == loss
    assert all(next_ids.max() < 257 for next_ids in model.generate(ids[:, :3], 50, temperature=5.0))


PROBABILITIES = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize("options, possible", [
    ({}, {0, 1, 2, 3}), ({"temperature": 0}, {1}), ({"temperature": 1e-46}, {1}),
    ({"top_k": 1}, {1}), ({"top_k": 2}, {1, 3}), ({"top_k": 9}, {0, 1, 2, 3}),
    ({"top_p": 0.1}, {1}), ({"top_p": 0.5}, {1, 3}), ({"top_p": 0.8}, {1, 2, 3}),
    ({"top_p": 1.0}, {0, 1, 2, 3}), ({"top_k": 3, "top_p": 0.5}, {1, 3}), ({"top_k": 2, "top_p": 0.5}, {1}),
    ({"top_p": 0.75}, {1, 2, 3}), ({"top_p": 1e-46}, {1})])
def test_the_next_token_is_drawn_from_those_the_options_leave(options, possible):
    logits = torch.tensor(PROBABILITIES).log().repeat(2000, 1)
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    drawn = gpt.next_token(logits, **options, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == possible


@pytest.mark.parametrize("top_k, top_p", [(None, None), (1, None), (None, 0.5), (2, 0.5)])
def test_each_row_of_a_batch_draws_from_its_own_tokens(top_k, top_p):
    drawn = gpt.next_token(99 * torch.eye(4), 1.0, top_k, top_p, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [0, 1, 2, 3]


def test_top_p_leaves_out_what_is_not_needed_to_reach_it():
    drawn = gpt.next_token(torch.zeros(2000, 2), 1.0, None, 0.5, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 1        # of two tokens with a probability of 0.5 each


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    logits = torch.tensor(PROBABILITIES).log().repeat(100_000, 1)
    drawn = gpt.next_token(logits, temperature, None, None, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(share, (logits[0] / temperature).softmax(0), atol=0.01)


# ------------------------------------------------------------------------------------------ checkpoints

def test_a_checkpoint_gives_back_the_model_and_what_was_saved_with_it(model):
    save_checkpoint("model.pt", model, {"step": 3, "note": None})
    loaded, meta = load_checkpoint("model.pt")
    ids = random_ids(model.config, 1, 16)
    assert meta == {"step": 3, "note": None} and loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.lm_head.weight is loaded.wte.weight


def test_saving_leaves_no_temporary_file(model, tmp_path):
    save_checkpoint("model.pt", model, {})
    save_checkpoint("model.pt", model, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_missing_cut_or_foreign_checkpoint_is_refused(model, tmp_path):
    save_checkpoint("whole.pt", model, {})
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.ones(3)}, "foreign.pt")
    torch.save(model, "pickled.pt")     # a whole object, which only code in the file could bring back
    with pytest.raises(ModelError, match=r"there is no checkpoint none\.pt"):
        load_checkpoint("none.pt")
    for name in ("cut.pt", "text.pt", "foreign.pt", "pickled.pt"):
        with pytest.raises(ModelError, match=f"{name} is damaged, cut short, or not a checkpoint"):
            load_checkpoint(name)


def test_a_flipped_bit_in_the_weights_is_refused(model, tmp_path):
    save_checkpoint("whole.pt", model, {})
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"flipped.pt is damaged"):
        load_checkpoint("flipped.pt")


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(model, tmp_path, monkeypatch):
    save_checkpoint("model.pt", model, {"step": 1})
    (tmp_path / "model.pt.tmp").symlink_to("/dev/full")     # a disk without room
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint("model.pt", model, {"step": 2})
    assert load_checkpoint("model.pt")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(model, tmp_path, legacy):
    content = {"config": asdict(model.config), "model": model.state_dict(), "meta": Command()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"evil.pt is damaged"):
        load_checkpoint("evil.pt")
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------- Hugging Face

@pytest.mark.parametrize("sizes", [{}, {"tied": False, "mlp_ratio": 2}, {"bias": False}], ids=str)
def test_logits_equal_those_of_hugging_face_with_the_same_weights(tiny, sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = GPT(replace(tiny, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)   # left at 0 or 1, a weight could hide a mistake
    model.save_pretrained("folder")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("folder").eval()
    ids = random_ids(tiny, 2, 16)
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"tied": False, "mlp_ratio": 2}], ids=str)
def test_a_hugging_face_folder_comes_back_as_it_was_saved(model, sizes):
    pytest.importorskip("transformers")
    model = GPT(replace(model.config, **sizes)).eval()
    model.save_pretrained("folder")
    loaded = GPT.from_pretrained("folder")
    ids = random_ids(model.config, 2, 16)
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))


def test_a_changed_gpt_py_does_not_load_the_weights_of_gpt2(model, monkeypatch):
    pytest.importorskip("transformers")
    torch.nn.init.normal_(model.wpe.weight)
    model.save_pretrained("folder")
    monkeypatch.setattr(GPT, "hidden", lambda self, ids: self.ln_f(self.wte(ids)))
    with pytest.raises(ModelError, match=r"other logits with its weights: was gpt.py changed"):
        GPT.from_pretrained("folder")


def test_a_model_without_biases_comes_back_with_biases_of_0(tiny):
    pytest.importorskip("transformers")
    model = GPT(replace(tiny, bias=False)).eval()
    model.save_pretrained("folder")
    ids = random_ids(tiny, 2, 16)
    assert torch.equal(GPT.from_pretrained("folder")(ids), model(ids))


def test_a_hugging_face_folder_may_have_a_whole_number_as_dropout(model, tmp_path):
    pytest.importorskip("transformers")
    model.save_pretrained("folder")
    config = tmp_path / "folder" / "config.json"
    text = config.read_text()
    assert '"resid_pdrop": 0.0' in text
    config.write_text(text.replace('"resid_pdrop": 0.0', '"resid_pdrop": 0'))
    assert GPT.from_pretrained("folder").config == model.config


def test_a_hugging_face_folder_of_another_kind_is_refused(model, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="folder cannot be loaded as Hugging Face's GPT-2"):
        GPT.from_pretrained("folder")
    model.save_pretrained("folder")
    config = tmp_path / "folder" / "config.json"
    text = config.read_text()
    for before, after, message in [
            ('"gelu_new"', '"relu"', "its activation_function is 'relu', not 'gelu_new'"),
            ('"n_layer": 2', '"n_layer": 1', r"its weights do not match: see .*h\.1\."),
            ('"n_layer": 2', '"n_layer": 3', r"its weights do not match: see .*h\.2\."),
            ('"n_positions": 16', '"n_positions": 17', "")]:
        assert before in text
        config.write_text(text.replace(before, after))
        with pytest.raises(ModelError, match=rf"^folder cannot be loaded as .* GPT-2 \({message}"):
            GPT.from_pretrained("folder")


# ------------------------------------------------------------------------------------- device and dtype

@pytest.mark.parametrize("name", ["warp", "cuda:99", "hpu"])
def test_a_device_that_this_machine_does_not_have_is_refused(name):
    with pytest.raises(ModelError, match=f"there is no device {name} here: use --device cpu"):
        gpt.choose_device(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_default_dtype_on_a_cpu_is_bfloat16_where_it_has_hardware_for_it(monkeypatch, dtype):
    abilities = {"avx512_bf16": dtype == torch.bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert gpt.choose_dtype(None, torch.device("cpu")) == dtype


@pytest.mark.parametrize("capability, dtype", [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_the_default_dtype_on_a_gpu_is_bfloat16_from_compute_capability_8(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpt.choose_dtype(None, torch.device("cuda")) == dtype
