"""benchmark.py runs, compares equal work, and writes what it prints; its numbers are not tested."""

import json

import pytest
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
    assert benchmark.take_turns(variants, 3) == {"a": [1, 5, 2], "b": [2, 2, 2]} and order == list("ababab")


@pytest.mark.parametrize(("mode", "variants"), [("train", 4), ("data", 3), ("memory", 4)])
def test_training_loops_are_compared_on_equal_work(tmp_path, run, monkeypatch, mode, variants):
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(benchmark, "WORKERS", 0 if mode != "data" else 2)
    data = write_folder(tmp_path / "data", count=20)
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 28, 42]
    flags += ["--images", 8, "--epochs", 4, "--rounds", 1, "--batch-size", 3, "--device", "cpu"]
    code, text, err = run(benchmark, mode, *flags, "--out-dir", tmp_path / "out")
    assert code == 0, err
    result = json.loads((tmp_path / f"out/benchmark_{mode}.json").read_text())
    assert len(result["rows"]) == variants and result["rows"][0]["ratio"] == 1.0
    if mode == "train":  # the same weights at the start, the same images in the same order
        scores = [row["miou"] for row in result["rows"]]
        assert max(scores) - min(scores) < 0.05 and scores[2] == scores[3]
    assert f"{result['rows'][-1]['ratio']:.4g}" in text
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "cache"]
