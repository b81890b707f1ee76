"""The scripts as a user runs them: training, resuming, inference on images and video, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, blocks, call, load, real_data, write_folder
from PIL import Image
from test_video import write_clip

import checkpoint
import config
import engine
import infer_image
import infer_video
import train
import utils
import visualize
from inference import video
from checkpoint import load_model
from inference.predictor import Protocol, predict
from losses import Criterion
from dataio.readers import DataSource, read_image
from inference.video import VideoReader

RUN_FILES = {
    "config.json",
    "history.jsonl",
    "loss.png",
    "accuracy.png",
    "miou.png",
    "per_class_iou.png",
    "confusion_matrix.png",
    "best_model_iou.pth",
    "last.pth",
    "valid_preds",
}


def train_flags(data, out, *more):
    """Return the flags of a run of seconds: vit_tiny from scratch on a small folder."""
    return (
        "--dataset",
        "folder",
        "--data-root",
        data,
        "--out-dir",
        out,
        "--backbone",
        "vit_tiny",
        "--unfreeze",
        "all",
        "--imgsz",
        42,
        56,
        "--batch-size",
        4,
        "--lr",
        5e-4,
        "--backbone-lr-scale",
        1,
        "--workers",
        0,
        "--scheduler",
        "none",
        *more,
    )


OPTIONS = {"--optimizer": "optimizer", "--scheduler": "scheduler", "--loss": "loss", "--amp": "amp",
           "--class-weights": "class_weights", "--augment": "augment"}


def registered_options(number, leave_out=()):
    """Return flags that give each of OPTIONS its registered value `number`: 0, 1, 2 ... reach every value."""
    flags = []
    for flag, kind in OPTIONS.items():
        value = config.names(kind)[number % len(config.names(kind))]
        if flag == "--loss" and value != "ce":
            value = f"ce+{value}"  # class weights are for ce alone
        flags += [] if flag in leave_out else [flag, value]
    return flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder data set and a finished run of two epochs: (data, out)."""
    data, out = write_folder(tmp_path_factory.mktemp("data"), count=10), tmp_path_factory.mktemp("run")
    call(train, *train_flags(data, out, "--epochs", 2), plots=True)
    return data, out


@pytest.fixture
def model_file(trained):
    """The best checkpoint of the run."""
    return trained[1] / "best_model_iou.pth"


def history_of(out):
    """Return the rows of history.jsonl."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


# --- training ---------------------------------------------------------------------------------------------
def test_a_run_leaves_the_files_it_promises(trained):
    _, out = trained
    assert {path.name for path in out.iterdir()} >= RUN_FILES | {".lock", ".run.json"}
    assert sorted(path.name for path in (out / "valid_preds").iterdir()) == ["epoch_001.png", "epoch_002.png"]
    rows = history_of(out)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"train_loss", "train_loss_ce", "val_loss", "val_miou", "val_dice", "per_class_iou", "lr"} <= rows[
        0
    ].keys()
    settings = json.loads((out / "config.json").read_text())
    assert (
        settings["imgsz"] == [42, 56]
        and settings["data_fingerprint"]
        and settings["torch"] == torch.__version__
    )
    for name in RUN_FILES:
        if name.endswith(".png"):
            assert np.array(Image.open(out / name)).std() > 1


def test_best_checkpoint_is_the_best_epoch_and_scores_what_it_says(trained):
    data, out = trained
    rows = history_of(out)
    model, checkpoint = load_model(out / "best_model_iou.pth")
    best = max(rows, key=lambda row: row["val_miou"])
    assert checkpoint["epoch"] == best["epoch"] and checkpoint["metrics"]["miou"] == best["val_miou"]
    source = load("folder", data)
    dataset = train.SegmentationDataset(source.splits["val"], source.table, (42, 56))
    bar = train.tqdm(train.make_loader(dataset, 3, 0), disable=True)
    scores, _ = engine.evaluate(model, bar, utils.Precision("auto", torch.device("cpu")), Criterion("ce"))
    assert scores["miou"] == pytest.approx(best["val_miou"], abs=2e-3)  # bf16 rounds by batch


def test_resume_equals_an_uninterrupted_run(trained, tmp_path, run):
    data, out = trained
    shutil.copytree(out, tmp_path / "resumed")
    code, text, _ = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "resumed")
    assert code == 0 and "resumed after epoch 2" in text
    assert run(train, *train_flags(data, tmp_path / "straight", "--epochs", 3))[0] == 0
    rows, straight = history_of(tmp_path / "resumed"), history_of(tmp_path / "straight")
    assert [row["epoch"] for row in rows] == [1, 2, 3] and not (tmp_path / "resumed/previous").exists()
    for a, b in zip(rows, straight, strict=True):
        assert a["train_loss"] == b["train_loss"] and a["val_miou"] == b["val_miou"]
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("resumed", "straight"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert a["step"] == b["step"] and torch.equal(a["random"]["torch"], b["random"]["torch"])


def test_accumulate_scheduler_and_amp_reach_the_run(trained, tmp_path, run):
    flags = train_flags(trained[0], tmp_path / "out", "--epochs", 4, "--batch-size", 2, "--accumulate", 3)
    code, text, _ = run(train, *flags, "--amp", "off", "--scheduler", "cosine")
    assert code == 0 and "cpu, float32" in text
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert last["step"] == 4 * 2  # 8 images, 4 batches, 2 optimizer steps an epoch
    rates = [row["lr"] for row in history_of(tmp_path / "out")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(5e-4 * engine.lr_lambda("cosine", 8, 2)(7))


def test_optimizer_losses_and_class_weights_reach_the_run(trained, tmp_path, run):
    more = ["--epochs", 2, "--optimizer", "sgd", "--scheduler", "onecycle", "--loss", "focal+dice"]
    more += ["--class-weights", "median", "--resplit"]
    flags = train_flags(trained[0], tmp_path / "out", *more)
    code, text, _ = run(train, *flags)
    assert code == 0 and "class weights: background " in text
    assert "split anew: 2 of 10 images validate" in text
    rows = history_of(tmp_path / "out")
    for row in rows:
        for part in ("train", "val"):
            total = row[f"{part}_loss_focal"] + row[f"{part}_loss_dice"]
            assert row[f"{part}_loss"] == pytest.approx(total, rel=1e-5)
    assert rows[-1]["lr"] == pytest.approx(5e-4 * engine.lr_lambda("onecycle", 4, 2)(3))
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert last["optimizer"]["param_groups"][0]["nesterov"]
    assert len(list((tmp_path / "out/cache").iterdir())) == 2  # pixels of all images, of those that train
    code, text, _ = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")
    assert code == 0 and "class weights: background " in text


def test_a_data_set_without_training_images_is_refused(tmp_path, run):
    flags = ["--dataset", "aeroscapes", "--data-root", real_data("aeroscapes_sample")]
    code, _, err = run(train, *flags, "--backbone", "vit_tiny", "--out-dir", tmp_path / "out")
    assert code == 2 and "has no training image of its own" in err and err.count("\n") == 1


def test_a_baseline_trains_resumes_and_infers(trained, tmp_path, run):
    data, out = trained[0], tmp_path / "out"
    base = ["--arch", "segformer_b0", "--weights", "none", "--imgsz", 40, 56, "--epochs", 1]
    base += ["--batch-size", 3, "--workers", 0]
    code, text, _ = run(train, "--dataset", "folder", "--data-root", data, "--out-dir", out, *base)
    assert code == 0 and "model: segformer_b0, 3,714,915 parameters train, 0 are frozen" in text
    code, text, _ = run(train, "--resume", "--epochs", 2, "--out-dir", out)
    assert code == 0 and [row["epoch"] for row in history_of(out)] == [1, 2]
    flags = ["--input", data / "images/00.png", "--model", out / "best_model_iou.pth", "--out-dir", out]
    assert run(infer_image, *flags)[0] == 0
    mask = np.array(Image.open(out / "inference_results_image/00_mask.png"))
    assert mask.shape == (45, 61) and mask.max() < 3


def test_the_mean_without_background_is_reported_beside_the_mean(trained, tmp_path, run):
    (tmp_path / "data").mkdir()
    for name in ("images", "masks"):
        shutil.copytree(trained[0] / name, tmp_path / "data" / name)
    (tmp_path / "data/classes.txt").write_text("background\ncat\ndog\n")
    flags = train_flags(tmp_path / "data", tmp_path / "out", "--epochs", 1)
    text = run(train, *flags)[1]
    (row,) = history_of(tmp_path / "out")
    ious = [iou for iou in row["per_class_iou"][1:] if iou is not None]
    assert f"mean of the {len(ious)} classes other than background: {np.mean(ious):.4f}" in text
    assert "other than background" not in run(train, *flags, "--ignore-background")[1]


def test_random_state_is_saved_and_restored():
    torch.rand(3), np.random.rand(3), random.random()
    state = checkpoint.random_state()
    drawn = torch.rand(4).tolist(), np.random.rand(4).tolist(), random.random()
    checkpoint.restore_random_state(state)
    assert drawn == (torch.rand(4).tolist(), np.random.rand(4).tolist(), random.random())


def test_data_are_fingerprinted_once_so_that_a_file_lost_midway_costs_no_epoch(
    trained, tmp_path, run, monkeypatch
):
    calls, fingerprints = [], DataSource.fingerprints
    monkeypatch.setattr(DataSource, "fingerprints", lambda self: calls.append(1) or fingerprints(self))
    assert run(train, *train_flags(trained[0], tmp_path / "out", "--epochs", 2))[0] == 0
    assert len(calls) == 1


def test_a_frozen_random_backbone_is_warned_about(trained, tmp_path, run):
    flags = train_flags(trained[0], tmp_path / "out", "--epochs", 1)
    assert "warning: the backbone is random" not in run(train, *flags)[1]
    frozen = [flag for flag in flags if flag not in ("--backbone-lr-scale", "--epochs", 1)]
    frozen += ["--epochs", 1, "--unfreeze", 0]
    assert "warning: the backbone is random" in run(train, *frozen)[1]


def test_a_new_run_sets_the_earlier_one_aside(trained, tmp_path, run):
    data, out = trained
    shutil.copytree(out, tmp_path / "out")
    code, text, _ = run(train, *train_flags(data, tmp_path / "out", "--epochs", 1))
    assert code == 0 and "was moved to" in text
    (moved,) = (tmp_path / "out/previous").iterdir()
    assert {path.name for path in moved.iterdir()} >= RUN_FILES
    assert (moved / "last.pth").read_bytes() == (out / "last.pth").read_bytes()
    assert len(history_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("head", ["bn", "linear"])
def test_hub_backbone_trains_saves_and_infers_offline(head, hub_cache, tmp_path, run, monkeypatch):
    data = write_folder(tmp_path / "data")
    flags = train_flags(
        data,
        tmp_path / "out",
        "--epochs",
        1,
        "--head",
        head,
        "--augment",
        "crop",
        "flip",
        "color",
        "--backbone",
        "dinov2_vits14",
        "--unfreeze",
        1,
        "--accumulate",
        2,
    )
    code, text, err = run(train, *flags)
    assert code == 0 and "are frozen" in text, err
    code, text, err = run(
        infer_image,
        "--input",
        data / "images",
        "--model",
        tmp_path / "out/best_model_iou.pth",
        "--out-dir",
        tmp_path / "out",
    )
    assert code == 0 and "8 of 8 images" in text, err


def test_without_dataset_it_says_streets(run, monkeypatch):
    def stop(options, *args):
        raise train.InputError(f"asked for {options.dataset}")

    monkeypatch.setattr(train, "load_data", stop)
    code, out, err = run(train)
    assert code == 2 and "training on streets" in out and "asked for streets" in err


def bad_training(data, tmp_path, kind):
    """Break a copy of the folder data set, or return wrong flags; return the flags of the run."""
    root = tmp_path / "broken"
    shutil.copytree(data, root)
    changed = {
        "no root": ("--data-root", tmp_path / "nowhere"),
        "weights": ("--weights", tmp_path / "none.pth"),
        "device": ("--device", "cuda:9"),
        "unfreeze": ("--unfreeze", 9),
        "size": ("--imgsz", 0, 5),
        "head": ("--head", "mlp"),
    }
    if kind == "empty":
        shutil.rmtree(root / "images")
        (root / "images").mkdir()
    elif kind == "no mask":
        (root / "masks/03.png").unlink()
    elif kind == "no image":
        (root / "images/03.png").unlink()
    elif kind == "value":
        (root / "classes.txt").write_text("a\nb\nc\n")
        Image.fromarray(np.full((45, 61), 9, np.uint8)).save(root / "masks/03.png")
    elif kind == "corrupt image":
        whole = (root / "images/03.png").read_bytes()
        (root / "images/03.png").write_bytes(whole[: len(whole) // 2])
    return *train_flags(root, tmp_path / "out", "--epochs", 1), *changed.get(kind, ())


BAD_TRAINING = {
    "no root": "nowhere does not exist",
    "empty": "no images with masks found under",
    "no mask": "images/03.png has no mask",
    "no image": "masks/03.png has no image",
    "value": "masks/03.png has the value 9",
    "corrupt image": "images/03.png is damaged",
    "weights": "none.pth does not exist",
    "device": "cuda:9",
    "unfreeze": "has 6 blocks",
    "size": "from 1 to 65,535",
    "head": "linear",
}


@pytest.mark.parametrize(("kind", "workers"), [*[(kind, 0) for kind in BAD_TRAINING], ("corrupt image", 1)])
def test_bad_training_input_is_one_line_and_loses_nothing(trained, tmp_path, run, kind, workers):
    shutil.copytree(trained[1], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, _, err = run(train, *bad_training(trained[0], tmp_path, kind), "--workers", workers)
    line = err.strip().splitlines()[-1]
    assert code == 2 and "error:" in line and BAD_TRAINING[kind] in line and "Traceback" not in err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "kind", ["nothing there", "truncated", "other data", "other head", "best"]
)
def test_resume_refuses_what_it_cannot_go_on_from(trained, tmp_path, run, kind):
    data, out = trained
    if kind != "nothing there":
        shutil.copytree(out, tmp_path / "out")
    flags, reason = (
        ["--epochs", 3],
        {
            "nothing there": "saved nothing yet: start it by its command without --resume",
            "truncated": "last.pth is not a whole",
            "other data": "not the one the run was trained",
            "other head": "--head is 'linear'",
            "best": "it is not the last.pth of a run",
        }[kind],
    )
    if kind == "truncated":
        whole = (out / "last.pth").read_bytes()
        (tmp_path / "out/last.pth").write_bytes(whole[: len(whole) // 2])
    elif kind == "other data":
        flags += ["--data-root", write_folder(tmp_path / "data", count=6)]
    elif kind == "best":
        shutil.copy(out / "best_model_iou.pth", tmp_path / "out/last.pth")
    elif kind == "other head":
        flags += ["--head", "linear"]
    code, _, err = run(train, "--resume", "--out-dir", tmp_path / "out", *flags)
    assert code == 2 and reason in err and "Traceback" not in err
    assert not (tmp_path / "out/previous").exists()


def test_a_loss_that_is_not_finite_stops_with_exit_code_1(trained, tmp_path, run):
    code, _, err = run(
        train, *train_flags(trained[0], tmp_path / "out", "--epochs", 9, "--lr", 1e30, "--amp", "off")
    )
    assert code == 1 and "the loss is nan at step" in err and ".png" in err and "Traceback" not in err


# --- images -----------------------------------------------------------------------------------------------
def test_images_of_every_kind_come_out_right(model_file, tmp_path, run):
    pixels = np.dstack([blocks(50, 71, (1, 3, 5), seed=seed) * 40 for seed in range(3)])
    exif = Image.Exif()
    exif[0x0112] = 6
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(pixels).save(photos / "rgb.png")
    Image.fromarray(pixels[..., 0]).save(photos / "gray.jpg")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(photos / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(photos / "deep.png")
    Image.fromarray(pixels).save(photos / "phone.jpg", exif=exif)
    code, text, _ = run(infer_image, "--input", photos, "--model", model_file, "--out-dir", tmp_path)
    out = tmp_path / "inference_results_image"
    assert code == 0 and "5 of 5 images" in text
    model, _ = load_model(model_file)
    for path in photos.iterdir():
        upright = read_image(path)
        assert upright.shape[1:] == ((71, 50) if path.stem == "phone" else (50, 71))
        mask = Image.open(out / f"{path.stem}_mask.png")
        want = predict(
            model, upright[None], Protocol((42, 56)), utils.Precision("auto", torch.device("cpu"))
        )[0]
        assert mask.mode == "P" and (np.array(mask) == want.numpy()).all()
        assert Image.open(out / f"{path.stem}_overlay.jpg").size == mask.size
    assert Image.open(out / "legend.png").size[0] > 60
    assert text.count("scaled by the depth of their values: 16 bit\n") == 1


@pytest.mark.parametrize(
    ("flags", "imgsz", "alpha"), [((), (42, 56), 0.5), (("--imgsz", 70, 28, "--alpha", 0.25), (70, 28), 0.25)]
)
def test_overlay_is_the_prediction_over_the_image(model_file, tmp_path, run, flags, imgsz, alpha):
    image = np.full((64, 96, 3), (220, 120, 20), np.uint8)
    image[:32, :48] = (10, 90, 200)
    Image.fromarray(image).save(tmp_path / "a.png")
    flags = ("--input", tmp_path / "a.png", "--model", model_file, "--out-dir", tmp_path, *flags)
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and f"at {imgsz[0]}x{imgsz[1]} on" in text
    model, checkpoint = load_model(model_file)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    pred = predict(model, batch, Protocol(imgsz), utils.Precision("auto", torch.device("cpu")))[
        0
    ].numpy()
    colors = np.array([color for _, color in checkpoint["classes"]])[pred]
    want = np.where((pred == 0)[..., None], image, (1 - alpha) * image + alpha * colors)  # 0 = background
    got = np.array(Image.open(tmp_path / "inference_results_image/a_overlay.jpg"))
    assert np.abs(got - want).mean() < 6  # JPEG


def test_files_folders_globs_and_equal_stems(model_file, tmp_path, run):
    for name in ("a/1.png", "b/1.png", "b/2.jpg", "c[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    code, text, _ = run(
        infer_image,
        "--model",
        model_file,
        "--out-dir",
        tmp_path,
        "--input",
        tmp_path / "a/1.png",
        f"{tmp_path}/*/1.png",
        tmp_path / "b",
        tmp_path / "c[1].png",
    )
    masks = {path.name for path in (tmp_path / "inference_results_image").glob("*_mask.png")}
    assert code == 0 and masks == {"1_mask.png", "b_1_mask.png", "2_mask.png", "c[1]_mask.png"}, text


def test_a_corrupt_image_is_passed_over(model_file, tmp_path, run):
    for number in range(3):
        Image.fromarray(blocks(40, 40, (0, 100, 200))).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    code, text, err = run(infer_image, "--input", tmp_path, "--model", model_file, "--out-dir", tmp_path)
    assert code == 1 and "2 of 3 images" in text and "skipped" in err and "1.png" in err
    assert (tmp_path / "inference_results_image/2_mask.png").exists()
    assert (
        run(infer_image, "--input", tmp_path / "1.png", "--model", model_file, "--out-dir", tmp_path)[0] == 2
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--input", "nothing/*.png"], "nothing/*.png is not a file"),
        (["--input", "{tmp}"], "folder without images"),
        (["--input", "x.png", "--model", "none.pth"], "none.pth does not exist"),
        (["--imgsz", "0", "4"], "from 1 to 65,535"),
        (["--input", "{tmp}", "--alpha", "2"], "between 0 and 1"),
    ],
)
@pytest.mark.parametrize("script", [infer_image, infer_video], ids=["image", "video"])
def test_bad_inference_input_is_one_line(model_file, tmp_path, run, script, flags, reason):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "x.png")
    flags = [str(tmp_path.parent / flag) if flag == "x.png" else flag for flag in flags]
    if "--model" not in flags:
        flags += ["--model", str(model_file)]
    if script is infer_video and "--input" in flags and "--alpha" not in flags and "--imgsz" not in flags:
        reason = "is not a file" if "none.pth" not in flags else reason
    code, _, err = run(script, *flags, "--out-dir", tmp_path / "out")
    assert code == 2 and reason in err and "Traceback" not in err and not (tmp_path / "out").exists()


# --- video ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_clip_keeps_size_rate_and_frames(model_file, tmp_path, run, batch_size):
    clip = write_clip(tmp_path / "clip.mp4", 11, Fraction(30000, 1001), (48, 64))
    code, text, err = run(
        infer_video, "--input", clip, "--model", model_file, "--out-dir", tmp_path, "--batch-size", batch_size
    )
    assert code == 0, err
    assert "11 frames" in text and "frames/s end to end" in text and "29.97 frames/s" in text
    assert all(stage in text for stage in ("decode", "model", "draw", "encode"))
    reader = VideoReader(tmp_path / "inference_results_video/clip.mp4")
    assert reader.size == (48, 64) and reader.fps == Fraction(30000, 1001) and len(list(reader)) == 11


def test_every_frame_shows_its_own_prediction_in_order(model_file, tmp_path, run):
    clip = write_clip(tmp_path / "clip.mp4", 6, size=(96, 128))
    flags = (
        "--input",
        clip,
        "--model",
        model_file,
        "--out-dir",
        tmp_path,
        "--batch-size",
        4,
        "--alpha",
        0.25,
    )
    assert run(infer_video, *flags)[0] == 0
    model, checkpoint = load_model(model_file)
    table = visualize.color_table(checkpoint["classes"])
    precision = utils.Precision("auto", torch.device("cpu"))
    drawn = list(VideoReader(tmp_path / "inference_results_video/clip.mp4"))
    for frame, got in zip(VideoReader(clip), drawn, strict=True):
        pred = predict(
            model, torch.from_numpy(frame).permute(2, 0, 1)[None], Protocol((42, 56)), precision
        )[0].numpy()
        want = visualize.overlay(frame, pred, table, 0.25)[24:]  # the counter stands above
        assert np.abs(got[24:].astype(int) - want).mean() < 12


def test_an_early_end_is_told_and_what_was_read_is_kept(model_file, tmp_path, run):
    clip = write_clip(tmp_path / "cut.mp4", 120)
    clip.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.6)])
    code, _, err = run(infer_video, "--input", clip, "--model", model_file, "--out-dir", tmp_path)
    assert code == 2 and "of 120 frames" in err and "Traceback" not in err
    assert len(list(VideoReader(tmp_path / "inference_results_video/cut.mp4"))) > 10


def test_a_clip_is_never_written_over_its_input(model_file, tmp_path, run):
    (tmp_path / "inference_results_video").mkdir()
    clip = write_clip(tmp_path / "inference_results_video/clip.mp4", 4)
    before = clip.read_bytes()
    assert run(infer_video, "--input", clip, "--model", model_file, "--out-dir", tmp_path)[0] == 0
    assert clip.read_bytes() == before and clip.with_name("clip_overlay.mp4").exists()


def test_max_frames_and_a_camera_index(model_file, tmp_path, run, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 20)

    open_capture = video.cv2.VideoCapture

    class Camera:
        """Plays the clip again and again: a camera never ends, however many frames are dropped."""

        def __init__(self):
            self.clip = open_capture(str(clip))

        def __getattr__(self, name):
            return getattr(self.clip, name)

        def read(self):
            good, frame = self.clip.read()
            if not good:
                self.clip = open_capture(str(clip))
                good, frame = self.clip.read()
            return good, frame

    monkeypatch.setattr(
        video.cv2, "VideoCapture", lambda source: Camera() if source == 0 else open_capture(source)
    )
    code, text, _ = run(
        infer_video, "--input", 0, "--max-frames", 5, "--model", model_file, "--out-dir", tmp_path
    )
    (made,) = (tmp_path / "inference_results_video").iterdir()
    assert code == 0 and made.name.startswith("camera0_") and "5 frames" in text
    assert len(list(VideoReader(made))) == 5


@pytest.mark.parametrize("script", [infer_image, infer_video], ids=["image", "video"])
def test_show_without_a_display_leaves_earlier_outputs(model_file, tmp_path, run, monkeypatch, script):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    clip = write_clip(tmp_path / "clip.mp4", 2)
    flags = ("--input", clip, "--model", model_file, "--out-dir", tmp_path / "out")
    code, _, err = run(script, *flags, "--show")
    assert code == 2 and "--show needs a display" in err and not (tmp_path / "out").exists()


def test_no_window_unless_asked(model_file, tmp_path, run, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(visualize.cv2, "imshow", lambda title, frame: shown.append(frame.shape))
    monkeypatch.setattr(visualize.cv2, "waitKey", lambda delay: ord("q") if len(shown) == 3 else -1)
    clip = write_clip(tmp_path / "clip.mp4", 8)
    flags = ("--input", clip, "--model", model_file, "--out-dir", tmp_path)
    assert run(infer_video, *flags)[0] == 0 and not shown
    code, text, _ = run(infer_video, *flags, "--show")
    assert code == 0 and len(shown) == 3 and "stopped after 3 frames" in text


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_ctrl_c_leaves_a_playable_file(model_file, tmp_path, number):
    """In a process of its own, the only one whose signals are those of a terminal."""
    clip = write_clip(tmp_path / "clip.mp4", 1000)
    process = subprocess.Popen(
        [
            sys.executable,
            "infer_video.py",
            "--input",
            clip,
            "--model",
            model_file,
            "--out-dir",
            tmp_path,
            "--imgsz",
            "224",
            "224",
            "--backend",
            "torch",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    started = time.time()
    while not list(tmp_path.glob("inference_results_video/.*.mp4")) and time.time() - started < 60:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped after" in out and "Traceback" not in err, err
    (made,) = (tmp_path / "inference_results_video").iterdir()
    assert 0 < len(list(VideoReader(made))) < 1000


def test_real_clip_and_photos(model_file, tmp_path, run):
    clip, images = real_data("video") / "car-detection.mp4", real_data("images")
    code, text, _ = run(
        infer_video, "--input", clip, "--max-frames", 8, "--model", model_file, "--out-dir", tmp_path
    )
    assert code == 0 and "768x432, 12.5 frames/s" in text
    assert run(infer_image, "--input", images, "--model", model_file, "--out-dir", tmp_path)[0] == 0
    assert (
        Image.open(tmp_path / "inference_results_image/bus_overlay.jpg").size
        == Image.open(images / "bus.jpg").size
    )
