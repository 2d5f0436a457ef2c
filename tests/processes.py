"""Starts train.py in other processes, without the seconds that importing torch takes: they fork from one that
has imported it. They import the four source files themselves, from any folder."""

import multiprocessing
import os
import sys

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["numpy", "torch", "torch._dynamo", "torch.distributed", "tiktoken"])

# Code that leaves out samples and curves, which take most of a tiny run's time.
BARE = "import train; train.show_sample_and_curves = lambda run: None\n"


def start(source, flags, folder, environment, output, first=BARE, torchrun=None):
    """Returns a process that calls train.main(flags) in a folder, with the source files of another one, after
    the code `first`. What it prints goes to two files, output.out and output.err. With options of torchrun,
    the process is one of torchrun instead, and starts the ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = FORKSERVER.Process(target=main, daemon=not torchrun, args=(
        str(source), list(map(str, flags)), str(folder), environment, str(output), first, torchrun))
    process.start()
    return process


def main(source, flags, folder, environment, output, first, torchrun):
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if torchrun:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        torchrun = {"start_method": "fork", "rdzv_backend": "c10d", "run_id": "job", **torchrun}
        elastic_launch(LaunchConfig(**torchrun), train)(source, flags, first)
    else:
        train(source, flags, first)


def train(source, flags, first):
    sys.path.insert(0, source)
    import torch
    torch.set_num_threads(1)
    exec(first, {})
    import train
    train.main(flags)
