"""What concerns GPUs. Without one, this is checked with patched numbers of devices, or by taking a GPU's way
on the CPU. Where there is one, the last test trains on it, in a process that sees it."""

import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from conftest import GPU, QUICK, ROOT, log, run, same_weights

import gpt
import prepare
import train

ODD = gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=38)     # head size 19


# ----------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("T, S", [(16, 16), (1, 9)])
def test_a_padded_head_size_changes_neither_values_nor_gradients(monkeypatch, T, S):
    q, k, v = (torch.randn(2, 3, n, 57, requires_grad=True) for n in (T, S, S))
    expected = gpt.attention(q, k, v, 0.0)
    gradients = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    monkeypatch.setattr(gpt, "PADDED", ("cpu",))
    found = gpt.fused_attention(q, k, v, 0.0)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found.sin().sum(), (q, k, v)), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_kernel_gets_head_sizes_that_older_gpus_have_it_for(monkeypatch):
    seen, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **options: seen.append(
        (q.shape[-1], options["scale"])) or kernel(q, *args, **options))
    assert gpt.PADDED == ("cuda",)
    monkeypatch.setattr(gpt, "PADDED", ("cpu",))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    gpt.GPT(ODD).train()(ids, ids).backward()
    assert seen == [(24, 1 / math.sqrt(19))] * 2


def test_a_head_size_that_needs_no_padding_is_not_copied(monkeypatch):
    monkeypatch.setattr(gpt, "PADDED", ("cpu",))
    monkeypatch.setattr(F, "pad", lambda *args: pytest.fail("it copies"))
    q = torch.randn(2, 3, 16, 64)
    assert torch.allclose(gpt.fused_attention(q, q, q, 0.0), gpt.attention(q, q, q, 0.0), atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_what_the_model_makes_is_on_its_own_device(fused):
    with torch.device("meta"):      # which has shapes but no data, and refuses most others
        model, ids = gpt.GPT(ODD, fused), torch.zeros(2, 16).long()
    caches = [gpt.KVCache(model, 2) for _ in model.h]
    model(ids, ids).backward()
    with torch.inference_mode():
        made = [model(ids), model.hidden(ids, caches), *(p.grad for p in model.parameters())]
        made += [caches[0].keys, train.orthogonalize(made[1], torch.bfloat16)]
        made += [gpt.next_token(made[0][:, -1], 1.0, *options, None) for options in ((None, None), (9, 0.9))]
    assert {x.device.type for x in made} == {"meta"}


# --------------------------------------------------------------------------------------------- compilation

def test_the_model_and_its_loss_are_one_graph():
    graphs, model, ids = torch._dynamo.testing.CompileCounter(), gpt.GPT(ODD), torch.zeros(2, 16).long()
    torch._dynamo.reset()
    torch.compile(model, backend=graphs, fullgraph=True)(ids, ids).backward()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("block_by_block, n_graphs", [(True, 2), (False, 1)])     # of a block and of the loss
def test_compiled_blocks_share_a_graph_and_all_share_weights(monkeypatch, block_by_block, n_graphs):
    graphs, model = torch._dynamo.testing.CompileCounter(), gpt.GPT(ODD)
    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend=graphs, fullgraph=True))
    compiled, ids = train.compiled(model, block_by_block), torch.randint(257, (2, 16))
    compiled(ids, ids).backward()
    assert graphs.frame_count == n_graphs
    ours, theirs = dict(model.named_parameters()), dict(compiled.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert model(ids, ids).item() == pytest.approx(compiled(ids, ids).item(), rel=1e-6)
    assert model.h[0]._compiled_call_impl is None       # generation stays as it is


def test_compile_trains_a_compiled_model(data, monkeypatch):
    made = []
    monkeypatch.setattr(train, "compiled", lambda model, block_by_block: made.append(block_by_block) or model)
    model, _ = run("--max_steps", 2, "--compile")
    plain, _ = run("--max_steps", 2, out="out/plain")
    assert made == [False] and same_weights(model, plain)


# ----------------------------------------------------------------------------------------- several processes

@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, rank=, of=) pretends that there are n GPUs, and that this is a rank of several."""
    def pretend(n, rank=0, of=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of,
                            "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
    return pretend


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus_are_refused_by_each_rank_without_waiting(gpus, monkeypatch, rank):
    gpus(1, rank, of=2)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: pytest.fail("it waits for the others"))
    with pytest.raises(prepare.UserError) as error:
        train.World(torch.device("cuda"))
    assert str(error.value) == ("2 processes need as many GPUs, but there are 1: use torchrun "
                                "--nproc_per_node=1, or add --device cpu")


@pytest.mark.parametrize("nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_where_there_is_no_nccl_gloo_does_its_work(gpus, monkeypatch, nccl, backend):
    gpus(2, 1, of=2)
    begun = []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(None, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: begun.append(name))
    assert train.World(torch.device("cuda")).device == torch.device("cuda", 1) and begun == [backend]


# -------------------------------------------------------------------------------------------------- choices

@pytest.mark.parametrize("n_tokens, model", [(1_800, "nano"), (185_517_137, "gpt2-92m")])
def test_with_a_gpu_the_model_depends_on_how_much_data_there_is(data, monkeypatch, n_tokens, model):
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda"))
    meta = prepare.load_meta(data)
    meta["train"]["tokens"] = n_tokens
    monkeypatch.setattr(train, "load_meta", lambda folder: meta)
    assert train.parse_args(["--data", data])[0].model == model


def test_evaluations_are_of_some_sequences_and_the_last_one_of_all(data, monkeypatch):
    counts, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, sequences, count, *args: counts.append(
        count) or evaluate(model, sequences, count, *args))
    run("--max_steps", 4, "--eval_interval", 2, "--eval_sequences", 5)
    assert counts == [5, 5, 12]
    loss = gpt.load_checkpoint("out/text/best.pt")[1]["best_val_loss"]
    assert loss != log()[-1]["val_loss"]        # the best one is chosen on the same sequences each time


def test_by_default_evaluations_take_a_few_percent_of_the_time_of_two_gpus():
    default = train.make_parser().get_default
    trained = default("eval_interval") * 2 * default("batch_size")
    assert default("eval_sequences") / 3 < 0.03 * trained       # forward is a third of a training step


@pytest.mark.parametrize("device, precision", [("cuda", "high"), ("cpu", "highest")])
def test_float32_on_a_gpu_uses_tensor_cores(fails, data, monkeypatch, device, precision):
    def reached(*args):
        raise prepare.UserError(f"precision {torch.get_float32_matmul_precision()}")

    closed = []         # nccl complains about a process that ends without
    world = SimpleNamespace(device=torch.device(device), close=lambda: closed.append(1))
    monkeypatch.setattr(train, "World", lambda device: world)
    monkeypatch.setattr(train, "choose_dtype", lambda *args: torch.float32)
    monkeypatch.setattr(train, "set_up", reached)
    fails(train.main, [*QUICK, "--out", "out/new"], f"precision {precision}\n")
    assert closed == [1]
    torch.set_float32_matmul_precision("highest")


def test_bfloat16_on_a_gpu_without_hardware_for_it_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(gpt, "mixed_precision", lambda device, dtype: nullcontext())
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: torch.zeros(8, 8))
    assert gpt.choose_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16
    assert "this GPU has no hardware bfloat16: float16 is faster" in capsys.readouterr().err


def test_a_device_that_multiplies_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda x, name: x + 1)      # what the device makes of it
    with pytest.raises(gpt.ModelError, match=r"matmuls on cpu are wrong in PyTorch .*: use --device cpu"):
        gpt.choose_device("cpu")


def test_the_memory_of_a_gpu_is_what_pytorch_reserves_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2)
    assert train.peak_memory(torch.device("cuda")) == 3


def test_these_tests_see_no_gpu():
    assert not torch.cuda.is_available()


def test_muon_steps_by_tiny_learning_rates_in_float16_as_in_float32():
    steps = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(8, 8))
        weight.grad = torch.randn(8, 8)
        muon = train.Muon([{"params": [weight], "parts": 1}], 0.0, dtype)
        muon.param_groups[0]["lr"] = 1e-7
        muon.step()
        steps.append(weight.detach())
    assert torch.allclose(*steps, rtol=0.03, atol=1e-9)


def test_the_loss_learns_from_a_target_whose_probability_is_almost_1():
    # In bfloat16 that probability is 1, and minus 1 it would be 0: nothing left to learn.
    x, targets = torch.ones(1, 4, 1), torch.zeros(1, 4, dtype=torch.int64)
    weight = torch.tensor([[8.0], [0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        leaf = weight.clone().to(dtype).requires_grad_()
        gpt.chunked_cross_entropy(x.to(dtype), leaf, targets, 2).backward()
        assert leaf.grad[0].item() == pytest.approx(-1 / (1 + math.exp(8)), rel=0.02)


# --------------------------------------------------------------------------------------------- by the clock

@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_minutes_become_steps_once_and_measuring_leaves_no_trace(data, monkeypatch, dtype):
    measure = train.seconds_per_step
    monkeypatch.setattr(train, "seconds_per_step", lambda run: measure(run) and 0.6)
    flags = ["--dtype", dtype, "--dropout", "0.1"]
    timed, meta = run("--minutes", 0.06, *flags)
    assert meta["step"] == meta["args"]["max_steps"] == 6
    plain, _ = run("--max_steps", 6, *flags, out="out/plain")
    assert same_weights(timed, plain)
    run("--minutes", 0.06, *flags, "--max_minutes", 1e-9, out="out/stopped")
    monkeypatch.setattr(train, "seconds_per_step", lambda run: pytest.fail("measured again"))
    train.main(["--out", "out/stopped", "--resume", "--minutes", "0.06", "--max_minutes", "9"])
    resumed, _ = gpt.load_checkpoint("out/stopped/last.pt")
    assert same_weights(timed, resumed)


def test_it_trains_for_about_that_long(data):
    run("--minutes", 0.05, "--log_interval", 1, "--eval_interval", 100_000)
    seconds = [row["seconds"] for row in log() if "seconds" in row][-1]
    assert 0.5 < seconds < 20 and math.isfinite(log()[-1]["val_loss"])


# ---------------------------------------------------------------------------------------------------- a GPU

@pytest.mark.skipif(GPU is None, reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_it_trains_on_a_gpu(data, dtype, compile):
    flags = [*QUICK[:2], "--n_layer", "2", "--n_embd", "38", "--n_head", "2", "--block_size", "16",
             "--max_steps", "60", "--dtype", dtype, "--device", "cuda", compile, "--out", "out/text"]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True, timeout=300, env=GPU)
    assert log()[-1]["val_loss"] < 0.8 * math.log(257) and Path("out/text/last.pt").exists()
