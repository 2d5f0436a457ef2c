"""The exercises of the README."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, ranks

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES = re.findall(r"^\*\*(.+?)\*\*.*?^```diff\n--- (\S+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def changed(source, diff):
    """Returns a text with a diff applied, whose hunks, between lines of @@, fit at exactly one place each."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    return source


@pytest.mark.parametrize("name, file, diff, sizes", [
    *((*exercise, []) for exercise in EXERCISES),
    *((*exercise, ["--n_embd", "114", "--n_head", "2"]) for exercise in EXERCISES
      if exercise[0] == "Rotary positions")],
    ids=[*(name for name, _, _ in EXERCISES), "Rotary positions at head size 57"])
def test_each_exercise_of_the_readme_fits_and_trains_in_two_processes(name, file, diff, sizes, data):
    copy = Path("copy")
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    (copy / file).write_text(changed((copy / file).read_text(encoding="utf-8"), diff), encoding="utf-8")
    flags = ["--data", data, "--max_steps", 2, "--block_size", 16, *sizes]
    first, second = ranks(2, *flags, source=copy.resolve())
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "step 2/2 | validation loss" in first.stdout


def test_there_are_exercises_for_all_that_one_may_want_to_change():
    assert len(EXERCISES) == README.count("```diff") == 7
