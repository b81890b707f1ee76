"""The shape of the code base: who imports whom, what is set before torch, what the README promises."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import config

PARTS = {  # files split off a leaf, and what they may import beside config
    "datasets": {"folder", "loading", "readers", "streets", "stratify"},
    "folder": {"readers", "scan", "stratify"},
    "scan": {"readers"},
    "stratify": {"readers"},
    "cache": {"loading", "processes", "utils"},
    "losses": {"upsample"},
    "utils": {"processes"},
    "plain": {"readers"},
    "runtimes": {"model", "upsample"},
    "model": {"backbones", "baselines", "heads", "upsample", "weights"},
    "backbones": {"weights"},
    "baselines": {"backbones", "heads", "weights"},
}
LEAVES = {"config", "losses", "metrics", "report", "utils", "video", *PARTS}.union(*PARTS.values())
FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = [path for path in FILES if path.stem not in LEAVES | {"engine"}]


def imports(path):
    """Return the names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_import_direction(path):
    ours = imports(path) & {file.stem for file in FILES}
    if path.stem == "config":
        allowed = set()
    elif path.stem in LEAVES:
        allowed = {"config"} | PARTS.get(path.stem, set())
    else:
        allowed = LEAVES if path.stem == "engine" else LEAVES | {"engine"}
    assert ours <= allowed, f"{path.name} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_its_purpose_and_works_at_no_import(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert "environ" in ast.unparse(node), f"{path.name} line {node.lineno} works when it is imported"


WATCH = """
import os, sys
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch)
sys.path.insert(0, ".")
import {name}
"""


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS] + ["model"])
@pytest.mark.parametrize("setting", [None, "0"])
def test_mps_fallback_is_set_before_torch_unless_the_user_did(name, setting, monkeypatch):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if setting:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", setting)
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(name=name)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == (setting or "1"), done.stderr


def test_readme_names_only_flags_and_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = {path.name: path.read_text(encoding="utf-8") for path in FILES}
    train_flags = {"--" + name.replace("_", "-") for name in config.TrainConfig.__dataclass_fields__} | {
        "--recipe"
    }
    for command in re.findall(r"python (\w+\.py)([^\n`|]*)", text):
        name, rest = command
        assert name in scripts, name
        source = scripts[name] + scripts["utils.py"]  # which holds the flags that scripts share
        known = train_flags if name in ("train.py", "model.py") else set(re.findall(r'"(--[a-z-]+)"', source))
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known | {"--help"}, command
        recipe = re.search(r"--recipe (\S+)", rest)
        assert recipe is None or recipe[1] in config.RECIPES
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / picture).stat().st_size < 300_000


def test_ci_runs_the_two_commands_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert len(commands) == 2 and "train.py --recipe demo" in commands[0] and "pytest" in commands[1]
