import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import gpt
from prepare import get_tokenizer
from sample import complete, main, token_probabilities


class Script:
    """A stand-in for a model that ignores its prompt: script[i] is its i-th list of tokens."""

    def __init__(self, script):
        self.script, self.prompt = script, None

    def parameters(self):
        yield torch.zeros(1)

    def generate(self, ids, max_new_tokens, **options):
        self.prompt = ids.tolist()
        yield from map(torch.tensor, self.script[:max_new_tokens])


def spoken(script, prompt="x", **options):
    return list(complete(Script(script), get_tokenizer("bytes"), prompt, 100, **options))


@pytest.fixture
def sampled(capsys, checkpoint):
    """sampled(flag, ...) is what sample.py prints, without the line's end."""
    def sample(*flags):
        main(list(map(str, flags)))
        return capsys.readouterr().out.removesuffix("\n")
    return sample


def test_the_same_seed_gives_the_same_text(sampled):
    assert sampled("--prompt", "ab", "--seed", 1) == sampled("--prompt", "ab", "--seed", 1)
    assert sampled("--prompt", "ab", "--seed", 1) != sampled("--prompt", "ab", "--seed", 2)


def test_at_temperature_0_the_seed_does_not_matter(sampled):
    greedy = ["--prompt", "ab", "--temperature", 0]
    assert sampled(*greedy, "--seed", 1) == sampled(*greedy, "--seed", 2) == sampled(*greedy, "--top_k", 1)


@pytest.mark.parametrize("flags", [[], ["--show_probs"]])
def test_the_flags_reach_the_model(sampled, monkeypatch, flags):
    asked = {}
    monkeypatch.setattr(gpt.GPT, "generate", lambda self, ids, n, **options: asked.update(options, n=n) or [])
    sampled(*flags, "--max_new_tokens", 7, "--temperature", 0.5, "--top_k", 9, "--top_p", 0.6, "--seed", 5)
    generator, _ = asked.pop("generator"), asked.pop("watch", None)
    assert asked == {"n": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.6} and generator.initial_seed() == 5


@pytest.mark.parametrize("flags, dtype", [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)])
def test_the_model_computes_in_the_fastest_dtype_or_in_the_given_one(sampled, monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    dtypes = []
    monkeypatch.setattr(
        gpt.GPT, "generate", lambda self, *args, **options: dtypes.append(self.lm_head.weight.dtype) or [])
    sampled(*flags)
    assert dtypes == [dtype]


def test_the_text_begins_with_the_prompt(sampled):
    assert sampled("--prompt", "déjà vu", "--max_new_tokens", 1).startswith("déjà vu")


def test_half_a_character_waits_for_the_other_half():
    euro = "€".encode()
    assert spoken([[i] for i in euro] + [[97]]) == ["", "", "€", "a", ""]


def test_a_character_that_stays_incomplete_is_marked_at_the_end():
    assert spoken([[0xE2]]) == ["", "\ufffd"]


def test_bytes_that_are_no_character_are_marked_and_the_text_continues():
    assert "".join(spoken([[0xFF], [97]])) == "\ufffda"


def test_a_sample_ends_at_end_of_text():
    assert spoken([[97], [256], [98]]) == ["a", ""]


def test_an_empty_prompt_starts_from_end_of_text():
    model = Script([[97]])
    list(complete(model, get_tokenizer("bytes"), "", 100))
    assert model.prompt == [[256]]


def test_several_samples_are_those_of_successive_seeds(sampled):
    before, *texts = re.split(r"\n?--- sample \d ---\n", sampled("--prompt", "ab", "--num_samples", 3))
    assert before == "" and len(set(texts)) == 3
    assert texts == [sampled("--prompt", "ab", "--seed", seed) for seed in (1337, 1338, 1339)]


def test_text_appears_as_it_is_made(checkpoint, monkeypatch):
    seen = []

    class Terminal(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["--prompt", "ab", "--max_new_tokens", "30", "--temperature", "0"])
    assert seen[0] == "ab" and len(set(seen)) > 10
    assert all(seen[-1].startswith(earlier) for earlier in seen)


def test_a_prompt_longer_than_the_context_is_used_from_its_end_and_that_is_reported(checkpoint, capsys):
    def sample(prompt):
        main(["--prompt", prompt, "--max_new_tokens", "5"])
        return capsys.readouterr()

    long, short = sample("x" * 30 + "sixteen letters!"), sample("sixteen letters!")
    assert "has 46 tokens: the model sees at most the last 16" in long.err and "tokens" not in short.err
    assert long.out == "x" * 30 + short.out


def test_the_newest_best_checkpoint_is_the_default_and_is_named(checkpoint, model, capsys):
    Path("out/newer").mkdir()
    gpt.save_checkpoint("out/newer/best.pt", model, {"data": {"tokenizer": "bytes", "vocabulary": ""}})
    os.utime(checkpoint, (1, 1))
    main(["--max_new_tokens", "1"])
    assert f"sampling from {Path('out/newer/best.pt')}" in capsys.readouterr().err


def test_a_run_that_still_trains_is_newer_than_one_with_a_newer_best_checkpoint(checkpoint, model, capsys):
    meta = {"data": {"tokenizer": "bytes", "vocabulary": ""}}
    for time, path in ((2, "out/older/best.pt"), (3, "out/newer/last.pt"), (1, "out/newer/best.pt")):
        Path(path).parent.mkdir(exist_ok=True)
        gpt.save_checkpoint(path, model, meta)
        os.utime(path, (time, time))
    os.utime(checkpoint, (1, 1))
    Path("out/newer/epoch_0004.pt").symlink_to("nowhere")
    main(["--max_new_tokens", "1"])
    assert f"sampling from {Path('out/newer/best.pt')}" in capsys.readouterr().err


def test_characters_that_a_console_does_not_know_become_question_marks(checkpoint):
    command = [sys.executable, ROOT / "sample.py", "--prompt", "20 € in 東京", "--max_new_tokens", "1"]
    result = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert result.stdout.decode("cp1252").startswith("20 € in ??")


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 60])
def test_the_probabilities_of_a_prompt_are_the_softmax_of_the_logits_in_the_context(model, length):
    ids = torch.randint(257, (length,))
    pairs = list(token_probabilities(model, ids.tolist(), 0, 256))
    context = ids[-16:]
    with torch.inference_mode():
        expected = model(context.unsqueeze(0))[0, :-1].softmax(-1)
    assert [token for token, _ in pairs] == context[1:].tolist()
    assert all(torch.allclose(row, other, atol=1e-6)
               for (_, row), other in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("length, max_new_tokens", [(1, 16), (5, 12), (16, 1), (40, 1)])
def test_the_probabilities_of_a_new_token_are_those_it_was_drawn_from(model, length, max_new_tokens):
    ids = torch.randint(256, (length,)).tolist()
    n_prompt = min(length, 16) - 1
    context = ids[-16:]
    pairs = list(token_probabilities(
        model, ids, max_new_tokens, None, temperature=1.0, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    assert len(pairs) == n_prompt + max_new_tokens
    for token, row in pairs[n_prompt:]:
        with torch.inference_mode():
            expected = model(torch.tensor([context]))[0, -1].softmax(-1)
        assert torch.allclose(row, expected, atol=1e-6)
        falling, tokens = row.sort(descending=True)
        assert token == tokens[torch.multinomial(falling, 1, generator=generator)].item()
        context.append(token)


def test_temperature_top_k_and_top_p_change_what_is_drawn_and_not_the_probabilities(model):
    options = {"temperature": 0, "top_k": 1, "top_p": 0.1}
    for token, row in token_probabilities(model, [1], 15, None, **options):
        assert token == row.argmax() and row.sum().item() == pytest.approx(1, abs=1e-5) and row.min() > 0


def test_beyond_the_context_each_probability_still_depends_on_half_of_it(model):
    ids, rows = [7], []
    for token, row in token_probabilities(model, [7], 59, None, generator=torch.Generator().manual_seed(0)):
        ids.append(token)
        rows.append(row)
    assert torch.stack(rows).shape == (59, 257)
    for i, row in enumerate(rows[16:], start=16):
        contexts = [torch.tensor([ids[i + 1 - length:i + 1]]) for length in range(8, 17)]
        with torch.inference_mode():
            expected = [model(context)[0, -1].softmax(-1) for context in contexts]
        assert any(torch.allclose(row, other, atol=1e-6) for other in expected), i


def test_the_probabilities_end_with_end_of_text(model):
    token = next(token_probabilities(model, [1], 1, None, temperature=0))[0]
    assert len(list(token_probabilities(model, [1], 9, token, temperature=0))) == 1


def test_each_token_is_shown_with_its_probability_and_its_rivals(sampled, model):
    flags = ["--prompt", "abcdef", "--show_probs", "--max_new_tokens", 2, "--dtype", "float32"]
    lines = sampled(*flags, "--temperature", 0).splitlines()
    assert [line[0] for line in lines] == [" ", " ", " ", " ", " ", ">", ">"]       # > is new
    pairs = token_probabilities(model, list(b"abcdef"), 2, 256, temperature=0)
    for line, (token, row) in zip(lines, pairs, strict=True):
        rivals = [share for i, share in enumerate(row.tolist()) if i != token]
        shown = [float(percent) / 100 for percent in re.findall(r"([\d.]+)%(?:  |$)", line)]
        assert shown == pytest.approx([row[token].item(), *sorted(rivals)[:-4:-1]], abs=0.00051)
    assert [line.split("%", 1)[1].split()[0] for line in lines[:5]] == [repr(c) for c in "bcdef"]


def test_of_a_prompt_of_20_000_tokens_only_the_context_is_shown(sampled):
    prompt = "x" * 19_984 + "sixteen letters!"
    flags = ["--show_probs", "--max_new_tokens", 2, "--dtype", "float32"]
    lines = sampled("--prompt", prompt, *flags).splitlines()
    assert [line[0] for line in lines] == [" "] * 15 + [">"] * 2
    shown = [re.match(r". +[\d.]+%  ('.+?')  ", line)[1] for line in lines[:15]]
    assert shown == [repr(letter) for letter in "ixteen letters!"]
    assert lines == sampled("--prompt", "sixteen letters!", *flags).splitlines()


def test_probabilities_appear_as_they_are_made(checkpoint, monkeypatch):
    seen, generate = [], gpt.GPT.generate

    class Terminal(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    def generating(*args, **options):
        for n_lines, next_ids in enumerate(generate(*args, **options), start=5):
            assert seen[-1].count("\n") == n_lines     # all before this one
            yield next_ids

    monkeypatch.setattr(gpt.GPT, "generate", generating)
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["--prompt", "abcdef", "--show_probs", "--max_new_tokens", "9"])
    assert [text.count("\n") for text in seen] == [*range(1, 15), 14]


def test_on_a_terminal_likely_tokens_are_green_and_unlikely_ones_red(sampled, monkeypatch):
    flags = ["--prompt", "ab", "--show_probs", "--max_new_tokens", 9]
    assert "\033" not in sampled(*flags)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for line in sampled(*flags).splitlines():
        colour, share = re.match(r"\033\[(\d+)m. +([\d.]+)%", line).groups()
        assert int(colour) == (32 if float(share) >= 50 else 33 if float(share) >= 10 else 31)


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
    (["--checkpoint", "out/none"], "there is no out/none: run train.py first, or pass a file"),
    (["--checkpoint", "odd.pt"], "odd.pt has 99 tokens, but the tokenizer bytes has 257"),
    (["--checkpoint", "text.pt"], "text.pt is damaged, cut short, or not a checkpoint of this program"),
    (["--temperature", "-1"], "argument --temperature: must be a number from 0 to 1e35, not '-1'"),
    (["--checkpoint", "out"], "out has no last.pt, and no model in Hugging Face's format: wait until"),
    (["--num_samples", "2", "--show_probs"], "--show_probs: not allowed with argument --num_samples"),
    (["--temperature", "hot"], "argument --temperature: must be a number from 0 to 1e35, not 'hot'"),
    (["--temperature", "nan"], "argument --temperature: must be a number from 0 to 1e35, not 'nan'"),
    (["--top_k", "0"], "argument --top_k: must be a whole number above 0 and below 2^31, not '0'"),
    (["--top_p", "0"], "argument --top_p: must be a number above 0, at most 1, not '0'"),
    (["--top_p", "1.1"], "argument --top_p: must be a number above 0, at most 1, not '1.1'"),
    (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2^32 - 1, not '-1'"),
    (["--device", "warp"], "there is no device warp here"),
    (["--speed", "9"], "unrecognized arguments: --speed")])
def test_a_mistake_is_reported_in_one_line(fails, model, flags, message):
    Path("text.pt").write_text("no checkpoint")
    Path("out").mkdir()
    odd = gpt.GPT(gpt.GPTConfig(vocab_size=99, n_layer=1, n_head=1, n_embd=8))
    gpt.save_checkpoint("odd.pt", odd, {"data": {"tokenizer": "bytes", "vocabulary": ""}})
    fails(main, flags, message)


def test_without_any_checkpoint_the_way_to_one_is_named(fails):
    fails(main, [], "there is no checkpoint in out/: run train.py first, or pass one with --checkpoint")
