"""tools/benchmark.py runs, compares equal work, and writes what it prints; its numbers are not tested."""

import json

import pytest
import torch
from conftest import tiny, write_folder

from checkpoint import pack_checkpoint
from inference.backends import is_installed
from test_video import write_clip
from tools import benchmark

SMALL = ("--backbone", "vit_tiny", "--weights", "none", "--imgsz", 28, 42)


@pytest.fixture
def measure(run, tmp_path, monkeypatch):
    """Function of a case and flags that runs it on a CPU and returns {row name: row}, given exit code 0."""
    monkeypatch.setattr(benchmark, "WORKERS", 0)

    def call(case, *flags):
        code, out, err = run(benchmark, case, *flags, "--device", "cpu", "--out-dir", tmp_path)
        assert code == 0, err
        result = json.loads((tmp_path / f"benchmark_{case}.json").read_text())
        assert all(row["name"] in out for row in result["rows"])
        return {row["name"]: row for row in result["rows"]}

    return call


def test_bad_flags_exit_with_2_and_one_line(tmp_path, run):
    assert run(benchmark, "everything")[0] == 2
    code, _, err = run(benchmark, "infer", "--out-dir", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--input" in err


def test_training_loops_are_compared_on_equal_work(tmp_path, measure):
    data = write_folder(tmp_path / "data", count=12)
    rows = measure("train", "--dataset", "folder", "--data-root", data, *SMALL, "--images", 6, "--epochs", 2,
                   "--batch-size", 3)
    plain, ours, made, there = rows.values()
    assert plain["ratio"] == 1 and all(row["epoch_ratio"] > 0 for row in rows.values())
    assert made["miou"] == there["miou"] == pytest.approx(ours["miou"], abs=0.05)
    assert there["start_s"] < made["start_s"]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_memory_of_tiles_is_less_than_that_of_all_logits(measure):
    row, = measure("memory", *SMALL, "--side", 90).values()
    assert row["logits_gb"] == pytest.approx(21 * 4 * 90 ** 2 / 1e9) and row["peak_gb"] >= 0


@pytest.mark.long
def test_infer_compares_the_same_frames(tmp_path, measure):
    classes = [("background", (0, 0, 0)), ("a", (9, 200, 9)), ("b", (1, 2, 250))]
    torch.save(pack_checkpoint(tiny(), classes, (28, 42)), tmp_path / "m.pth")
    clip = write_clip(tmp_path / "clip.mp4", 7)
    rows = measure("infer", "--model", tmp_path / "m.pth", "--rounds", 1, "--input", clip, "--batch-size", 2,
                   "--imgsz", 14, 28)
    equal = {name: row["equal"] for name, row in rows.items()}
    smaller, = [name for name in equal if name.endswith("14x28")]
    assert equal.pop(smaller) < 1 and equal[benchmark.FLOAT32] == 1
    assert set(equal) >= {"plain loop", benchmark.FLOAT32, "torch"}
    assert ("openvino" in equal) == is_installed("openvino")
    assert all(share > 0.9 for share in equal.values())


@pytest.mark.long
def test_gpu_measures_all_cases_and_one_that_fails_costs_no_other(tmp_path, measure, monkeypatch):
    def fail_at_one(args):
        return 1 / (args.batch_size - 1) and benchmark_infer(args)

    benchmark_infer = benchmark.CASES["infer"]
    monkeypatch.setitem(benchmark.CASES, "infer", fail_at_one)
    data = write_folder(tmp_path / "data", count=12, size=(40, 50))
    rows = measure("gpu", "--dataset", "folder", "--data-root", data, *SMALL, "--images", 6, "--batch-size",
                   3, "--epochs", 1, "--rounds", 1)
    failed = [name for name, row in rows.items() if row["failed"]]
    assert failed == ["infer, --batch-size 1"] and len(rows) >= 2 * 4 + 1 + 2 * 3
    assert all(row["images_per_s"] > 0 for row in rows.values() if not row["failed"])


def test_a_robot_labels_for_every_learner_on_the_same_images(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(benchmark, "STROKES", (2, 4))
    monkeypatch.setattr(benchmark, "SCORED", 2)
    data = write_folder(tmp_path / "data", count=10)
    rows = measure("label", "--dataset", "folder", "--data-root", data, *SMALL, "--images", 3)
    assert set(benchmark.LEARNERS) < set(rows)  # and full masks
    assert all(0 <= row["miou"] <= 1 for row in rows.values())
