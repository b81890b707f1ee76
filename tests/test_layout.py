"""The shape of the code base: who imports whom, what is set before torch, what the README promises."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import config

FILES = sorted(path for path in ROOT.glob("**/*.py") if path.parts[len(ROOT.parts)][0] != "."
               and path.relative_to(ROOT).parts[0] not in ("tests", "outputs", "data"))
MIDDLE = {"model": 1, "datasets": 1, "engine": 2, "checkpoint": 2}  # of leaves and scripts
SCRIPT, TOOL = 3, 4


def module_name(path):
    """Return the name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_script(path):
    """Return whether a file is a command: it stands at the top level and does something when it is run."""
    text = path.read_text(encoding="utf-8")
    return path.parent == ROOT and ("utils.run_main(" in text or "dependencies = [" in text)


def level(path):
    """Return 0 for leaves and what lies in folders, 1 and 2 for the core above them, 3 for scripts, 4 for
    tools.
    """
    if path.relative_to(ROOT).parts[0] == "tools":
        return TOOL
    return MIDDLE.get(module_name(path)) or (SCRIPT if is_script(path) else 0)


LEVELS = {module_name(path): level(path) for path in FILES}


def imports(path):
    """Return the names of this code's modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & LEVELS.keys() - {module_name(path)}


def test_commands_of_the_contract_are_scripts_and_the_core_is_not():
    scripts = {name for name, value in LEVELS.items() if value == SCRIPT}
    commands = {"train", "evaluate", "infer_image", "infer_video", "export", "check_data", "compare"}
    assert {*commands, "hubconf"} <= scripts
    assert not scripts & {"config", "losses", "metrics", "utils"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    """Folders and leaves <- model, datasets <- engine, checkpoint <- scripts <- tools; no script imports a
    script.
    """
    own = level(path)
    wrong = {name for name in imports(path)
             if LEVELS[name] > own or (LEVELS[name] == own == SCRIPT)}
    main_only = {"datasets"} if module_name(path) == "model" else set()
    assert not wrong - main_only, f"{path.name} imports {sorted(wrong)}"


def test_no_import_leads_back():
    edges = {module_name(path): imports(path) for path in FILES}

    def reaches(name, trail):
        assert name not in trail, f"{' -> '.join([*trail, name])} leads back"
        for other in edges[name]:
            reaches(other, [*trail, name])

    for name in edges:
        reaches(name, [])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_tells_its_purpose_and_does_nothing_when_it_is_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert "environ" in ast.unparse(node), f"{path.name} line {node.lineno} works when it is imported"


@pytest.mark.parametrize("path", [path for path in FILES if level(path) < SCRIPT], ids=module_name)
def test_below_the_scripts_nothing_takes_the_settings_object(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and module_name(path) != "config":
            names = {argument.arg for argument in node.args.args}
            assert not names & {"config", "args", "namespace"} or node.name == "__torch_function__", node.name


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


@pytest.mark.parametrize("name", [name for name, value in LEVELS.items() if value == SCRIPT] + ["model"])
@pytest.mark.parametrize("setting", [None, "0"])
def test_mps_fallback_is_set_before_torch_unless_the_user_did(name, setting, monkeypatch):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if setting:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", setting)
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(name=name)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == (setting or "1"), done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_name_only_flags_and_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    scripts = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.parent == ROOT}
    train_flags = {"--" + name.replace("_", "-") for name in config.TrainConfig.__dataclass_fields__} | {
        "--recipe"
    }
    for command in re.findall(r"python (\w+\.py)([^\n`|]*)", text):
        name, rest = command
        assert name in scripts, name
        source = scripts[name] + scripts["config.py"]  # which holds the flags that scripts share
        own = set(re.findall(r'"(--[a-z0-9-]+)"', source))
        known = train_flags if name in ("train.py", "model.py") else own
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest)) <= known | {"--help"}, command
        recipe = re.search(r"--recipe (\S+)", rest)
        assert recipe is None or recipe[1] in config.RECIPES
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (page.parent / picture).stat().st_size < 300_000
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
