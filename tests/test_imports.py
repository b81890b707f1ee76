"""Imports go one way, whatever files there are: scripts > core > folders > leaves, without a cycle."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

AROUND = "tests", "tools"  # code about the project, which may import all of it
RUNNABLE_MODULE = "model"  # the only module that can also be run


def project_files():
    """Return {name under which a file is imported: its path}, of all Python files of the project."""
    files = {}
    for path in sorted(ROOT.glob("**/*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        hidden = any(name.startswith(".") for name in names)
        if not hidden and names[0] not in ("outputs", "data"):
            files[".".join(names).removesuffix(".__init__")] = path
    return files


FILES = project_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MODULES = [name for name in FILES if name.split(".")[0] not in AROUND]


def imported_names(name):
    """Return all names that a file imports, at its top or in a function: a.b and, of `from a import b`, both
    a and a.b.
    """
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_script(name):
    """Return whether a file is a command: at the top level, with a guard for being run."""
    guards = [node for node in TREES[name].body
              if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    return not in_folder(name) and bool(guards) and name != RUNNABLE_MODULE


def in_folder(name):
    """Return whether a module lies in a folder."""
    return FILES[name].parent != ROOT


IMPORTS = {name: imported_names(name) & set(MODULES) - {name} for name in MODULES}


def reached_from(name):
    """Return the modules that are imported where a module is, directly or by others."""
    reached, waiting = set(), [name]
    while waiting:
        new = IMPORTS[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    assert name not in reached_from(name), "an import leads back"
    assert not {other for other in IMPORTS[name] if is_script(other)}, "a script is imported"
    assert not {other for other in imported_names(name) if other.split(".")[0] in AROUND}
    if in_folder(name):
        for other in IMPORTS[name]:
            assert in_folder(other) or not any(map(in_folder, reached_from(other))), other


def test_training_imports_nothing_that_only_exported_models_need():
    code = "import sys, train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"onnxruntime", "openvino", "inference.backends"} & set(done.stdout.split())
