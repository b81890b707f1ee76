"""benchmark.py runs, compares equal work, and writes what it prints; its numbers are not tested."""

import json

import pytest
import torch
from conftest import tiny, write_folder

import benchmark
import gpu_cases
import train
from checkpoint import pack_checkpoint
from dataio.windows import rasterio
from test_video import write_clip


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


@pytest.mark.long
def test_infer_compares_the_same_frames(tmp_path, run, monkeypatch):
    monkeypatch.setattr(benchmark, "is_installed", lambda name: name == "onnxruntime")
    classes = [("background", (0, 0, 0)), ("a", (9, 200, 9)), ("b", (1, 2, 250))]
    torch.save(pack_checkpoint(tiny(), classes, (28, 42)), tmp_path / "m.pth")
    flags = ["--model", tmp_path / "m.pth", "--device", "cpu", "--rounds", 1, "--out-dir", tmp_path]
    clip = write_clip(tmp_path / "clip.mp4", 7)
    code, _, err = run(benchmark, "infer", *flags, "--input", clip, "--batch-size", 2, "--imgsz", 14, 28)
    assert code == 0, err
    result = json.loads((tmp_path / "benchmark_infer.json").read_text())
    equal = {row["name"]: row["equal"] for row in result["rows"]}
    assert list(equal) == ["plain loop", "torch, float32", "torch", "onnxruntime", "onnxruntime, 14x28"]
    assert equal.pop("onnxruntime, 14x28") < 1
    assert result["frames"] == 7 and all(share > 0.9 for share in equal.values())
    assert equal["torch, float32"] == 1 and equal["onnxruntime"] > 0.9999  # float32 too, the same pixels
    assert run(benchmark, "infer", *flags)[0] == 2  # which clip?


@pytest.mark.long
def test_model_counts_the_arithmetic(tmp_path, run):
    flags = ["--backbone", "vit_tiny", "--imgsz", 56, 56, "--batch-size", 2, "--rounds", 1, "--device", "cpu"]
    assert run(benchmark, "model", *flags, "--out-dir", tmp_path)[0] == 0
    result = json.loads((tmp_path / "benchmark_model.json").read_text())
    rows = {(row["size"], row["batch"]): row for row in result["rows"]}
    assert len(rows) == 6 and all(row["share_of_limit"] > 0 for row in rows.values())
    # a block of width D on N tokens: 12 D D N in its products, 2 N N D in its attention, twice for FLOPs
    tokens, width, depth = 16 * 16 + 1, 192, 6
    want = 2 * depth * (12 * width**2 * tokens + 2 * tokens**2 * width)
    assert rows["224x224", 1]["gflop_per_image"] * 1e9 == pytest.approx(want, rel=0.05)


@pytest.mark.long
def test_all_cases_of_the_gpu_run_on_a_cpu_and_one_that_fails_costs_no_other(tmp_path, run, monkeypatch):
    data = write_folder(tmp_path / "data", count=60, size=(40, 50))
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--weights", "none",
             "--imgsz", 28, 42, "--images", 6, "--batch-size", 3, "--device", "cpu"]
    code, _, err = run(benchmark, "gpu", *flags, "--out-dir", tmp_path)
    assert code == 2 and "--small tries the same code" in err
    monkeypatch.setattr(gpu_cases.Cases, "onnx", lambda self: 1 / 0)
    code, text, err = run(benchmark, "gpu", *flags, "--small", "--out-dir", tmp_path)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "benchmark_gpu.json").read_text())["rows"]}
    failed = {name: row["failed"] for name, row in rows.items() if row["failed"]}
    assert failed == {"model, ONNX Runtime, batch 1": "ZeroDivisionError: division by zero"}
    assert len(rows) == 20 and all(row["value"] is not None for row in rows.values() if not row["failed"])
    assert rows["resume, largest difference of weights"]["value"] < 1e-6
    assert rows["DDP of one process, difference of the loss"]["value"] < 1e-5
    assert 0.8 < rows["fp16 with scaler, loss against bfloat16's"]["value"] < 1.25
    assert all(row["share_of_limit"] > 0 for name, row in rows.items() if name.startswith("train"))


@pytest.mark.parametrize(("mode", "variants"), [("train", 4), ("data", 5), ("memory", 4 + bool(rasterio))])
def test_training_loops_are_compared_on_equal_work(tmp_path, run, monkeypatch, mode, variants):
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(benchmark, "WORKERS", 0 if mode != "data" else 2)
    data = write_folder(tmp_path / "data", count=20)
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 28, 42]
    flags += ["--images", 8, "--epochs", 4, "--rounds", 1, "--batch-size", 3, "--device", "cpu"]
    flags += ["--side", 150] if mode == "memory" else []
    code, text, err = run(benchmark, mode, *flags, "--out-dir", tmp_path / "out")
    assert code == 0, err
    result = json.loads((tmp_path / f"out/benchmark_{mode}.json").read_text())
    assert len(result["rows"]) == variants and result["rows"][0]["ratio"] == 1.0
    if mode == "train":  # the same weights at the start, the same images in the same order
        scores = [row["miou"] for row in result["rows"]]
        assert max(scores) - min(scores) < 0.05 and scores[2] == scores[3]
    assert f"{result['rows'][-1]['ratio']:.4g}" in text
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "cache"]
