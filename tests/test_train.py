import copy
import json
import math
import platform
import re
import shutil
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, all_rows, log, run, same_weights

import gpt
import prepare
import train
from train import Batches, Sequences, World, learning_rate, main

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- data

def nothing(n):
    """n tokens that take no memory."""
    return np.broadcast_to(np.uint16(0), n)


@pytest.mark.parametrize("n, block_size, stride, sequences", [
    (185_517_137, 512, 256, 724_675), (20_613_016, 512, 256, 80_518), (17, 16, 16, 1), (32, 16, 16, 1),
    (33, 16, 16, 2), (33, 16, 1, 17), (18, 16, 1, 2)])
def test_how_many_sequences_a_number_of_tokens_has(n, block_size, stride, sequences):
    assert len(Sequences(nothing(n), block_size, stride, 1)) == sequences


def test_a_sequence_is_inputs_and_the_tokens_one_further_on_as_targets():
    sequences = Sequences(np.arange(100, dtype=np.uint16), 4, 3, 100)
    inputs, targets = sequences.read([0, 2, len(sequences) - 1], CPU)
    assert inputs.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [93, 94, 95, 96]]
    assert targets.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10], [94, 95, 96, 97]]
    assert inputs.dtype == torch.int64


def world(rank=0, size=1):
    world = World(CPU)
    world.rank, world.size = rank, size
    return world


def order(n, offsets, seed=1):
    """The sequences, of n, at these offsets in the order of training."""
    sequences = Sequences(np.arange(n + 1, dtype=np.uint16), 1, 1, n + 1)       # inputs are their indices
    batches = Batches(sequences, 1, 1, seed, world())
    return np.array([batches(offset)[0][0].item() for offset in offsets])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_each_epoch_has_each_sequence_once_and_in_an_order_of_its_own(n):
    epochs = order(n, range(3 * n)).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 64:
        assert len({tuple(epoch) for epoch in [*epochs, order(n, range(n), seed=2)]}) == 4


def test_the_order_looks_random():
    n = 10_000
    order = train.epoch_order(n, 1, 0).astype(int)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 10                     # a shuffle leaves 1 such pair, on average
    first_half = np.sort(order[:n // 2])
    assert np.abs(first_half - np.arange(n // 2) * 2).max() < 0.03 * n      # drawn evenly from everywhere


def test_any_offset_in_the_order_can_be_asked_for_first_and_a_share_may_lie_in_several_epochs():
    n = 1000
    offsets = [3 * n + 5, 7, n - 1]
    assert order(n, offsets).tolist() == [order(n, [offset]).item() for offset in offsets]
    sequences = Sequences(np.arange(n + 1, dtype=np.uint16), 1, 1, n + 1)
    [(inputs, _)] = Batches(sequences, 2 * n, 2 * n, 1, world())(n - 3)
    assert inputs[:, 0].tolist() == order(n, range(n - 3, 3 * n - 3)).tolist()


@pytest.mark.parametrize("size, batch_size, micro_batch_size", [
    (1, 12, 12), (1, 3, 3), (2, 6, 6), (4, 3, 3), (3, 2, 2), (1, 100, 12), (1, 5, 4), (2, 5, 3)])
def test_ranks_and_micro_batches_only_slice_the_global_batch(size, batch_size, micro_batch_size):
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 4, 4, 1000)
    for offset in (0, 12, 600):
        parts = [inputs for rank in range(size)
                 for inputs, _ in Batches(sequences, 12, batch_size, 1, world(rank, size))(offset)]
        assert all(part.shape == (micro_batch_size, 4) for part in parts)
        [(whole, _)] = Batches(sequences, 12, 12, 1, world())(offset)
        assert torch.equal(torch.cat(parts), whole)


def test_an_epoch_of_steps_reads_each_sequence_once():
    sequences = Sequences(np.arange(241, dtype=np.uint16), 4, 4, 1000)
    batches = Batches(sequences, 6, 6, 1, world())
    assert len(sequences) == 60
    firsts = Counter(token for offset in range(0, 60, 6) for token in batches(offset)[0][0][:, 0].tolist())
    assert firsts == Counter(range(0, 240, 4))


# ----------------------------------------------------------------------------------------- optimization

@pytest.mark.parametrize("schedule, step, rate", [
    ("linear", 0, 6e-4 / 11), ("linear", 9, 6e-4 * 10 / 11), ("linear", 10, 6e-4), ("linear", 55, 3.3e-4),
    ("linear", 99, 6e-5 + 5.4e-4 / 90), ("linear", 100, 6e-5),
    ("cosine", 0, 6e-4 / 11), ("cosine", 10, 6e-4), ("cosine", 55, 3.3e-4), ("cosine", 100, 6e-5),
    ("cosine", 99, 6e-5 + 5.4e-4 * (1 + math.cos(math.pi * 89 / 90)) / 2),
    ("trapezoid", 0, 6e-4 / 11), ("trapezoid", 10, 6e-4), ("trapezoid", 64, 6e-4),
    ("trapezoid", 65, 6e-5 + 5.4e-4 * 35 / 36), ("trapezoid", 82, 3.3e-4), ("trapezoid", 100, 6e-5)])
def test_the_learning_rate_schedule(schedule, step, rate):
    assert learning_rate(step, 100, 0.1, 6e-4, 6e-5, schedule) == pytest.approx(rate)


def test_without_warmup_the_learning_rate_starts_at_its_peak():
    assert learning_rate(0, 100, 0, 6e-4, 0.0, "linear") == 6e-4


def groups(name, model):
    """The groups of all optimizers."""
    optimizers = train.make_optimizers(name, model, 0.1, CPU, torch.float32)
    return [group for optimizer in optimizers for group in optimizer.param_groups]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(tiny, name):
    model = gpt.GPT(tiny)
    decay = {(p.dim(), group["weight_decay"]) for group in groups(name, model) for p in group["params"]}
    assert decay == {(2, 0.1), (1, 0.0)}
    assert sorted(id(p) for group in groups(name, model) for p in group["params"]) == sorted(
        map(id, model.parameters()))


@pytest.mark.parametrize("name, scale", [("adamw", 1), ("muon", 4)])
def test_beside_muon_embeddings_get_four_times_the_learning_rate(tiny, name, scale):
    model = gpt.GPT(tiny)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = train.make_optimizers(name, model, 0.1, CPU, torch.float32)
    train.update(optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0, 1.0, 0.01)
    rates = {id(p): group["lr"] for optimizer in optimizers for group in optimizer.param_groups
             for p in group["params"]}
    assert rates[id(model.wte.weight)] == rates[id(model.wpe.weight)] == 0.01 * scale
    assert rates[id(model.h[0].mlp.c_fc.weight)] == rates[id(model.ln_f.bias)] == 0.01


@pytest.mark.parametrize("shape", [(3, 40, 64), (2, 96, 24)])
def test_muon_brings_the_singular_values_of_matrices_near_1_and_keeps_their_directions(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    s = u.mT @ train.orthogonalize(1000 * x, x.dtype) @ v.mT
    diagonal = s.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    assert (s - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_a_step_of_muon_moves_matrices_in_blocks_by_their_orthogonal_momentum_and_the_rest_as_adamw(tiny):
    before = gpt.GPT(tiny)
    by_muon, by_adamw = copy.deepcopy(before), copy.deepcopy(before)
    for name, model in ("muon", by_muon), ("adamw", by_adamw):
        optimizers = train.make_optimizers(name, model, 0.1, CPU, torch.float32)
        for i in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.dim() < 2 else torch.eye(*p.shape) * (i + 1)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.01
                optimizer.step()
    for (name, p), start, other in zip(
            by_muon.named_parameters(), before.parameters(), by_adamw.parameters(), strict=True):
        if name.startswith("h.") and p.dim() == 2:
            parts = torch.eye(*p.shape).split(p.shape[1]) if "c_attn" in name else [torch.eye(*p.shape)]
            directions = [0.2 * max(part.shape) ** 0.5 * train.orthogonalize(part[None], p.dtype)[0]
                          for part in parts]
            for _ in range(2):      # the mean of multiples of a matrix is a multiple, too
                start = start * (1 - 0.01 * 0.1) - 0.01 * torch.cat(directions)
            assert torch.allclose(p, start, atol=1e-6), name
        else:
            assert torch.equal(p, other), name


def test_muon_takes_c_attn_apart_and_no_other_matrix_of_its_shape(tiny):
    model = gpt.GPT(replace(tiny, mlp_ratio=3))
    _, muon = train.make_optimizers("muon", model, 0.1, CPU, torch.float32)
    parts = {id(p): group["parts"] for group in muon.param_groups for p in group["params"]}
    assert model.h[0].attn.c_attn.weight.shape == model.h[0].mlp.c_fc.weight.shape
    assert (parts[id(model.h[0].attn.c_attn.weight)], parts[id(model.h[0].mlp.c_fc.weight)]) == (3, 1)


def test_the_momentum_of_muon_is_a_running_mean_with_nesterovs_look_ahead(monkeypatch):
    found, mean = [], 0
    monkeypatch.setattr(train, "orthogonalize", lambda x, dtype: found.append(x[0]) or x)
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    muon = train.Muon([{"params": [weight], "parts": 1}], 0.1, torch.float32)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        mean = 0.9 * mean + 0.1 * weight.grad
        muon.step()
        assert torch.allclose(found[-1], 0.9 * mean + 0.1 * weight.grad, atol=1e-6)


def test_muon_computes_in_the_dtype_of_matmuls_and_keeps_its_mean_in_float32(tiny, monkeypatch):
    seen, orthogonalize = set(), train.orthogonalize
    monkeypatch.setattr(train, "orthogonalize", lambda x, dtype: seen.add(dtype) or orthogonalize(x, dtype))
    model = gpt.GPT(tiny)
    _, muon = train.make_optimizers("muon", model, 0.1, CPU, torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon.step()
    assert seen == {torch.bfloat16}
    assert {state["mean"].dtype for state in muon.state.values()} == {torch.float32}


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def micro_batches_of(n):
    ids = torch.randint(257, (8, 17), generator=torch.Generator().manual_seed(1))
    return [(part[:, :-1], part[:, 1:]) for part in ids.chunk(n)]


def gradient_of_an_update(tiny, n_micro_batches, grad_clip=1e9):
    """What one update by plain gradient descent at learning rate 1 takes from the weights; loss and norm."""
    torch.manual_seed(0)
    model = gpt.GPT(tiny)
    before = weights(model)
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    loss = train.backward(model, micro_batches_of(n_micro_batches), scaler, nullcontext()).item()
    norm = train.clip_gradients(model, [optimizer], scaler, grad_clip)
    assert train.update([optimizer], scaler, loss, norm, lr=1.0)
    assert all(p.grad is None for p in model.parameters())
    return before - weights(model), loss, norm


@pytest.mark.parametrize("n_micro_batches", [2, 4, 8])
def test_micro_batches_give_the_gradient_and_the_loss_of_one_big_batch(tiny, n_micro_batches):
    whole, loss, norm = gradient_of_an_update(tiny, 1)
    parts, loss_of_parts, norm_of_parts = gradient_of_an_update(tiny, n_micro_batches)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert loss == pytest.approx(loss_of_parts) and norm == pytest.approx(norm_of_parts)


def test_gradients_are_clipped_to_a_norm_and_the_norm_before_is_reported(tiny):
    gradient, _, norm = gradient_of_an_update(tiny, 1)
    clipped, _, reported = gradient_of_an_update(tiny, 1, grad_clip=0.5)
    assert norm == reported == pytest.approx(gradient.norm().item(), rel=1e-4) and norm > 0.5
    assert torch.allclose(clipped, gradient * 0.5 / norm, atol=1e-6)


class OneLossIsInfinite(torch.nn.Module):
    """A model whose loss at one call, counted from 1, is infinite, though its gradient is finite."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call, self.calls = model, call, 0

    def forward(self, inputs, targets):
        self.calls += 1
        return self.model(inputs, targets) + (math.inf if self.calls == self.call else 0)


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("n_micro_batches, call", [(1, 1), (4, 1), (4, 3), (4, 4)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_leaves_the_weights_untouched_whatever_the_gradient(
        tiny, enabled, n_micro_batches, call, name):
    model = OneLossIsInfinite(gpt.GPT(tiny), call)
    optimizers = train.make_optimizers(name, model.model, 0.1, CPU, torch.float32)
    scaler, before = torch.amp.GradScaler("cpu", enabled=enabled), weights(model)
    loss = train.backward(model, micro_batches_of(n_micro_batches), scaler, nullcontext())
    norm = train.clip_gradients(model, optimizers, scaler, 1.0)
    assert loss == math.inf and math.isfinite(norm)
    assert not train.update(optimizers, scaler, loss, norm, lr=1.0)
    assert torch.equal(weights(model), before) and not any(optimizer.state for optimizer in optimizers)
    assert all(p.grad is None for p in model.parameters())      # nothing of it is left for the next step


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched_whatever_the_loss(tiny, enabled, value):
    model = gpt.GPT(tiny)
    optimizers = train.make_optimizers("muon", model, 0.1, CPU, torch.float32)
    scaler, before = torch.amp.GradScaler("cpu", enabled=enabled), weights(model)
    loss = train.backward(model, micro_batches_of(1), scaler, nullcontext())
    model.h[1].mlp.c_fc.weight.grad[3, 5] = value
    norm = train.clip_gradients(model, optimizers, scaler, 1.0)
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert not train.update(optimizers, scaler, loss, norm, lr=1.0)
    assert torch.equal(weights(model), before) and not any(optimizer.state for optimizer in optimizers)


# ------------------------------------------------------------------------------------------------ a run

def test_without_flags_and_without_a_gpu_it_trains_nano_and_says_why(data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(gpt.MODELS, "nano", gpt.MODELS["tiny"])
    Path(data).rename("data/python")
    main(["--max_steps", "1"])
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"training nano on cpu in \w+ \(no CUDA GPU available\); writing to out.python",
                        first)


def test_gpt2_92m_is_trained_with_the_defaults_of_the_parser():
    args, saved = train.parse_args(["--model", "gpt2-92m"])
    assert (args.epochs, args.max_steps, args.lr, args.schedule, args.batch_size) == (
        20.0, None, 6e-4, "linear", 16)
    assert (args.out, saved) == (str(Path("out/python")), None)


def test_a_flag_comes_before_the_recipe_of_the_model_and_that_before_the_parser(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in ([], ["--model", "nano"]):
        args, _ = train.parse_args(argv)
        assert args.model == "nano" and args.dropout is None
        assert {name: vars(args)[name] for name in train.RECIPES["nano"]} == train.RECIPES["nano"]
    args, _ = train.parse_args(["--lr", "1e-2", "--optimizer", "adamw"])
    assert (args.lr, args.optimizer, args.global_batch_size) == (1e-2, "adamw", 32)
    args, _ = train.parse_args(["--init", "gpt2"])
    assert (args.lr, args.epochs, args.max_steps, args.model) == (5e-5, 3.0, None, None)


def test_epochs_that_are_given_come_before_the_steps_of_the_recipe(monkeypatch):
    args, _ = train.parse_args(["--model", "nano", "--epochs", "2"])
    assert (args.epochs, args.max_steps) == (2.0, None)


def test_the_flags_of_the_schedule_and_of_clipping_reach_each_update(data, monkeypatch):
    seen, norms, update, clip = [], [], train.update, train.clip_gradients
    monkeypatch.setattr(train, "update", lambda *args: seen.append(args[-1]) or update(*args))
    monkeypatch.setattr(train, "clip_gradients", lambda *args: norms.append(args[-1]) or clip(*args))
    run("--max_steps", 8, "--schedule", "cosine", "--warmup", 0.25, "--lr", 0.1, "--min_lr", 0.01,
        "--grad_clip", 0.5, "--log_interval", 1, "--weight_decay", 0.2)
    rates = [learning_rate(step, 8, 0.25, 0.1, 0.01, "cosine") for step in range(8)]
    assert seen == rates and norms == [0.5] * 8
    assert [row["lr"] for row in log() if "lr" in row] == rates


def test_the_flags_of_the_data_and_of_evaluation_are_heeded(data, monkeypatch):
    seen, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, sequences, *args: seen.append(
        (len(sequences), *args[:2], model.training)) or evaluate(model, sequences, *args))
    _, meta = run("--epochs", 1, "--stride", 4, "--batch_size", 50, "--eval_interval", 8,
                  "--eval_sequences", 6)
    assert meta["step"] == 9                    # (1800 - 17) // 4 + 1 = 446 sequences, 50 at a time
    assert seen[0] == (12, 6, 50, False)        # (200 - 17) // 16 + 1 = 12, without overlap, to choose 6 from


@pytest.mark.parametrize("steps", [1, 7])
def test_it_makes_exactly_so_many_updates(data, steps):
    _, meta = run("--max_steps", steps)
    assert meta["step"] == steps
    assert {state["step"].item() for state in meta["optimizers"][0].values()} == {steps}


def test_epochs_are_rounded_up_to_whole_steps(data):
    sequences = (1800 - 17) // 16 + 1
    _, meta = run("--epochs", 2, "--global_batch_size", 32, "--eval_interval", 1000)
    assert sequences == 112 and meta["step"] == 7


def test_flags_change_the_sizes_of_a_model(data):
    model, _ = run("--max_steps", 1, "--n_layer", 1, "--n_embd", 48, "--n_head", 3, "--block_size", 8)
    assert model.config == gpt.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=3, n_embd=48)


def test_it_learns(data):
    run("--max_steps", 60, "--eval_interval", 30)
    losses = [row["val_loss"] for row in log() if "val_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0] < 0.8 * math.log(257)


def test_the_log_has_a_row_for_each_interval_and_each_evaluation(data):
    run("--max_steps", 6, "--log_interval", 2, "--eval_interval", 3)
    rows = log()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "loss_scale", "tokens_per_second",
                            "seconds"}
    assert set(rows[-1]) == {"step", "val_loss", "val_stderr", "bits_per_byte"}
    # A byte is a token here, but for the end-of-text among the last 200 tokens.
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["val_loss"] / math.log(2) * 200 / 199)


def test_each_start_of_a_run_appends_to_the_log_how_it_was_made(data):
    run("--max_steps", 1)
    main(["--out", "out/text", "--resume", "--max_steps", "2", "--lr", "1e-3"])
    first, again = (row for row in all_rows() if "step" not in row)
    assert all_rows()[0] == first and all_rows()[3] == again
    assert first.keys() == {"started_at_step", "args", "commit", "python", "torch"}
    assert (first["started_at_step"], again["started_at_step"]) == (0, 1)
    assert (first["args"]["lr"], again["args"]["lr"], again["args"]["batch_size"]) == (1e-2, 1e-3, 4)
    assert first["torch"] == torch.__version__ and first["python"] == platform.python_version()


def test_the_commit_is_that_of_the_code_wherever_it_runs(monkeypatch):
    if not shutil.which("git"):
        pytest.skip("needs git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd()))
    monkeypatch.setattr(train, "__file__", str(Path.cwd() / "code" / "train.py"))
    Path("code").mkdir()
    assert train.commit() is None       # no repository
    git = ["git", "-C", "code", "-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    Path("code/train.py").touch()
    for command in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "First"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    assert train.commit() == commit
    Path("code/train.py").write_text("changed")
    assert train.commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert train.commit() is None       # no git


def test_the_logged_loss_is_the_mean_over_all_micro_batches(data):
    run("--max_steps", 1, "--global_batch_size", 32)
    run("--max_steps", 1, "--batch_size", 32, out="out/whole")
    assert log()[0]["loss"] == pytest.approx(log("out/whole")[0]["loss"], rel=1e-6)


def test_the_terminal_shows_loss_learning_rate_speed_time_left_and_a_sample(data, capsys):
    run("--max_steps", 20, "--log_interval", 10)
    out = capsys.readouterr().out
    assert re.search(r"^step 10/20 \| epoch 0\.36 \| loss \d\.\d{4} \| lr \d\.\d\de-0\d \| "
                     r"[\d,]+ tokens/s \| \d+s left$", out, re.MULTILINE)
    assert re.search(r"^step 20/20 \| validation loss \d\.\d{4} ± 0\.\d{4} \| \d\.\d{3} bits per byte\n"
                     r"sample:\n    \S", out, re.MULTILINE)


def test_a_single_batch_of_validation_has_no_error_to_show(data, capsys):
    run("--max_steps", 1, "--batch_size", 99)
    assert re.search(r"validation loss \d\.\d{4} \| \d\.\d{3} bits", capsys.readouterr().out)
    assert log()[-1]["val_stderr"] is None


def test_validation_is_the_mean_over_its_sequences_and_knows_its_error(data, model):
    sequences = Sequences(prepare.load_tokens(data, "val"), 16, 1, 257)
    plain = nullcontext()
    with torch.no_grad():
        losses = torch.stack([model(*sequences.read([i], CPU)) for i in range(len(sequences))]).double()
    for batch_size in (1, 7):
        mean, _ = train.evaluate(model, sequences, len(sequences), batch_size, plain, world())
        assert mean == pytest.approx(losses.mean().item())
    mean, error = train.evaluate(model, sequences, 160, 1, plain, world())
    stretches = losses[[i * 184 // 160 for i in range(160)]].view(32, 5)       # each of five sequences
    assert mean == pytest.approx(stretches.mean().item())
    assert error == pytest.approx((stretches.mean(1).std() / 32 ** 0.5).item(), rel=1e-6)
    few, none = train.evaluate(model, sequences, 4, 4, plain, world())
    assert few == pytest.approx(losses[[0, 46, 92, 138]].mean().item()) and len(sequences) == 184
    assert math.isnan(none)     # one batch says nothing about the error


def test_validation_loss_and_error_do_not_depend_on_the_number_of_ranks(data, model):
    sequences = Sequences(prepare.load_tokens(data, "val"), 16, 1, 257)
    halves, first = [world(rank, 2) for rank in (0, 1)], []
    halves[0].sum = lambda *numbers: first.extend(numbers) or numbers
    halves[1].sum = lambda *numbers: [sum(both) for both in zip(first, numbers, strict=True)]
    for batch_size in (1, 7):
        first.clear()
        _, two = [train.evaluate(model, sequences, 50, batch_size, nullcontext(), half) for half in halves]
        assert two == pytest.approx(train.evaluate(model, sequences, 50, batch_size, nullcontext(), world()))


def test_evaluating_more_often_does_not_change_the_training(data):
    often, _ = run("--max_steps", 6, "--dropout", 0.1, "--eval_interval", 1, out="out/often")
    seldom, _ = run("--max_steps", 6, "--dropout", 0.1, out="out/seldom")
    assert same_weights(often, seldom)


def test_best_is_of_the_lowest_validation_loss_and_last_of_the_last_step(data):
    run("--max_steps", 40, "--eval_interval", 10, "--lr", 0.3, "--schedule", "linear")
    rows = [row for row in log() if "val_loss" in row]
    _, meta = gpt.load_checkpoint("out/text/best.pt")
    lowest = min(rows, key=lambda row: row["val_loss"])
    assert meta["step"] == lowest["step"] and meta["best_val_loss"] == lowest["val_loss"]
    assert gpt.load_checkpoint("out/text/last.pt")[1]["step"] == 40
    assert "optimizers" not in meta


def test_dropout_differs_between_steps_and_ranks_and_is_the_same_again():
    def dropped(*key):
        train.seed_dropout(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    assert len({dropped(*key) for key in keys}) == 4 and dropped(*keys[0]) == dropped(*keys[0])


def test_every_so_many_epochs_a_checkpoint_is_kept(data):
    run("--epochs", 5, "--keep_epochs", 2, "--batch_size", 20)
    kept = sorted(path.name for path in Path("out/text").glob("epoch_*.pt"))
    assert kept == ["epoch_0002.pt", "epoch_0004.pt"]
    assert [gpt.load_checkpoint(f"out/text/{name}")[1]["step"] for name in kept] == [12, 23]    # of 112 / 20


def test_a_checkpoint_remembers_the_flags_and_the_data(data):
    _, meta = run("--max_steps", 1)
    assert meta["args"]["lr"] == 1e-2 and meta["data"] == prepare.load_meta(data)


def test_float16_trains_with_a_loss_scale(data):
    _, meta = run("--max_steps", 3, "--dtype", "float16", "--log_interval", 1)
    assert [row["loss_scale"] for row in log() if "loss" in row] == [65536.0] * 3
    assert meta["scaler"]["_growth_tracker"] == 3       # steps without an overflow
    assert log()[2]["loss"] < log()[0]["loss"]


def test_in_float16_a_gradient_that_overflows_is_skipped_and_halves_the_scale(data, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0 ** 40))
    _, meta = run("--max_steps", 2, "--dtype", "float16", "--log_interval", 1)
    assert [row["loss_scale"] for row in log() if "loss" in row] == [2.0 ** 39, 2.0 ** 38]
    assert log()[0]["grad_norm"] is None            # infinite, which JSON cannot say
    assert meta["optimizers"] == [{}] and meta["skipped"] == 2                  # no step was taken


def test_on_a_cpu_float32_stays_float32(data):
    run("--max_steps", 1)
    assert torch.get_float32_matmul_precision() == "highest"


def test_float16_is_close_to_float32(data):
    run("--max_steps", 3, "--dtype", "float16", out="out/half")
    run("--max_steps", 3, out="out/single")
    assert log("out/half")[-1]["val_loss"] == pytest.approx(log("out/single")[-1]["val_loss"], abs=0.01)


def test_curves_are_drawn_where_matplotlib_is_installed(data, monkeypatch):
    pytest.importorskip("matplotlib")
    run("--max_steps", 3)
    assert Path("out/text/curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)       # as if it were not
    run("--max_steps", 3, out="out/without")
    assert not Path("out/without/curves.png").exists()


def test_curves_are_of_the_last_row_of_each_step_and_bear_what_is_not_finite(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: drawn.append(self))
    row = {"step": 1, "loss": 5.0, "lr": 1.0, "loss_scale": 1.0}
    rows = [{"started_at_step": 0, "args": {}}, {**row, "loss": 9.0}, {**row, "step": 2, "loss": 9.0},
            None, {"lr": 1.0}, {"started_at_step": 0, "args": {}}, row, {**row, "step": 2, "loss": 8.0},
            {**row, "step": 2, "loss": None}, {"step": 2, "val_loss": None, "val_stderr": None}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    train.draw_curves(tmp_path)
    training = drawn[0].axes[0].lines[0]
    assert training.get_xdata().tolist() == [1, 2]
    assert training.get_ydata()[0] == 5.0 and math.isnan(training.get_ydata()[1])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_is_the_same_training(data):
    compiled, _ = run("--max_steps", 3, "--n_layer", 1, "--compile", out="out/compiled")
    plain, _ = run("--max_steps", 3, "--n_layer", 1, out="out/plain")
    assert same_weights(compiled, plain, tolerance=1e-4)


# -------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    (["--model", "gpt5"], "argument --model: invalid choice: 'gpt5'"),
    (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    (["--speed", "9"], "unrecognized arguments: --speed 9"),
    (["--batch_size", "0"], "--batch_size: must be a whole number above 0 and below 2^31, not '0'"),
    (["--lr", "fast"], "argument --lr: must be a number above 0 and below 1e35, not 'fast'"),
    (["--lr", "nan"], "argument --lr: must be a number above 0 and below 1e35, not 'nan'"),
    (["--lr", "1e98"], "argument --lr: must be a number above 0 and below 1e35, not '1e98'"),
    (["--weight_decay", "1e98"], "must be a number from 0 to 1e35, not '1e98'"),
    (["--warmup", "1"], "argument --warmup: must be a number, at least 0 and below 1, not '1'"),
    (["--epochs", "1", "--max_steps", "1"], "argument --max_steps: not allowed with argument --epochs"),
    (["--n_embd", "33"], "n_embd (33) must be divisible by n_head (2)"),
    (["--device", "cuda:99"], "there is no device cuda:99 here"),
    (["--device", "warp"], "there is no device warp here"),
    (["--data", "data/none"], "data/none contains no prepared data (no meta.json): run prepare.py, or pass"),
    (["--data", "none"], "/none contains no prepared data (no meta.json): run prepare.py, or pass"),
    (["--block_size", "1000"], "data/text/val.bin has only 200 tokens and a sequence needs 1,001: prepare")])
def test_a_mistake_is_reported_in_one_line(fails, data, flags, says):
    fails(main, [*QUICK, "--out", "out/none", *flags], says)
    assert not list(Path().glob("out/none/*.pt"))


@pytest.mark.parametrize("name, content, says", [
    ("val.bin", b"odd", "val.bin has 3 bytes, but meta.json says 400: run prepare.py again"),
    ("train.bin", b"", "train.bin has 0 bytes, but meta.json says 3,600: run prepare.py again"),
    ("meta.json", b'{"format": 1,', "data/text is damaged, half-written, or from another version")])
def test_data_that_is_not_whole_is_reported_in_one_line(fails, data, name, content, says):
    Path(data, name).write_bytes(content)
    fails(main, QUICK, says)


def test_a_dtype_that_does_not_run_on_the_device_is_refused(fails, data, monkeypatch):
    def autocast(device_type, dtype):
        raise RuntimeError(f"unsupported dtype {dtype}")

    monkeypatch.setattr(torch, "autocast", autocast)
    fails(main, [*QUICK, "--dtype", "float16"], "float16 does not run on this cpu: use --dtype float32")
    run("--max_steps", 1)       # float32 does without


def test_a_token_outside_the_vocabulary_ends_the_run(fails, data):
    tokens = np.memmap("data/text/train.bin", prepare.TOKEN_DTYPE, mode="r+")
    tokens[900] = 300
    tokens.flush()
    fails(main, [*QUICK, "--epochs", 1],
          "the data is damaged (it contains token 300, but its vocabulary ends at 256): run prepare.py again")
