"""The shape of the four files: the idea first, the plumbing after."""

import ast

import pytest
from conftest import ROOT

IDEA = {"gpt.py": 314, "prepare.py": 200, "sample.py": 75, "train.py": 320}     # lines at most
IMPORTS = {"gpt.py": set(), "prepare.py": set(), "sample.py": {"gpt", "prepare"},
           "train.py": {"gpt", "prepare", "sample"}}
SCREEN = 50


def halves(name):
    """The lines of the idea and of the plumbing."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    [banner] = [i for i, line in enumerate(lines) if line.startswith("# ====") and line.endswith("plumbing")]
    return lines[:banner], lines[banner:]


@pytest.mark.parametrize("name", IDEA)
def test_the_idea_fits_into_its_lines(name):
    idea, plumbing = halves(name)
    print(f"{name}: {len(idea)} lines of idea, {len(plumbing)} of plumbing")
    assert len(idea) <= IDEA[name]


@pytest.mark.parametrize("name", IDEA)
def test_no_function_of_the_idea_is_longer_than_a_screen(name):
    n_lines = len(halves(name)[0])
    functions = [node for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef) and node.lineno <= n_lines]
    assert functions and all(node.end_lineno - node.lineno < SCREEN for node in functions)


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_imports_only_files_that_are_read_before_it(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found & {"gpt", "prepare", "sample", "train"} == IMPORTS[name]
