"""Attacks on every script: hostile flags, files, checkpoints, metadata, names, streams and limits.

    python tests/attacks.py                            # all families, about ten minutes on two cores
    python tests/attacks.py --family classes resume    # some of them, every attack printed
    python tests/attacks.py --each 30 --seed 7         # at most so many of a family, others every time

An attack is one command in a process of its own. It is survived when the process ends in time with exit code
0, 1 or 2 (docs/reliability.md), without a traceback, and with one line that says `error:` where it is 2; when
it started no program, opened no connection and wrote nothing but below its own folder. A Python audit hook
sees what is opened, started and connected, a list of files before and after what else is written.
"""

import argparse
import atexit
import io
import itertools
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20  # seconds
SCRIPTS = ("train", "evaluate", "infer_image", "infer_video", "export", "check_data", "compare", "model")
PROGRAMS = {"git"}  # that scripts start by themselves


@dataclass
class Attack:
    """One command: script.py with flags, in `folder`, where prepare(folder) was called before.

    streams: encoding of stdout and stderr, "closed", "full" (a full disk), or "" as usual; limits: {resource:
    soft limit}; env: variables.
    """

    family: str
    script: str
    flags: list
    prepare: object = None
    streams: str = ""
    limits: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    folder: Path = None

    def __str__(self):
        shown = " ".join(ascii(str(flag))[1:-1][:80] for flag in self.flags)
        more = f" {self.streams}{self.limits or ''}{list(self.env) or ''}"
        return f"{self.family}: {self.script}.py {shown}{more}".strip()


FAMILIES = {}
EXPORTED = {"exported", "damaged_onnx", "damaged_openvino"}  # families of exported files


def family(function):
    """Register a function (world, rng) -> iterable of Attacks under its name."""
    FAMILIES[function.__name__] = function
    return function


# --- the world that is attacked ---------------------------------------------------------------------------
class World:
    """A small data set, a trained run, an exported file, a scored run, in a folder."""

    def __init__(self, root):
        self.root, self.data, self.run = root, root / "data", root / "run"
        self.last, self.best, self.onnx = (
            self.run / "last.pth",
            self.run / "best_model_iou.pth",
            root / "m.onnx",
        )
        self.photo, self.clip = self.data / "images/00.png", root / "clip.mp4"

    def train_flags(self, data=None):
        """Return flags of a training of a second."""
        return [
            "--dataset", "folder", "--data-root", data or self.data, "--backbone", "vit_tiny", "--weights",
            "none", "--head", "bn", "--imgsz", "28", "28", "--epochs", "1", "--batch-size", "2",
            "--workers", "0", "--device", "cpu",
        ]

    def build(self, exports):
        """Make all of it; exports: exported files too, which take longest."""
        import cv2
        import numpy as np
        from PIL import Image

        numbers = np.random.default_rng(0)
        for index in range(6):
            mask = np.zeros((40, 50), np.uint8)
            mask[5:25, 4 + index : 30] = 1
            mask[20:38, 25:48] = 2
            image = (mask[..., None] * 80 + numbers.integers(0, 40, (40, 50, 3))).astype(np.uint8)
            for folder, pixels in (("images", image), ("masks", mask)):
                (self.data / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(self.data / folder / f"{index:02d}.png")
        (self.data / "classes.txt").write_text("background 0 0 0\na 255 0 0\nb 0 255 0\n")
        writer = cv2.VideoWriter(str(self.clip), cv2.VideoWriter_fourcc(*"mp4v"), 10, (50, 40))
        for _ in range(4):
            writer.write(numbers.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        writer.release()
        self.command("train", *self.train_flags(), "--out-dir", self.run)
        self.command("evaluate", "--model", self.last, "--out-dir", self.run, "--device", "cpu")
        for kind, ending in (("onnx", "onnx"), ("openvino", "xml")) if exports else ():
            path = self.root / f"m.{ending}"
            self.command("export", "--model", self.best, "--format", kind, "--out", path)

    def command(self, script, *flags):
        """Run a script in a process of its own. Raises RuntimeError where it fails."""
        folder = self.root / "built"
        folder.mkdir(exist_ok=True)
        process = os.fork()
        if process == 0:
            carry_out(Attack("world", script, flags, folder=folder))
        if os.waitpid(process, 0)[1]:
            raise RuntimeError(f"{script}.py failed: {Path(f'{folder}.output').read_text()}")

    def files(self):
        """Return {path: (size, time of change)} of all files."""
        return {
            path: (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.root.rglob("*")
            if "cases" not in path.parts
        }


# --- one attack, in a process of its own ------------------------------------------------------------------
def watch(allowed, report):
    """Report (a file descriptor) programs, connections, and files opened for writing outside of `allowed`."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    allowed, temporary = tuple(str(Path(path).resolve()) for path in allowed), tempfile.gettempdir()

    known = (*allowed, "/dev/", "/proc/", temporary + "/pymp-", temporary + "/tmp")  # tempfile's own

    def hook(event, args):
        found = None
        if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
            program = args[0] if event != "subprocess.Popen" else (args[1] or [args[0]])[0]
            program = os.path.basename(os.fsdecode(program if not isinstance(program, list) else program[0]))
            found = None if program in PROGRAMS else f"started {program}"
        elif event in ("socket.connect", "socket.sendto") and not isinstance(args[1], (str, bytes)):
            found = f"connected to {args[1]}"
        elif event == "socket.getaddrinfo":
            found = f"looked up {args[0]}"
        elif (
            event == "open"
            and isinstance(args[0], (str, bytes))
            and isinstance(args[2], int)
            and args[2] & writing
        ):
            path = os.path.realpath(os.path.abspath(os.fsdecode(args[0])))
            found = None if path.startswith(known) else f"wrote {path}"
        elif event in ("os.remove", "os.rename", "os.rmdir") and args[0] is not None:
            path = os.path.realpath(os.path.abspath(os.fsdecode(args[0])))
            found = (
                None if path.startswith((*known, "/sys/")) else f"{event} {path}"
            )
        if found:
            os.write(report, f"{found[:200]}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def carry_out(attack):
    """Run the attack in this process, which is its own, and end it."""
    out = os.open(f"{attack.folder}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    report = os.open(f"{attack.folder}.report", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    full = os.open("/dev/full", os.O_WRONLY) if attack.streams == "full" else out
    os.dup2(full, 1)
    os.dup2(out, 2)
    kind = attack.streams if attack.streams not in ("", "full", "closed") else "utf-8"
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), encoding=kind, write_through=True)
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", 0), encoding=kind, errors="backslashreplace", write_through=True
    )
    if attack.streams == "closed":
        sys.stdout = sys.stderr = None
    os.chdir(attack.folder)
    os.environ.update(attack.env)
    tempfile.tempdir = None
    atexit._clear()  # what the parent registered is the parent's
    code = 70
    try:
        watch([attack.folder, *([attack.env["TMPDIR"]] if "TMPDIR" in attack.env else [])], report)
        for limit, value in attack.limits.items():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        sys.argv = [f"{attack.script}.py", *map(str, attack.flags)]
        runpy.run_path(str(ROOT / f"{attack.script}.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        os.write(out, traceback.format_exc().encode(errors="replace"))
    os._exit(code)


class Process:
    """A forked process that carries an attack out."""

    def __init__(self, attack):
        self.attack, self.result, self.start = attack, None, time.monotonic()
        try:
            if attack.prepare:
                attack.prepare(attack.folder)
        except OSError as error:
            self.result = f"skipped: {error}"  # names that this file system cannot hold
            return
        self.id = os.fork()
        if self.id == 0:
            try:
                os.setsid()
                carry_out(attack)
            except BaseException as error:
                Path(f"{attack.folder}.output").write_text(f"the harness failed: {error!r}")
            finally:
                os._exit(70)

    def is_over(self):
        """Return whether it has ended; ends it where it takes too long. Then `result` says what is wrong."""
        if self.result is None:
            done, status = os.waitpid(self.id, os.WNOHANG)
            if done:
                self.result = judge(self.attack, os.waitstatus_to_exitcode(status))
            elif time.monotonic() - self.start > LIMIT:
                os.killpg(self.id, signal.SIGKILL)
                os.waitpid(self.id, 0)
                self.result = f"took more than {LIMIT} s"
        return self.result is not None


def judge(attack, code):
    """Return what is wrong with how an attack ended, "" = nothing."""
    output, report = (Path(f"{attack.folder}.{name}") for name in ("output", "report"))
    output = output.read_text(errors="replace") if output.exists() else ""
    report = report.read_text(errors="replace").splitlines() if report.exists() else []
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if report:
        return report[0]
    if not (attack.folder / "keep.txt").exists():
        return "a file of the user is gone"
    if "Traceback (most recent call last)" in output:
        return f"traceback: {last[:150]}"
    if code not in (0, 1, 2):
        return f"exit code {code}: {last[:150]}"
    if code == 2 and attack.streams != "closed":
        if "error:" not in last:
            return f"exit code 2 without an error line at the end: {last[:150]}"
        if len(last) > 2000:
            return f"an error line of {len(last)} characters"
    return ""


# --- flags ------------------------------------------------------------------------------------------------
HOSTILE = [
    "", " ", "-1", "0", "1", "1e400", "nan", "inf", "-inf", "1" + "0" * 400, "9" * 5000, "4294967295",
    "2147483647", "1000000000", "0x10", "1_000", "\u0663", "\u00b2", "1.5", "-0.0", "none", "all", "../..",
    "/", "/dev/null", "/dev/zero", "/proc/self/mem", "$(touch x)", "`touch x`", "%s%n", "{0.__class__}",
    "\udce9", "a\nb", "a" * 5000, "timm/../x", "timm/hf-hub:evil/x", "timm/local-dir:/tmp",
    "http://[::1]:1/x", "1/0", "5/4", "focal+focal", "True", "()", "[1]",
]


def options_of(script):
    """Return the names of the flags of a script, as its --help lists them."""
    shown = subprocess.run(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    return sorted(
        set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.stdout.split("options:")[-1])) - {"--help"}
    )


def flags_of(script, world):
    """Return flags with which a script does something small."""
    common = ["--device", "cpu", "--out-dir", "out"]
    return {
        "train": [*world.train_flags(), "--out-dir", "out"], "evaluate": ["--model", world.best, *common],
        "infer_image": ["--input", world.photo, "--model", world.best, *common],
        "infer_video": ["--input", world.clip, "--model", world.best, *common],
        "export": ["--model", world.best, "--format", "onnx", "--out", "m.onnx"],
        "check_data": ["--dataset", "folder", "--data-root", world.data, "--out-dir", "out"],
        "compare": [world.run, *common], "model": world.train_flags(),
    }[script]


def of_flags(script):
    """Register the family of one script: every flag with every hostile value."""

    def attacks(world, rng):
        for option, value in itertools.product(options_of(script), HOSTILE):
            if option == "--show" or (option == "--input" and value in ("0", "1")):
                continue  # windows and cameras are not files
            if option.startswith("--out") and value in ("../..", "/"):
                continue  # it is where the user wants it
            values = [value, value] if option == "--imgsz" else [value]
            yield Attack(f"flags_{script}", script, [*flags_of(script, world), option, *values])

    FAMILIES[f"flags_{script}"] = attacks


for one in SCRIPTS:
    of_flags(one)


# --- content of checkpoints and other files that scripts write and read ------------------------------------
JUNK = [
    None, True, -1, 0, 5, 2.5, float("nan"), float("inf"), 10**30, "", "x", "nope", "a" * 100_000, "a\nb",
    "\x00", "\udce9", "../../etc", b"x", [], [5, 6, 7], [None], [[]], ["x"] * 3, [1] * 10_000, {}, {"x": 1},
    {5: 6}, {"dataset": "nope"}, {"data_root": 5}, {"a": {"b": {"c": []}}}, ["$\\foo$", "b", "c"],
    [["a", [1, 2, 3]]] * 3, [["a", ["1", 2, 3]]] * 3, [["a", [1.5, 2, 3]]] * 3, [["a", [999, 2, 3]]] * 3,
    [["a" * 100_000, [1, 2, 3]]] * 3, [["a\nb", [1, 2, 3]]] * 3, [["a", [0, 0, 0]]] * 300,
]


def changed(path, change, target):
    """Return a function that writes a checkpoint, changed, below the folder of an attack."""

    def prepare(folder):
        import torch

        content = torch.load(path, map_location="cpu", weights_only=True)
        content = change(content)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / target)

    return prepare


def with_entry(keys, value):
    """Return a function that sets an entry of nested dicts."""

    def change(content):
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return content

    return change


def users_of(world, target):
    """Return commands that read a checkpoint."""
    common = ["--device", "cpu", "--out-dir", "out"]
    return [
        ("infer_image", ["--input", world.photo, "--model", target, *common]),
        ("evaluate", ["--model", target, *common]),
        ("export", ["--model", target, "--format", "onnx", "--out", "m.onnx"]),
    ]


ENTRIES = {
    "format": ["format"],
    "version": ["version"],
    "classes": ["classes"],
    "imgsz": ["imgsz"],
    "config": ["config"],
    "protocol": ["protocol"],
    "epoch": ["epoch"],
    "metrics": ["metrics"],
    "fingerprint": ["data_fingerprint"],
    "spec": ["spec"],
    "state": ["model"],
    "hash": ["backbone_sha256"],
    "of_config": [
        ["config", key]
        for key in (
            "dataset", "data_root", "val_fraction", "fold", "classes", "weights", "seed", "train_images",
            "train_scale", "imgsz", "unlabelled", "ignore_background", "resplit",
        )
    ],
    "of_spec": [
        ["spec", key]
        for key in (
            "arch", "backbone", "head", "layers", "num_classes", "normalize", "split_blocks", "aux_weight",
            "unknown",
        )
    ],
    "resumed": [
        [key]
        for key in (
            "optimizer", "scaler", "step", "history", "counts", "progress", "random", "origins",
            "processes", "epoch", "config", "device", "precision", "torch", "code", "mask_fingerprint",
        )
    ],
    "resumed_config": [
        ["config", key]
        for key in (
            "lr", "epochs", "steps", "batch_size", "loss", "optimizer", "log", "scheduler", "augment",
            "amp", "cache_features", "out_dir", "patience", "accumulate", "balance", "unfreeze", "recipe",
        )
    ],
}


def of_entries(name, keys):
    """Register the family of checkpoints in which one entry, or one of several, is junk."""
    listed = keys if isinstance(keys[0], list) else [keys]

    def attacks(world, rng):
        for path, value in itertools.product(listed, JUNK):
            change = with_entry(path, value)
            if name.startswith("resumed"):
                yield Attack(
                    f"checkpoint_{name}", "train",
                    ["--resume", "--epochs", "2", "--out-dir", "out", "--workers", "0"],
                    changed(world.last, change, "out/last.pth"),
                )
            else:
                script, flags = rng.choice(users_of(world, "m.pth"))
                yield Attack(f"checkpoint_{name}", script, flags, changed(world.best, change, "m.pth"))

    FAMILIES[f"checkpoint_{name}"] = attacks


for one, entry in ENTRIES.items():
    of_entries(one, entry)


@family
def tensors(world, rng):
    """Tensors that no training writes."""
    import torch

    def each(function):
        def change(content):
            state = content["model"]
            key = sorted(state)[len(state) // 3]
            state[key] = function(state[key])
            return content

        return change

    kinds = {
        "nan": lambda value: torch.full_like(value, float("nan")),
        "inf": lambda value: value * float("inf"), "complex": lambda value: value.to(torch.complex64),
        "sparse": lambda value: value.to_sparse(), "meta": lambda value: value.to("meta"),
        "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        "integers": lambda value: value.to(torch.int64), "half": lambda value: value.half(),
        "shape": lambda value: value[..., :1], "scalar": lambda value: torch.tensor(1.0),
        "parameter": lambda value: torch.nn.Parameter(value), "number": lambda value: 5,
        "none": lambda value: None, "large": lambda value: torch.zeros(1).expand(1 << 40),
        "bool": lambda value: value > 0, "float64": lambda value: value.double(),
    }
    for function in kinds.values():
        for script, flags in users_of(world, "m.pth"):
            yield Attack("tensors", script, flags, changed(world.best, each(function), "m.pth"))
        yield Attack(
            "tensors", "train", ["--resume", "--epochs", "2", "--out-dir", "out", "--workers", "0"],
            changed(world.last, each(function), "out/last.pth"),
        )
        yield Attack(
            "tensors",
            "train",
            [*world.train_flags(), "--unfreeze", "all", "--weights", "w.pth", "--out-dir", "out"],
            changed(
                world.best,
                lambda content, function=function: {
                    key.removeprefix("backbone.net."): value
                    for key, value in each(function)(content)["model"].items()
                    if key.startswith("backbone.net.")
                },
                "w.pth",
            ),
        )
    for key in (5, None, (1, 2), "", "a" * 10_000, "\udce9"):
        yield Attack(
            "tensors", "infer_image", users_of(world, "m.pth")[0][1],
            changed(world.best, with_entry(["model", key], torch.zeros(2)), "m.pth"),
        )


@family
def backbones(world, rng):
    """Names of backbones that would reach a hub or a folder."""
    for name in (
        "timm/hf-hub:evil/x", "timm/hf_hub:evil/x", "timm/local-dir:/tmp", "timm/local_dir:/tmp", "timm/",
        "timm/../../x", "timm/vit_tiny_patch16_224.x", "timm/https://example.com/x", "dinov2_vits14\n", "",
        "evil/repo:main", "timm/vit_small_patch14_dinov2.lvd142m", "timm/resnet18", "timm/RESNET18",
    ):
        for script, flags in users_of(world, "m.pth"):
            yield Attack(
                "backbones", script, flags,
                changed(world.best, with_entry(["spec", "backbone"], name), "m.pth"),
            )
        yield Attack(
            "backbones",
            "train",
            ["--resume", "--epochs", "2", "--out-dir", "out", "--workers", "0"],
            changed(
                world.last,
                lambda content, name=name: with_entry(["config", "backbone"], name)(
                    with_entry(["spec", "backbone"], name)(content)
                ),
                "out/last.pth",
            ),
        )


@family
def pickles(world, rng):
    """Pickles that would run code, and files that are no checkpoint."""
    import pickle

    class Evil:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call

    calls = [
        (os.system, ("touch x",)), (eval, ("open('x', 'w')",)), (exec, ("import os; os.mkdir('x')",)),
        (subprocess.Popen, (["touch", "x"],)), (print, ("x",)), (getattr, ("", "join")),
    ]
    payloads = [pickle.dumps(Evil(*call), protocol) for call in calls for protocol in (2, 4)]
    payloads += [
        b"", b"\x80", b"PK\x03\x04", b"\x80\x02}q\x00.", b"cos\nsystem\n(S'touch x'\ntR.", b"\0" * 10_000,
    ]
    for payload in payloads:

        def prepare(folder, payload=payload):
            (folder / "m.pth").write_bytes(payload)

        for script, flags in users_of(world, "m.pth"):
            yield Attack("pickles", script, flags, prepare)
        yield Attack(
            "pickles", "train", [*world.train_flags(), "--weights", "m.pth", "--out-dir", "out"], prepare
        )


def rewritten(source, target, change):
    """Return a function that copies a folder or file into that of an attack and changes a text in it."""

    def prepare(folder):
        if Path(source).is_dir():
            shutil.copytree(source, folder / "run")
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else Path(source).read_bytes()
        path.write_bytes(change(text))

    return prepare


def plain(value):
    """Return whether JSON can hold a value."""
    try:
        json.dumps(value)
        return True
    except (TypeError, ValueError):
        return False


def json_attacks(name, target, script, flags, lines=False):
    """Register a family in which one entry of a JSON file of a run is junk."""

    def attacks(world, rng):
        text = (world.root / target).read_text().splitlines()[-1 if lines else 0 :]
        content = json.loads("".join(text))
        for key, value in itertools.product(content, filter(plain, JUNK)):

            def change(old, key=key, value=value):
                found = json.loads(old.splitlines()[-1] if lines else old)
                return json.dumps({**found, key: value}).encode()

            yield Attack(name, script, flags, rewritten(world.run, target, change))
        for text in (b"", b"null", b"[]", b"5", b"{", b"\xff\xfe", b'{"a": 1e999}', b"[" * 100_000, b"NaN"):
            yield Attack(name, script, flags, rewritten(world.run, target, lambda old, text=text: text))

    FAMILIES[name] = attacks


for one, target_of, has_lines in (
    ("json_config", "run/config.json", False),
    ("json_history", "run/history.jsonl", True),
    ("json_metrics", "run/evaluation/metrics.json", False),
):
    json_attacks(one, target_of, "compare", ["run", "--device", "cpu", "--out-dir", "out"], has_lines)
json_attacks(
    "json_note", "run/.run.json", "train", ["--resume", "--epochs", "2", "--out-dir", "run", "--workers", "0"]
)


@family
def exported(world, rng):
    """Metadata of exported files."""

    def prepare_of(change):
        def prepare(folder):
            import onnx

            model = onnx.load(world.onnx)
            facts = json.loads(model.metadata_props[0].value)
            model.metadata_props[0].value = json.dumps(change(facts))
            onnx.save(model, folder / "m.onnx")

        return prepare

    for key, value in itertools.product(
        (
            "format", "imgsz", "batch", "classes", "config", "protocol", "int8", "version", "metrics",
            "epoch", "spec",
        ),
        filter(plain, JUNK),
    ):
        for script, flags in users_of(world, "m.onnx")[:2]:
            if rng.random() < 0.5:
                yield Attack(
                    "exported", script, flags,
                    prepare_of(lambda facts, key=key, value=value: {**facts, key: value}),
                )


# --- damaged files ------------------------------------------------------------------------------------------
def damaged(content, rng):
    """Return bytes with a few of them changed, cut off, doubled or replaced."""
    content, kind = bytearray(content), rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    elif kind == 2:
        at = rng.randrange(len(content))
        content[at:at] = content[at // 2 : at]
    elif kind == 3:
        at = rng.randrange(len(content))
        content[at : at + 16] = rng.randbytes(16)
    else:
        content = rng.randbytes(rng.randrange(1, 400))
    return bytes(content)


def of_damage(name, source, target, uses):
    """Register the family of a file that is damaged; uses(world) -> [(script, flags)]."""

    def attacks(world, rng):
        content = (world.root / source).read_bytes()
        for _ in range(40):
            script, flags = rng.choice(uses(world))
            new = damaged(content, rng)

            def prepare(folder, new=new):
                if target.startswith("data/"):
                    shutil.copytree(world.data, folder / "data")
                if target.startswith("run/"):
                    shutil.copytree(world.run, folder / "run")
                if target.endswith((".xml", ".bin")):
                    for ending in (".xml", ".bin"):
                        shutil.copy((world.root / "m").with_suffix(ending), folder)
                (folder / target).write_bytes(new)

            yield Attack(f"damaged_{name}", script, flags, prepare)

    FAMILIES[f"damaged_{name}"] = attacks


def on_data(world):
    """Return commands that read the data set of an attack."""
    return [
        ("train", [*world.train_flags("data"), "--out-dir", "out"]),
        ("check_data", ["--dataset", "folder", "--data-root", "data", "--out-dir", "out"]),
        ("evaluate", ["--model", world.best, "--data-root", "data", "--device", "cpu", "--out-dir", "out"]),
        (
            "infer_image",
            ["--input", "data/images", "--model", world.best, "--device", "cpu", "--out-dir", "out"],
        ),
    ]


of_damage("image", "data/images/03.png", "data/images/03.png", on_data)
of_damage("mask", "data/masks/03.png", "data/masks/03.png", on_data)
of_damage("classes", "data/classes.txt", "data/classes.txt", lambda world: on_data(world)[:3])
of_damage("checkpoint", "run/best_model_iou.pth", "m.pth", lambda world: users_of(world, "m.pth"))
of_damage("onnx", "m.onnx", "m.onnx", lambda world: users_of(world, "m.onnx")[:2])
of_damage("openvino", "m.xml", "m.xml", lambda world: users_of(world, "m.xml")[:2])
of_damage(
    "clip",
    "clip.mp4",
    "clip.mp4",
    lambda world: [
        ("infer_video", ["--input", "clip.mp4", "--model", world.best, "--device", "cpu", "--out-dir", "out"])
    ],
)
of_damage(
    "resumed", "run/last.pth", "run/last.pth",
    lambda world: [("train", ["--resume", "--epochs", "2", "--out-dir", "run", "--workers", "0"])],
)
of_damage(
    "picture",
    "run/miou.png",
    "run/miou.png",
    lambda world: [
        ("evaluate", ["--model", "run/last.pth", "--report", "--device", "cpu", "--out-dir", "run"])
    ],
)


@family
def wrong_formats(world, rng):
    """Files that are something else than their name says, and things that are no files."""
    gs = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n(x) (w) file closefile showpage\n"
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    contents = {
        "eps": gs, "pdf": b"%PDF-1.4\n", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "empty": b"",
        "html": b"<html><img src='http://localhost/x'></html>", "text": b"photo", "bomb": bomb + b"\0" * 8,
        "gif": b"GIF89a\xff\xff\xff\xff\0\0\0", "bmp": b"BM" + b"\xff" * 60, "ppm": b"P6 99999 99999 255 ",
        "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60, "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "m3u": b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
    }
    for content, (script, flags) in itertools.product(contents.values(), on_data(world)):
        for target in ("images/03.png", "masks/03.png"):
            yield Attack(
                "wrong_formats",
                script,
                flags,
                copied(
                    world,
                    lambda folder, content=content, target=target: (folder / "data" / target).write_bytes(
                        content
                    ),
                ),
            )
    for name, content in contents.items():
        yield Attack(
            "wrong_formats", "infer_video",
            ["--input", f"clip.{name}", "--model", world.best, "--device", "cpu", "--out-dir", "out"],
            lambda folder, name=name, content=content: (folder / f"clip.{name}").write_bytes(content),
        )


@family
def no_files(world, rng):
    """Pipes, devices, loops and folders where files are expected."""

    def replaced(make, target):
        def change(folder):
            path = folder / "data" / target
            path.unlink()
            make(path)

        return change

    makers = [
        os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/nowhere"), lambda path: path.symlink_to("/dev/null"),
        lambda path: path.symlink_to("/proc/self/mem"), lambda path: path.symlink_to("/dev/tty"),
    ]
    for make, (script, flags) in itertools.product(makers, on_data(world)):
        for target in ("images/03.png", "masks/03.png", "classes.txt"):
            yield Attack("no_files", script, flags, copied(world, replaced(make, target)))
    for make in makers:
        for script, flags in users_of(world, "m.pth"):
            yield Attack("no_files", script, flags, lambda folder, make=make: make(folder / "m.pth"))


def copied(world, change):
    """Return a function that copies the data set to an attack's folder and changes it."""

    def prepare(folder):
        shutil.copytree(world.data, folder / "data")
        change(folder)

    return prepare


def with_classes(world, lines):
    """Return a function that copies the data set to an attack's folder and writes another classes.txt."""
    return copied(world, lambda folder: (folder / "data/classes.txt").write_text(lines))


# --- names --------------------------------------------------------------------------------------------------
CLASS_NAMES = [
    "$\\foo$", "$x^2$", "$", "$$", "\\frac", "_nolegend_", "a" * 5000, "<script>alert(1)</script>", "{x}",
    "%s", "\u202eabc", "\U0001f600", "\u0000x"[1:], "=1+1", "a,b", "a;b", '"', "'", "..", "/", "con",
    "None", "nan", "ignore", "background", "\t", "\u200b", "é" * 300, "名前", "a b  c",
]


@family
def class_names(world, rng):
    """Names of classes in classes.txt and in --classes."""
    for name, (script, flags) in itertools.product(CLASS_NAMES, on_data(world)[:2]):
        lines = f"background 0 0 0\n{name} 255 0 0\nb 0 255 0\n"
        yield Attack("class_names", script, flags, with_classes(world, lines))
        yield Attack(
            "class_names", script, [*flags, "--classes", "background", name, "b"],
            copied(world, lambda folder: (folder / "data/classes.txt").unlink()),
        )
    for count, (script, flags) in itertools.product((0, 1, 2, 254, 255, 256, 300, 5000), on_data(world)[:2]):
        lines = "".join(f"name {index}\n" for index in range(count))
        yield Attack("class_names", script, flags, with_classes(world, lines))


FILE_NAMES = [
    b"caf\xe9", b"\xff\xfe", b"a\nb", b"-rf", b"--help", b" ", b"%s%d", b"[a]", b"*", b"a:b", b"http:x",
    b"#x", b"?x", b"$(touch x)", b";ls", b"&", b"\x1b[31m", b"\r", b"\x01", b"~", b"a" * 240,
    "é".encode() * 60, "\u202eabc".encode(), "名前".encode(), b"CON", b"x.png.txt", b".hidden", b"..x",
    b"&lt;", b"<b>",
]


@family
def file_names(world, rng):
    """Names of images, with their masks; of folders; of checkpoints."""

    def renamed(name):
        def change(folder):
            for part in (b"images", b"masks"):
                place = os.fsencode(folder) + b"/data/" + part + b"/"
                os.rename(place + b"03.png", place + name + b".png")

        return change

    for name, (script, flags) in itertools.product(FILE_NAMES, on_data(world)):
        for streams in ("", "ascii", "cp1252") if name in FILE_NAMES[:3] else ("",):
            yield Attack(
                "file_names", script, [*flags, *(["--report"] if script == "evaluate" else [])],
                copied(world, renamed(name)), streams,
            )
    for name in FILE_NAMES[:22]:
        text = os.fsdecode(name)

        def prepare(folder, text=text):
            (folder / text).mkdir()
            (folder / text / "m.pth").symlink_to(world.best)

        for script, flags in users_of(world, f"./{text}/m.pth"):
            flags = [f"./{text}" if flag == "out" else flag for flag in flags]
            yield Attack("file_names", script, flags, prepare)
        yield Attack("file_names", "train", [*world.train_flags(), "--out-dir", f"./{text}"], prepare)
        yield Attack(
            "file_names",
            "infer_video",
            [
                "--input", f"./{text}/clip.mp4", "--model", world.best, "--device", "cpu", "--out-dir",
                f"./{text}",
            ],
            lambda folder, text=text: (
                (folder / text).mkdir(),
                (folder / text / "clip.mp4").symlink_to(world.clip),
            ),
        )


# --- streams, limits, surroundings ------------------------------------------------------------------------
def small_commands(world):
    """Return every script with flags that work."""
    return [(script, flags_of(script, world)) for script in SCRIPTS]


@family
def streams(world, rng):
    """Terminals that cannot print, that are closed, and full disks behind them."""
    for (script, flags), kind in itertools.product(
        small_commands(world), ("ascii", "cp1252", "latin-1", "closed", "full")
    ):
        yield Attack("streams", script, flags, None, kind)
        yield Attack("streams", script, ["--help"], None, kind)
        yield Attack("streams", script, [*flags, "--nonsense", "\u263a"], None, kind)


@family
def limits(world, rng):
    """Few open files, small files, little memory."""
    for (script, flags), (what, value) in itertools.product(
        small_commands(world),
        (
            (resource.RLIMIT_NOFILE, 30), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_FSIZE, 20_000),
            (resource.RLIMIT_FSIZE, 200_000), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, 1 << 20),
        ),
    ):
        yield Attack("limits", script, flags, None, limits={what: value})
        if script == "train":
            more = [2 if flag == "0" else flag for flag in flags]
            yield Attack("limits", script, more, None, limits={what: value})


@family
def surroundings(world, rng):
    """Variables, temporary folders and places to write to."""
    long = "t" * 60
    for script, flags in small_commands(world):
        for env in (
            dict(TMPDIR="/nowhere"), dict(HOME="/nowhere"), dict(TORCH_HOME="/dev/null"), dict(COLUMNS="0"),
            dict(OMP_NUM_THREADS="0"), dict(OMP_NUM_THREADS="x"), dict(MPLCONFIGDIR="/nowhere"),
            dict(MPLBACKEND="nope"), dict(DINOSEG_HUB="evil/../x:y"), dict(DINOSEG_HUB="\udce9"),
            dict(PYTORCH_ENABLE_MPS_FALLBACK="x"), dict(CUDA_VISIBLE_DEVICES="99"), dict(TERM=""),
            dict(LC_ALL="nope"), dict(PIL_LIMIT="0"), dict(XDG_CACHE_HOME="/dev/null"),
        ):
            yield Attack("surroundings", script, flags, None, env=env)
        if script == "train":
            more = [2 if flag == "0" else flag for flag in flags]

            def prepare(folder):
                (folder / long / long).mkdir(parents=True)

            yield Attack("surroundings", script, more, prepare, env=dict(TMPDIR=f"{long}/{long}"))
    for script, place in itertools.product(
        ("train", "evaluate", "infer_image", "infer_video", "check_data", "compare"),
        (
            "/dev/null", "/dev/null/x", "/proc", "/proc/self", "/sys/x", "file", "file/x", "loop",
            "a" * 300, "a/" * 3000, "\x01", "",
        ),
    ):
        flags = [place if flag == "out" else flag for flag in flags_of(script, world)]

        def made(folder):
            (folder / "file").write_text("x")
            (folder / "loop").symlink_to("loop")

        yield Attack("surroundings", script, flags, made)


@family
def distributed(world, rng):
    """Variables of torchrun that do not fit."""
    for key, value in itertools.product(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE"),
        ("x", "-1", "", "1e3", "99999999999999999999"),
    ):
        env = {
            **dict(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="nowhere.invalid", MASTER_PORT="1",
            ),
            key: value,
        }
        yield Attack("distributed", "train", flags_of("train", world), None, env=env)


# --- the command ------------------------------------------------------------------------------------------
def warm_up():
    """Import what attacks need, once, without computing anything: threads do not survive a fork."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTORCH_ENABLE_MPS_FALLBACK="1")
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for name in (
        "matplotlib.figure", "matplotlib.backends.backend_agg", "timm", "torchvision", "onnxruntime",
        "scipy", "av", "onnx", "checkpoint", "datasets", "engine", "visualize",
        "inference.predictor", "inference.outputs", "inference.report",
        "inference.rasters",
    ):
        __import__(name)


def carry_out_all(world, chosen, each, seed, say=None):
    """Carry the attacks of some families out, two at a time; return [(attack, what is wrong)]."""
    attacks = []
    for name in chosen:
        rng = random.Random(f"{seed} {name}")
        found = list(FAMILIES[name](world, rng))
        attacks += rng.sample(found, min(each, len(found)))
    for number, attack in enumerate(attacks):
        attack.folder = world.root / "cases" / str(number)
        attack.folder.mkdir(parents=True)
        (attack.folder / "keep.txt").write_text("mine")
    before, results, running = world.files(), [], []
    while attacks or running:
        while attacks and len(running) < 2:
            running.append(Process(attacks.pop(0)))
        for process in [one for one in running if one.is_over()]:
            running.remove(process)
            results.append((process.attack, process.result))
            if say:
                say(process.attack, process.result)
            if not process.result:
                shutil.rmtree(process.attack.folder, ignore_errors=True)
        time.sleep(0.005)
    changed_files = {
        str(path)
        for path in before.keys() | world.files().keys()
        if before.get(path) != world.files().get(path)
    }
    if changed_files:
        results.append((Attack("world", "", []), f"files outside were changed: {sorted(changed_files)[:5]}"))
    return results


def main():
    """Attack, print what was not survived and a table of the families; return 1 where something was not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), help="which (all)")
    parser.add_argument("--each", type=int, default=10**9, metavar="N", help="at most so many of a family")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    args = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="attacks") as folder:
        world = World(Path(folder))
        world.build(exports=EXPORTED & set(args.family or FAMILIES))
        results = carry_out_all(
            world,
            args.family or list(FAMILIES),
            args.each,
            args.seed,
            lambda attack, result: (
                print(
                    f"{'ok  ' if not result else 'FAIL'} {attack}{': ' * bool(result)}{result}".encode(
                        errors="replace"
                    ).decode(),
                    flush=True,
                )
                if result or args.family
                else None
            ),
        )
    wrong = Counter(
        attack.family for attack, result in results if result and not result.startswith("skipped")
    )
    for name, count in Counter(attack.family for attack, _ in results).items():
        print(f"{name:24}{count:6} attacks, {wrong[name]:4} not survived")
    print(f"{len(results)} attacks of {len(args.family or FAMILIES)} families, {wrong.total()} not survived")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
