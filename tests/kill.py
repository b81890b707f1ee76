"""Kill a short training run at random moments, resume it, and see that nothing is lost.

    python tests/kill.py --kills 100

Every run saves after every step, so that many kills (SIGKILL) fall into the writing of a checkpoint. After
each kill the checkpoints must load, the history must be whole, and no epoch or step that was reported as
saved may be missing; a run that came to its end must equal one that was never interrupted, bit for bit.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from conftest import write_folder

import checkpoint
import train
import utils
import visualize
from checkpoint import read_checkpoint
from metrics import best_row

TIMES = ("seconds", "train_images_per_s", "train_data_wait")  # of a history row: no two runs share them


def start(data, out, resume, workers):
    """Start a run in a process of its own; return its id. It begins at once: all is imported already."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    with open(out.with_suffix(".log"), "a", buffering=1) as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    checkpoint.SAVE_MINUTES = 0  # after every step
    visualize.plot_run = lambda *args: None  # so that more of the time goes into what is saved
    flags = ["--out-dir", out, "--workers", workers]
    if resume:
        flags += ["--resume"]
    else:
        flags += ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--unfreeze", "all"]
        flags += ["--imgsz", 28, 42, "--epochs", 4, "--batch-size", 2, "--augment", "crop", "flip"]
        flags += ["--device", "cpu"]
    sys.argv = ["train.py", *map(str, flags)]
    try:
        utils.run_main(train.main)
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(1)


def wait(process, seconds):
    """Wait for a process at most so long; return its exit code, or None while it runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def check(out):
    """Return (epochs, steps) of last.pth; raises where a file is broken or a reported epoch is missing."""
    text = out.with_suffix(".log").read_text()
    reported = [int(line.split()[1].split("/")[0]) for line in text.splitlines() if ": loss" in line]
    reported = max(reported, default=0)
    if not (out / "last.pth").exists():
        assert not reported, f"epoch {reported} was reported, and there is no last.pth"
        return 0, 0
    last = read_checkpoint(out / "last.pth")
    assert last["epoch"] == len(last["history"]) >= reported, f"epoch {reported} was reported and is lost"
    if last["epoch"]:
        best = read_checkpoint(out / "best_model_iou.pth")
        assert best["epoch"] >= best_row(last["history"])["epoch"], "the best epoch is lost"
    if (out / "history.jsonl").exists():
        rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        assert len(rows) >= reported and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    if (out / "config.json").exists():
        json.loads((out / "config.json").read_text())
    return last["epoch"], last["step"]


def equal(a, b):
    """Return whether two values of a checkpoint are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b):
    """Assert that two finished runs are one and the same: weights, optimizer, history, random numbers."""
    for name in ("last.pth", "best_model_iou.pth"):
        first, second = read_checkpoint(a / name), read_checkpoint(b / name)
        for key in first.keys() - {"config", "attention"}:
            assert equal(first[key], second[key]), f"{name}: {key} differs"


def main():
    """Kill, resume, compare; print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # this process forks, and threads do not survive that
    chance, counts = random.Random(args.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(Path(folder) / "data", count=12)
        straight = Path(folder) / "straight"
        began = time.monotonic()
        assert wait(start(data, straight, False, 0), 300) == 0, straight.with_suffix(".log").read_text()
        length, number, steps = time.monotonic() - began, 0, 0
        out = Path(folder) / "run0"
        while counts["kills"] < args.kills:
            process = start(data, out, (out / "last.pth").exists(), chance.choice((0, 1)))
            code = wait(process, chance.uniform(0.0, length * 0.6))
            if code is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                counts["kills"] += 1
            elif code != 0:
                sys.exit(f"exit code {code}:\n" + out.with_suffix(".log").read_text()[-3000:])
            kept = (".lock", ".run.json")
            counts["inside a write"] += any(path.name.startswith(".") and path.name not in kept
                                            for path in out.glob("**/.*")) if code is None else 0
            before, steps = steps, check(out)[1]
            assert steps >= before, f"{before} steps were saved, {steps} are left"
            counts["before the first save"] += code is None and steps == 0
            if code == 0:
                same_run(straight, out)
                counts["runs finished, equal to an uninterrupted one"] += 1
                shutil.rmtree(out)
                number, steps = number + 1, 0
                out = Path(folder) / f"run{number}"
    print(", ".join(f"{value} {name}" for name, value in counts.items()) + "; 0 bytes lost")


if __name__ == "__main__":
    main()
