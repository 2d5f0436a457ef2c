"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares its end with that
of a run that was left alone.

    python tests/kill.py                50 times, in about three minutes
"""

import argparse
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import gpt  # noqa: E402
import prepare  # noqa: E402
import processes  # noqa: E402

# A run that saves after each step spends most of its time saving.
FLAGS = ["--data", "text", "--n_layer", "2", "--n_head", "2", "--n_embd", "256", "--block_size", "16",
         "--global_batch_size", "4", "--optimizer", "adamw", "--dropout", "0.1", "--dtype", "float32",
         "--eval_interval", "1", "--eval_sequences", "4"]


def start(folder, *flags):
    return processes.start(ROOT, [*FLAGS, *flags], folder, {}, f"{folder}/output")


def output(folder):
    return Path(folder, "output.out").read_text() + Path(folder, "output.err").read_text()


def finish(folder, *flags):
    process = start(folder, *flags)
    process.join(timeout=300)
    assert process.exitcode == 0, output(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    choose = random.Random(args.seed)
    with TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
        prepare.prepare([f"{folder}/text.txt"], f"{folder}/text", "bytes")
        flags = ["--max_steps", 12 * args.times]
        out = Path(folder, "out/killed")
        last, while_saving, steps = out / "last.pt", 0, []
        for _ in range(args.times):
            Path(folder, "output.out").unlink(missing_ok=True)
            process = start(folder, *flags, "--out", out, "--resume")
            while not (Path(folder, "output.out").exists() and Path(folder, "output.out").read_text()):
                assert process.is_alive(), output(folder)       # until it has begun
                time.sleep(0.01)
            before = time.time()
            time.sleep(choose.uniform(0, 1))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, output(folder)
            steps.append(gpt.load_checkpoint(last)[1]["step"] if last.exists() else 0)
            while_saving += any(path.stat().st_mtime > before for path in out.glob("*.tmp"))
        finish(folder, *flags, "--out", out, "--resume")
        finish(folder, *flags, "--out", "out/alone")
        killed, meta = gpt.load_checkpoint(last)
        alone, meta_alone = gpt.load_checkpoint(f"{folder}/out/alone/last.pt")
    assert steps == sorted(steps), steps
    assert meta["step"] == meta_alone["step"] == flags[1] and meta["offset"] == meta_alone["offset"]
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, killed.state_dict()[name]), name
    print(f"killed {args.times} times, {while_saving} of them while saving, and resumed from steps {steps}; "
          f"after {meta['step']:,} steps bit-for-bit identical to a run that was left alone")


if __name__ == "__main__":
    main()
