"""benchmark.py runs, compares equal work, and writes what it prints; its numbers are not tested."""

import json

import torch
from conftest import tiny, write_folder

import benchmark
import train
from model import pack_checkpoint


def test_evaluate_compares_equal_scores(tmp_path, run):
    data = write_folder(tmp_path / "data", count=8)
    flags = ["--dataset", "folder", "--data-root", data, "--out-dir", tmp_path, "--backbone", "vit_tiny"]
    flags += ["--unfreeze", "all", "--imgsz", 28, 42, "--epochs", 1, "--workers", 0]
    assert run(train, *flags)[0] == 0
    more = ["--model", tmp_path / "best_model_iou.pth", "--rounds", 1, "--out-dir", tmp_path]
    code, text, _ = run(benchmark, "evaluate", *more)
    result = json.loads((tmp_path / "benchmark_evaluate.json").read_text())
    plain, ours = result["rows"]
    assert code == 0 and abs(plain["miou"] - ours["miou"]) < 0.03 and plain["ratio"] == 1.0
    assert f"{ours['ratio']:.4g}" in text and result["images"] == 2


def test_unknown_modes_and_models_exit_with_2(tmp_path, run):
    assert run(benchmark, "everything")[0] == 2
    code, _, err = run(benchmark, "evaluate", "--model", tmp_path / "gone.pth")
    assert code == 2 and "gone.pth does not exist" in err
    torch.save(
        pack_checkpoint(tiny(num_classes=2), [("a", (0, 0, 0)), ("b", (1, 1, 1))], (28, 28)),
        tmp_path / "m.pth",
    )
    code, _, err = run(benchmark, "evaluate", "--model", tmp_path / "m.pth")
    assert code == 2 and "does not say what it was trained on" in err


def test_turns_are_taken_and_the_median_counts(monkeypatch):
    order, clock = [], iter([0, 1, 1, 3, 3, 8, 8, 10, 10, 12, 12, 14])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    assert benchmark.take_turns(variants, 3) == {"a": 2, "b": 2} and order == list("ababab")
