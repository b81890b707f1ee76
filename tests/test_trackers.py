"""train.py --log: what the trackers hold, read back by their own libraries, is history.jsonl."""
import importlib.machinery
import importlib.util
import json
import struct
import sys

import pytest
from conftest import write_folder

import compare
import evaluate
import train
import trackers
import utils
from checkpoint import read_checkpoint

ROW = dict(epoch=1, lr=0.1, seconds=1.5, train_loss=0.5, train_images_per_s=None, val_loss=0.6, val_miou=0.25,
           per_class_iou=[0.25, None])
CLASSES = [("sky/blue?", (0, 0, 0)), ("road", (1, 1, 1))]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """All trackers write below tmp_path."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())


def scalars_of_tensorboard(folder):
    """Return {name: [(epoch, value)]} and the names of the pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    return found, tags["images"]


def scalars_of_mlflow(folder):
    import mlflow
    client, id = mlflow.MlflowClient(), json.loads((folder / "trackers.json").read_text())["mlflow"]["id"]
    run = client.get_run(id)
    assert run.info.status == "FINISHED" and run.data.params["backbone"] == "vit_tiny"
    return {name: [(m.step, m.value) for m in client.get_metric_history(id, name)]
            for name in run.data.metrics}, [item.path for item in client.list_artifacts(id)]


def records_of(data):
    """Yield the records of a log in LevelDB's format after a header of 7 bytes: blocks of 32 KiB, of chunks
    with checksum, length and whether they are the whole (1), the first, a middle or the last (4) of one."""
    place, record = 7, b""
    while place < len(data):
        if (left := -place % 32768) and left < 7:  # too small for a chunk
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def scalars_of_wandb(folder):
    from wandb.proto import wandb_internal_pb2
    found, pictures, ids = {}, set(), set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                   for item in record.history.item}
            pictures |= {name.removesuffix("/_type") for name in row if name.endswith("/_type")}
            for name, value in row.items():
                if not name.startswith("_") and not name.startswith(tuple(f"{part}/" for part in pictures)):
                    found.setdefault(name, []).append((row["_step"], value))
    assert len(ids) == 1
    return found, pictures


READERS = {"tensorboard": scalars_of_tensorboard, "mlflow": scalars_of_mlflow, "wandb": scalars_of_wandb}


@pytest.mark.long
@pytest.mark.plots
@pytest.mark.parametrize("name", list(READERS))
def test_a_run_and_its_resumption_are_mirrored_row_by_row(tmp_path, run, offline, name):
    pytest.importorskip(trackers.TRACKERS[name].package)
    data = write_folder(tmp_path / "data", count=4, size=(30, 40))
    out = tmp_path / "out"
    flags = ["--dataset", "folder", "--data-root", data, "--out-dir", out, "--backbone", "vit_tiny",
             "--weights", "none", "--imgsz", 28, 28, "--workers", 0, "--log", name]
    assert run(train, *flags, "--epochs", 2)[0] == 0
    code, _, err = run(train, "--resume", "--out-dir", out, "--epochs", 3)
    assert code == 0, err
    assert run(train, "--resume", "--out-dir", out)[0] == 0  # has all its epochs, and logs none twice
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    classes = read_checkpoint(out / "last.pth")["classes"]
    want = {}
    for row in rows:
        for key, value in trackers.scalars(row, classes).items():
            want.setdefault(key, []).append((row["epoch"], pytest.approx(value, rel=1e-6, abs=1e-9)))
    found, pictures = READERS[name](out)
    assert found == want and len(rows) == 3
    assert {"predictions", *trackers.PLOTS} <= set(pictures)
    assert run(evaluate, "--model", out / "best_model_iou.pth", "--out-dir", out)[0] == 0
    assert run(compare, out, "--out-dir", tmp_path / "compared")[0] == 0


def test_scalars_of_a_row():
    assert trackers.scalars(ROW, CLASSES) == {"lr": 0.1, "seconds": 1.5, "train/loss": 0.5, "val/loss": 0.6,
                                              "val/miou": 0.25, "iou/sky/blue?": 0.25}


def test_a_tracker_that_joins_late_gets_the_whole_history(tmp_path):
    pytest.importorskip("tensorboard")
    with trackers.Trackers(["tensorboard"], tmp_path, {}, CLASSES) as logs:
        logs.follow([ROW, dict(ROW, epoch=2), dict(ROW, epoch=3)])
    with trackers.Trackers(["tensorboard"], tmp_path, {}, CLASSES) as logs:
        logs.follow([ROW, dict(ROW, epoch=2), dict(ROW, epoch=3), dict(ROW, epoch=4)])
    assert [epoch for epoch, _ in scalars_of_tensorboard(tmp_path)[0]["val/miou"]] == [1, 2, 3, 4]


def test_a_missing_package_is_one_line_before_anything_is_moved(tmp_path, run, monkeypatch):
    data = write_folder(tmp_path / "data", count=4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # which Python takes for a package where there is no other
    spec = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "wandb", importlib.util.module_from_spec(spec))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in ("wandb", "mlflow"):
        code, _, err = run(train, "--dataset", "folder", "--data-root", data, "--log", name, "--backbone",
                           "vit_tiny", "--weights", "none", "--imgsz", 28, 28, "--out-dir", "out")
        assert code == 2 and f"--log {name} needs the package {name}: pip install {name}" in err
        assert not (tmp_path / "out" / "last.pth").exists()
    assert run(train, "--log", "none", "tensorboard")[0] == 2


class Broken:
    """A tracker that takes one epoch."""

    def __init__(self, folder, settings, id, epochs):
        if settings.get("lr") == 1:
            raise RuntimeError("no\nkey")
        self.id = "1"

    def add(self, epoch, values):
        if epoch > 1:
            raise ConnectionError("server is\ngone")

    def close(self, failed):
        raise AssertionError("closed after it failed")


def test_a_tracker_that_fails_costs_a_warning_and_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    with trackers.Trackers(["wandb"], tmp_path, {}, CLASSES) as logs:
        for epochs in (1, 2, 3):
            logs.follow([dict(ROW, epoch=epoch + 1) for epoch in range(epochs)])
    text = capsys.readouterr().out
    assert text.count("warning: --log wandb failed and is left out from here on: server is gone") == 1
    with pytest.raises(train.InputError, match="--log wandb does not start: no key"):
        trackers.Trackers(["wandb"], tmp_path / "b", {"lr": 1}, CLASSES)
    with trackers.Trackers(["wandb"], tmp_path, {"lr": 1}, CLASSES, resumed=True) as logs:
        logs.follow([ROW])
    assert "warning: --log wandb does not start and is left out: no key" in capsys.readouterr().out


def test_a_run_stopped_before_its_first_row_goes_on_in_the_same_one(tmp_path):
    pytest.importorskip("tensorboard")
    with trackers.Trackers([], tmp_path / "without", {}, CLASSES):
        pass
    assert not (tmp_path / "without").exists()
    with pytest.raises(KeyboardInterrupt), trackers.Trackers(["tensorboard"] * 2, tmp_path, {}, CLASSES):
        raise KeyboardInterrupt
    notes = json.loads((tmp_path / "trackers.json").read_text())
    assert notes == {"tensorboard": {"id": "tensorboard", "epochs": 0}}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.long
def test_mlflow_knows_whether_a_run_came_to_its_end(tmp_path, offline):
    mlflow = pytest.importorskip("mlflow")
    for error, status in ((None, "FINISHED"), (RuntimeError("x"), "FAILED")):
        folder = tmp_path / status
        try:
            with trackers.Trackers(["mlflow"], folder, {}, CLASSES) as logs:
                logs.follow([ROW])
                if error:
                    raise error
        except RuntimeError:
            pass
        id = json.loads((folder / "trackers.json").read_text())["mlflow"]["id"]
        assert mlflow.MlflowClient().get_run(id).info.status == status


def test_what_a_start_that_failed_left_is_moved_with_the_next_earlier_run(tmp_path):
    """Else the curves of several runs would stand in one folder."""
    folder = utils.RunFolder(tmp_path)
    with folder:
        (tmp_path / "last.pth").touch()
        folder.save()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "mine").mkdir()
    with utils.RunFolder(tmp_path) as folder:
        assert {path.name for path in folder.moved.iterdir()} == {"last.pth", "tensorboard"}
        (tmp_path / "last.pth").touch()
        folder.save()
    assert (tmp_path / "mine").exists()
