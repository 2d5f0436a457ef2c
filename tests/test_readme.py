"""The exercises of the README."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import kill

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


@pytest.mark.parametrize("name, file, diff", EXERCISES, ids=[name for name, _, _ in EXERCISES])
def test_each_change_that_the_readme_proposes_fits_and_trains(name, file, diff, data):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, ".")
    Path(file).write_text(changed(Path(file).read_text(encoding="utf-8"), diff), encoding="utf-8")
    command = [sys.executable, "-c", kill.PROGRAM, "--data", data, "--max_steps", "2", "--block_size", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "step 2/2 | validation loss" in result.stdout, result.stderr


def test_there_are_exercises_for_all_that_one_may_want_to_change():
    assert len(EXERCISES) == README.count("```diff") == 7
