"""train.py --log: what the trackers hold, read back by their own libraries, is history.jsonl."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import time

import pytest
from conftest import refused, write_folder

import train
import visualize
from checkpoint import read_checkpoint
from config import InputError
from visualize import Trackers

ROW = dict(epoch=1, lr=0.1, seconds=1.5, train_loss=0.5, train_images_per_s=None, val_loss=0.6, val_miou=0.25,
           per_class_iou=[0.25, None])
CLASSES = [("sky/blue?", (0, 0, 0)), ("road", (1, 1, 1))]


def read_tensorboard(root):
    """Return [{name: [(epoch, value)]} and the pictures' names of every run], the oldest first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for folder in sorted((root / "out/tensorboard").iterdir()):
        events = EventAccumulator(str(folder)).Reload()
        tags = events.Tags()
        numbers = {name: [(event.step, event.value) for event in events.Scalars(name)]
                   for name in tags["scalars"]}
        runs.append((numbers, tags["images"]))
    return runs


def read_mlflow(root):
    import mlflow

    client, runs = mlflow.MlflowClient(), []
    for run in client.search_runs(["0"], order_by=["attributes.start_time"]):
        assert run.info.status == "FINISHED" and run.data.params["backbone"] == "vit_tiny"
        numbers = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                   for name in run.data.metrics}
        runs.append((numbers, [item.path for item in client.list_artifacts(run.info.run_id)]))
    return runs


def leveldb_records(data):
    """Yield the records of a log in LevelDB's format after a header of 7 bytes: blocks of 32 KiB, of chunks
    with checksum, length and kind: all of a record (1), its first chunk, one between, or its last (4).
    """
    position, record = 7, b""
    while position < len(data):
        if (left := -position % 32768) and left < 7:  # too small for a chunk
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(root):
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for file in sorted((root / "out/wandb").glob("offline-run-*/*.wandb")):
        numbers, pictures = {}, set()
        for data in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                   for item in record.history.item}
            pictures |= {name.removesuffix("/_type") for name in row if name.endswith("/_type")}
            for name, value in row.items():
                if not name.startswith(("_", *(f"{picture}/" for picture in pictures))):
                    numbers.setdefault(name, []).append((row["_step"], value))
        runs.append((numbers, pictures))
    return runs


@pytest.mark.long
@pytest.mark.plots
@pytest.mark.parametrize(("name", "read"), [
    ("tensorboard", read_tensorboard), ("mlflow", read_mlflow), ("wandb", read_wandb)])
def test_a_run_and_its_resumption_are_mirrored_row_by_row(tmp_path, run, monkeypatch, name, read):
    pytest.importorskip(name)
    offline = dict(WANDB_MODE="offline", WANDB_SILENT="true", MLFLOW_ALLOW_FILE_STORE="true",
                   MLFLOW_TRACKING_URI=(tmp_path / "mlruns").as_uri())
    for variable, value in offline.items():
        monkeypatch.setenv(variable, value)
    data = write_folder(tmp_path / "data", count=4, size=(30, 40))
    flags = ["--dataset", "folder", "--data-root", data, "--out-dir", tmp_path / "out", "--backbone",
             "vit_tiny", "--weights", "none", "--imgsz", 28, 28, "--workers", 0, "--log", name]
    assert run(train, *flags, "--epochs", 1)[0] == 0
    code, _, err = run(train, "--resume", "--out-dir", tmp_path / "out", "--epochs", 2)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    classes = read_checkpoint(tmp_path / "out/last.pth")["classes"]
    wanted = {}
    for row in rows:
        for key, value in visualize.numbers_of(row, classes).items():
            wanted.setdefault(key, []).append((row["epoch"], pytest.approx(value, rel=1e-6, abs=1e-9)))
    for _ in range(50):  # the service of wandb writes a little later
        (first, _), (second, pictures) = read(tmp_path)
        if second.keys() == wanted.keys():
            break
        time.sleep(0.2)
    assert first["val/loss"] == wanted["val/loss"][:1] and second == wanted
    drawn = {plot for plot in visualize.PLOTS if (tmp_path / f"out/{plot}.png").exists()}
    assert {"loss", "miou"} <= drawn and drawn | {"predictions"} <= set(pictures)


def test_numbers_of_a_row():
    assert visualize.numbers_of(ROW, CLASSES) == {
        "lr": 0.1, "seconds": 1.5, "train/loss": 0.5, "val/loss": 0.6, "val/miou": 0.25,
        "iou/sky/blue?": 0.25}


def test_a_missing_package_is_one_line_before_anything_is_moved(tmp_path, run, monkeypatch):
    data = write_folder(tmp_path / "data", count=4)
    (tmp_path / "wandb").mkdir()  # which Python takes for a package where there is no other
    spec = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "wandb", importlib.util.module_from_spec(spec))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in ("wandb", "mlflow"):
        code, _, err = run(train, "--dataset", "folder", "--data-root", data, "--log", name, "--backbone",
                           "vit_tiny", "--weights", "none", "--imgsz", 28, 28, "--out-dir", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1 and f"--log {name} " in err
        assert not (tmp_path / "out").exists()
    assert run(train, "--log", "none", "tensorboard")[0] == 2


def test_an_earlier_run_is_moved_before_a_tracker_starts(tmp_path, run, monkeypatch):
    """Which may write at once, to a folder that is called as that of the earlier run."""
    def start(folder, settings):
        (earlier,) = (folder / "previous").glob("*/*/event")
        assert earlier.read_text() == "earlier"
        (folder / "tensorboard").mkdir()
        raise RuntimeError("no key")

    data = write_folder(tmp_path / "data", count=4)
    (tmp_path / "out/tensorboard").mkdir(parents=True)
    (tmp_path / "out/tensorboard/event").write_text("earlier")
    monkeypatch.setitem(visualize.TRACKERS, "tensorboard", start)
    monkeypatch.setattr(visualize, "require_trackers", lambda names: None)
    flags = ["--dataset", "folder", "--data-root", data, "--log", "tensorboard", "--backbone", "vit_tiny",
             "--imgsz", 28, 28, "--out-dir", tmp_path / "out"]
    assert run(train, *flags, "--unfreeze", 9)[0] == 2
    assert (tmp_path / "out/tensorboard/event").exists()  # it failed before that
    code, _, err = run(train, *flags)
    assert code == 2 and "no key" in err, err


class Broken:
    """A tracker that takes one epoch."""

    def __init__(self, folder, settings):
        if settings.get("lr") == 1:
            raise RuntimeError("no\nkey")

    def add(self, epoch, numbers, pictures):
        if epoch > 1:
            raise ConnectionError("server is\ngone")

    def close(self, failed):
        raise AssertionError("closed after it failed")


def test_a_tracker_that_fails_costs_a_warning_and_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(visualize.TRACKERS, "wandb", Broken)
    with Trackers(["wandb"], tmp_path, {}, CLASSES) as trackers:
        for epochs in (1, 2, 3):
            trackers.follow([dict(ROW, epoch=epoch + 1) for epoch in range(epochs)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: --log wandb") and "gone" in lines[0]
    with pytest.raises(InputError, match="--log wandb .*key"):
        Trackers(["wandb"], tmp_path, {"lr": 1}, CLASSES)
    with Trackers(["wandb"], tmp_path, {"lr": 1}, CLASSES, resumed=True) as trackers:
        trackers.follow([ROW])
    assert capsys.readouterr().out.startswith("warning: --log wandb ")


@pytest.mark.parametrize(("name", "variable", "value"), [
    ("mlflow", "MLFLOW_DISABLE_TELEMETRY", "true"), ("wandb", "WANDB_ERROR_REPORTING", "false")])
def test_packages_are_told_not_to_report_that_they_are_used(tmp_path, monkeypatch, name, variable, value):
    """Before they are imported, and unless the user wants it."""
    (tmp_path / f"{name}.py").write_text(f"import os\nraise OSError('told ' + os.environ['{variable}'])")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    for setting in (None, "mine"):
        monkeypatch.setenv(variable, str(setting))
        if setting is None:
            monkeypatch.delenv(variable)
        with refused(f"--log {name}", f"told {setting or value}"):
            Trackers([name], tmp_path, {}, CLASSES)


@pytest.mark.parametrize("resumed", [False, True])
def test_rows_are_handed_over_once_and_a_resumed_run_hands_over_all(tmp_path, capsys, monkeypatch, resumed):
    calls = []

    class Recorder(Broken):
        def add(self, epoch, numbers, pictures):
            calls.append(epoch)

        def close(self, failed):
            calls.append(failed)

    monkeypatch.setitem(visualize.TRACKERS, "mlflow", Recorder)
    with pytest.raises(KeyboardInterrupt), \
            Trackers(["mlflow", "mlflow"], tmp_path, {}, CLASSES, resumed) as trackers:
        trackers.follow([ROW, dict(ROW, epoch=2)])
        trackers.follow([ROW, dict(ROW, epoch=2)])
        trackers.follow([ROW, dict(ROW, epoch=2), dict(ROW, epoch=3)])
        raise KeyboardInterrupt
    assert calls == [1, 2, 3, True] and ("mlflow" in capsys.readouterr().out) == resumed
