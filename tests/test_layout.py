"""What every file keeps to, what is set before torch, what the README and docs promise."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_imports import MODULES, TREES, is_script

import config

SCRIPTS = [name for name in MODULES if is_script(name) or name == "hubconf"]


def test_commands_of_the_contract_are_scripts_and_the_core_is_not():
    commands = {"train", "evaluate", "infer_image", "infer_video", "export", "check_data", "compare"}
    assert commands <= {*SCRIPTS} and not {*SCRIPTS} & {"config", "losses", "metrics", "utils"}


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("tests.")])
def test_every_file_tells_its_purpose_and_does_nothing_when_it_is_imported(name):
    assert ast.get_docstring(TREES[name])
    for node in TREES[name].body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert "environ" in ast.unparse(node), f"line {node.lineno} works when it is imported"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in {*SCRIPTS, "config"}])
def test_below_the_scripts_nothing_takes_the_settings_object(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef) and node.name != "__torch_function__":
            names = {argument.arg for argument in node.args.args}
            assert not names & {"config", "args", "namespace"}, node.name


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


@pytest.mark.parametrize("name", [*SCRIPTS, "model"])
@pytest.mark.parametrize("setting", [None, "0"])
def test_mps_fallback_is_set_before_torch_unless_the_user_did(name, setting, monkeypatch):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if setting:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", setting)
    code = WATCH.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == (setting or "1"), done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_name_only_flags_and_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    options = {"--" + name.replace("_", "-") for name in config.TrainConfig.__dataclass_fields__}
    for name, rest in re.findall(r"python (\w+\.py)([^\n`|]*)", text):
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in (name, "config.py"))
        known = {*re.findall(r'"(--[a-z0-9-]+)"', source), "--help"}
        if name in ("train.py", "model.py"):
            known = options | {"--recipe", "--help"}
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest)) <= known, name + rest
        recipe = re.search(r"--recipe (\S+)", rest)
        assert recipe is None or recipe[1] in config.RECIPES
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (page.parent / picture).stat().st_size < 300_000
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def messages_of(tree):
    """Yield the texts of a module but its docstrings, "..." in place of the values in an f-string."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in {*ast.walk(tree)} - docstrings:
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_that_the_docs_explain_are_printed():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    ours = [tree for name, tree in TREES.items() if not name.startswith("tests.")]
    messages = [message for tree in ours for message in messages_of(tree)]
    for quote in quoted:  # "..." stands for any text
        words = re.compile(".*".join(map(re.escape, quote.split("..."))))
        assert any(map(words.search, messages)), quote
    assert len(quoted) > 9
