"""The scripts as a user runs them: training, inference on images and video, bad input."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, blocks, history_of, real_data, train_flags, write_folder
from PIL import Image
from test_video import write_clip

import config
import engine
import infer_image
import infer_video
import train
import visualize
from checkpoint import load_model
from dataio.image_rule import PICTURES, read_image
from inference import video
from inference.predictor import Predictor, choose_protocol
from inference.video import VideoReader

RUN_FILES = {"config.json", "history.jsonl", "loss.png", "accuracy.png", "miou.png", "per_class_iou.png",
             "confusion_matrix.png", "best_model_iou.pth", "last.pth", "valid_preds"}
OPTIONS = {"--optimizer": "optimizer", "--scheduler": "scheduler", "--loss": "loss", "--amp": "amp",
           "--class-weights": "class_weights", "--augment": "augment"}


def registered_options(number, leave_out=()):
    """Return flags that give each of OPTIONS its registered value `number`: 0, 1, 2 ... reach every value."""
    flags = []
    for flag, kind in OPTIONS.items():
        value = config.names(kind)[number % len(config.names(kind))]
        if flag == "--loss" and value != "ce":
            value = f"ce+{value}"  # class weights are for ce
        flags += [] if flag in leave_out else [flag, value]
    return flags


@pytest.fixture
def model_file(trained):
    """The best checkpoint of the run."""
    return trained[1] / "best_model_iou.pth"


def files_in(folder):
    """Return {path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def predicted(model_file, image, **options):
    """Return the label map (H, W) of an image (3, H, W) uint8; options: of choose_protocol."""
    model, facts = load_model(model_file)
    return Predictor(model, facts, "cpu", choose_protocol(facts, **options))(image[None])[0]


# --- training -----------------------------------------------------------------------------------------------
def test_a_run_leaves_the_files_it_promises(trained):
    _, out = trained
    assert {path.name for path in out.iterdir()} >= RUN_FILES
    assert sorted(path.name for path in (out / "valid_preds").iterdir()) == ["epoch_001.png", "epoch_002.png"]
    rows = history_of(out)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert {"train_loss", "train_loss_ce", "val_loss", "val_miou", "per_class_iou"} <= row.keys()
        assert row["lr"] == 5e-4 and "backbone_lr" not in row  # they are the same
    settings = json.loads((out / "config.json").read_text())
    assert settings["imgsz"] == [42, 56] and settings["torch"] == torch.__version__
    assert settings["data_fingerprint"] and settings["code"]
    for name in RUN_FILES:
        if name.endswith(".png"):
            assert np.array(Image.open(out / name)).std() > 1


def test_accumulate_scheduler_and_amp_reach_the_run(trained, tmp_path, run):
    flags = train_flags(trained[0], tmp_path, "--epochs", 4, "--batch-size", 2, "--accumulate", 3)
    code, text, _ = run(train, *flags, "--amp", "off", "--scheduler", "cosine", "--backbone-lr-scale", 0.25)
    assert code == 0 and "cpu, float32" in text
    assert torch.load(tmp_path / "last.pth")["step"] == 4 * 2  # 8 images: 4 batches, 2 steps an epoch
    rows = history_of(tmp_path)
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(5e-4 * engine.lr_lambda("cosine", 8, 2)(7))
    assert [row["backbone_lr"] for row in rows] == pytest.approx([0.25 * rate for rate in rates])


def test_optimizer_losses_and_class_weights_reach_the_run(trained, tmp_path, run):
    """With a head of copied blocks, which have the backbone's rate."""
    more = ["--epochs", 2, "--optimizer", "sgd", "--scheduler", "onecycle", "--loss", "focal+dice"]
    more += ["--class-weights", "median", "--resplit"]
    more += ["--head", "split", "--split-blocks", 1, "--unfreeze", 1, "--backbone-lr-scale", 0.5]
    code, text, _ = run(train, *train_flags(trained[0], tmp_path, *more))
    (line,) = (line for line in text.splitlines() if line.startswith("class weights"))
    assert code == 0 and all(name in line for name in ("background", "class 1", "class 2"))
    rows = history_of(tmp_path)
    for row in rows:
        for split in ("train", "val"):
            total = row[f"{split}_loss_focal"] + row[f"{split}_loss_dice"]
            assert row[f"{split}_loss"] == pytest.approx(total, rel=1e-5)
        assert row["backbone_lr"] == pytest.approx(0.5 * row["lr"])
    assert rows[-1]["lr"] == pytest.approx(5e-4 * engine.lr_lambda("onecycle", 4, 2)(3))
    assert torch.load(tmp_path / "last.pth")["optimizer"]["param_groups"][0]["nesterov"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # pixels of all images, of those that train


def test_a_data_set_without_training_images_is_refused(tmp_path, run):
    root = real_data("aeroscapes_sample")
    flags = ["--dataset", "aeroscapes", "--data-root", root, "--backbone", "vit_tiny"]
    code, _, err = run(train, *flags, "--out-dir", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "out/last.pth").exists()


def test_the_mean_without_background_is_reported_beside_the_mean(trained, tmp_path, run):
    data = shutil.copytree(trained[0], tmp_path / "data")
    (data / "classes.txt").write_text("background\ncat\ndog\n")
    flags = train_flags(data, tmp_path / "out", "--epochs", 1)
    text = run(train, *flags)[1]
    assert "warning: the backbone" not in text
    (row,) = history_of(tmp_path / "out")
    ious = [iou for iou in row["per_class_iou"][1:] if iou is not None]
    assert f"{len(ious)} classes other than background: {np.mean(ious):.4f}" in text
    assert "other than background" not in run(train, *flags, "--ignore-background")[1]


def test_a_random_frozen_backbone_is_warned_about(trained, tmp_path, run):
    flags = ["--dataset", "folder", "--data-root", trained[0], "--backbone", "vit_tiny", "--imgsz", 28, 28]
    text = run(train, *flags, "--epochs", 1, "--workers", 0, "--out-dir", tmp_path)[1]
    assert "warning: the backbone" in text


def test_a_new_run_moves_the_earlier_one_and_nothing_else(trained, tmp_path, run):
    data, out = trained[0], shutil.copytree(trained[1], tmp_path / "out")
    mine = ("notes.txt", "inference_results_image/a_mask.png", "photos/last.pth")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    code, text, _ = run(train, *train_flags(data, out, "--epochs", 1))
    (moved,) = (out / "previous").iterdir()
    assert code == 0 and str(moved) in text
    assert {path.name for path in moved.iterdir()} == RUN_FILES
    assert (moved / "last.pth").read_bytes() == (trained[1] / "last.pth").read_bytes()
    assert len(history_of(out)) == 1 and all((out / name).read_text() == "mine" for name in mine)


def test_hub_backbone_trains_saves_and_infers_offline(hub_cache, tmp_path, run):
    data = write_folder(tmp_path / "data")
    more = ["--epochs", 1, "--backbone", "dinov2_vits14", "--unfreeze", 1]
    code, _, err = run(train, *train_flags(data, tmp_path, *more))
    assert code == 0, err
    recorded = json.loads((tmp_path / "config.json").read_text())
    weights = hub_cache / "hub/checkpoints/dinov2_vits14_pretrain.pth"
    assert recorded["hub"] == "facebookresearch/dinov2:main" and recorded["hub_code"]
    assert recorded["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    (hub_cache / "hub/facebookresearch_dinov2_main/more.py").write_text("x = 1")
    weights.unlink()  # last.pth holds them
    code, text, err = run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path)
    now = json.loads((tmp_path / "config.json").read_text())
    assert code == 0 and now["weights_sha256"] == recorded["weights_sha256"], err
    assert now["hub_code"] != recorded["hub_code"] and f"hub_code is {now['hub_code']}" in text
    flags = ["--input", data / "images", "--model", tmp_path / "best_model_iou.pth", "--out-dir", tmp_path]
    code, text, err = run(infer_image, *flags)
    assert code == 0 and "8 of 8 images" in text, err


def test_without_dataset_it_says_streets(run, monkeypatch):
    def stop(options, *args):
        raise train.InputError(f"asked for {options.dataset}")

    monkeypatch.setattr(train, "load_data", stop)
    code, out, err = run(train)
    assert code == 2 and "streets" in out and "asked for streets" in err


BAD_TRAINING = {  # flags, or what is changed in a copy of the folder: (file, its content, None = removed)
    "nowhere": ("--data-root", "nowhere"),
    "under": ("images", None),
    "03.png": ("masks/03.png", None),
    "masks/03.png": ("images/03.png", None),
    "images/03.png": ("images/03.png", b"\x89PNG\r\n\x1a\n"),
    "the value 9": ("masks/03.png", Image.fromarray(np.full((45, 61), 9, np.uint8))),
    "none.pth": ("--weights", "none.pth"),
    "cuda:9": ("--device", "cuda:9"),
    "--unfreeze 9": ("--unfreeze", 9),
    "--imgsz": ("--imgsz", 0, 5),
    "--head": ("--head", "mlp"),
    "--train-images 99": ("--train-images", 99),
}


@pytest.mark.parametrize(("named", "workers"), [
    *((named, 0) for named in BAD_TRAINING), pytest.param("images/03.png", 1, marks=pytest.mark.long)])
def test_bad_training_input_is_one_line_and_touches_nothing(trained, tmp_path, run, named, workers):
    """Where an earlier run is in the folder, it stays what it is."""
    data = shutil.copytree(trained[0], tmp_path / "broken")
    out = shutil.copytree(trained[1], tmp_path / "out")
    (data / "classes.txt").write_text("a\nb\nc\n")
    change, before = BAD_TRAINING[named], files_in(out)
    if not change[0].startswith("--"):
        path, content = data / change[0], change[1]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            content.save(path)
        change = ()
    code, _, err = run(train, *train_flags(data, out, "--epochs", 1), *change, "--workers", workers)
    line = err.strip().splitlines()[-1]
    assert code == 2 and "error:" in line and named in line and "Traceback" not in err
    assert files_in(out) == before


def test_a_loss_that_is_not_finite_stops_with_exit_code_1(trained, tmp_path, run):
    flags = train_flags(trained[0], tmp_path, "--epochs", 9, "--lr", 1e30, "--amp", "off")
    code, _, err = run(train, *flags)
    assert code == 1 and "nan" in err and ".png" in err and err.count("\n") == 1


# --- images -------------------------------------------------------------------------------------------------
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
    code, text, err = run(infer_image, "--input", photos, "--model", model_file, "--out-dir", tmp_path)
    out = tmp_path / "inference_results_image"
    assert code == 0 and "5 of 5 images" in text and err.count("warning: ") == 1 and "deep.png" in err
    for path in photos.iterdir():
        upright = read_image(path, replace(PICTURES, strict=False))
        assert upright.shape[1:] == ((71, 50) if path.stem == "phone" else (50, 71))
        mask = Image.open(out / f"{path.stem}_mask.png")
        assert mask.mode == "P" and (np.array(mask) == predicted(model_file, upright)).all()
        assert Image.open(out / f"{path.stem}_overlay.jpg").size == mask.size
    assert Image.open(out / "legend.png").size[0] > 60


@pytest.mark.parametrize(("flags", "imgsz", "alpha"), [
    ((), (42, 56), 0.5), (("--imgsz", 70, 28, "--alpha", 0.25), (70, 28), 0.25)], ids=str)
def test_overlay_is_the_prediction_over_the_image(model_file, tmp_path, run, flags, imgsz, alpha):
    image = np.full((64, 96, 3), (220, 120, 20), np.uint8)
    image[:32, :48] = (10, 90, 200)
    Image.fromarray(image).save(tmp_path / "a.png")
    flags = ("--input", tmp_path / "a.png", "--model", model_file, "--out-dir", tmp_path, *flags)
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and f"{imgsz[0]}x{imgsz[1]}" in text
    pred = predicted(model_file, torch.from_numpy(image).permute(2, 0, 1), imgsz=imgsz)
    colors = np.array([color for _, color in load_model(model_file)[1]["classes"]])[pred]
    want = np.where((pred == 0)[..., None], image, (1 - alpha) * image + alpha * colors)  # 0 = background
    got = np.array(Image.open(tmp_path / "inference_results_image/a_overlay.jpg"))
    assert np.abs(got - want).mean() < 6  # JPEG


def test_files_folders_globs_and_equal_stems(model_file, tmp_path, run):
    for name in ("a/1.png", "b/1.png", "b/2.jpg", "c[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    inputs = [tmp_path / "a/1.png", f"{tmp_path}/*/1.png", tmp_path / "b", tmp_path / "c[1].png"]
    code, text, _ = run(infer_image, "--model", model_file, "--out-dir", tmp_path, "--input", *inputs)
    masks = {path.name for path in (tmp_path / "inference_results_image").glob("*_mask.png")}
    assert code == 0 and masks == {"1_mask.png", "b_1_mask.png", "2_mask.png", "c[1]_mask.png"}, text


def test_a_corrupt_image_is_skipped(model_file, tmp_path, run):
    for number in range(3):
        Image.fromarray(blocks(40, 40, (0, 100, 200))).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    flags = ["--model", model_file, "--out-dir", tmp_path]
    code, text, err = run(infer_image, "--input", tmp_path, *flags)
    assert code == 1 and "2 of 3 images" in text and "1.png" in err
    assert (tmp_path / "inference_results_image/2_mask.png").exists()
    assert run(infer_image, "--input", tmp_path / "1.png", *flags)[0] == 2


@pytest.mark.parametrize(("flags", "named"), [
    (["--input", "nothing/*.png"], "nothing/*.png"),
    (["--input", "{tmp}"], "{tmp}"),
    (["--input", "{tmp}.png", "--model", "none.pth"], "none.pth"),
    (["--imgsz", "0", "4"], "--imgsz"),
    (["--input", "{tmp}", "--alpha", "2"], "--alpha"),
], ids=str)
@pytest.mark.parametrize("script", [infer_image, infer_video], ids=["image", "video"])
def test_bad_inference_input_is_one_line(model_file, tmp_path, run, script, flags, named):
    Image.new("RGB", (8, 8)).save(f"{tmp_path}.png")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    if "--model" not in flags:
        flags += ["--model", str(model_file)]
    code, _, err = run(script, *flags, "--out-dir", tmp_path / "out")
    line = err.strip().splitlines()[-1]
    assert code == 2 and named.format(tmp=tmp_path) in line and "Traceback" not in err
    assert not (tmp_path / "out").exists()


# --- video --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["whole", "tile"])
def test_a_clip_keeps_size_rate_and_frames_each_with_its_prediction(model_file, tmp_path, run, kind):
    clip = write_clip(tmp_path / "clip.mp4", 6, Fraction(30000, 1001), (96, 128))
    flags = ["--input", clip, "--model", model_file, "--out-dir", tmp_path, "--batch-size", 4]
    code, text, err = run(infer_video, *flags, "--alpha", 0.25, "--protocol", kind)
    assert code == 0 and "6 frames" in text and "29.97 frames/s" in text, err
    assert all(stage in text for stage in ("decode", "model", "draw", "encode"))
    reader = VideoReader(tmp_path / "inference_results_video/clip.mp4")
    assert reader.size == (96, 128) and reader.fps == Fraction(30000, 1001)
    table = visualize.color_table(load_model(model_file)[1]["classes"])
    for frame, drawn in zip(VideoReader(clip), reader, strict=True):
        pred = predicted(model_file, torch.from_numpy(frame).permute(2, 0, 1), kind=kind)
        want = visualize.overlay(frame, pred, table, 0.25)[24:]  # the counter stands above
        assert np.abs(drawn[24:].astype(int) - want).mean() < 12


def test_an_early_end_is_told_and_what_was_read_stays(model_file, tmp_path, run):
    clip = write_clip(tmp_path / "cut.mp4", 60)
    clip.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.6)])
    code, _, err = run(infer_video, "--input", clip, "--model", model_file, "--out-dir", tmp_path)
    assert code == 2 and "of 60 frames" in err and "Traceback" not in err
    assert len(list(VideoReader(tmp_path / "inference_results_video/cut.mp4"))) > 5


def test_a_clip_is_never_written_over_its_input(model_file, tmp_path, run):
    (tmp_path / "inference_results_video").mkdir()
    clip = write_clip(tmp_path / "inference_results_video/clip.mp4", 4)
    before = clip.read_bytes()
    assert run(infer_video, "--input", clip, "--model", model_file, "--out-dir", tmp_path)[0] == 0
    assert clip.read_bytes() == before and clip.with_name("clip_overlay.mp4").exists()


class Camera:
    """A camera never ends, however many frames are dropped."""

    def __init__(self, index):
        assert index == 0

    def read(self):
        return True, np.full((48, 64, 3), 90, np.uint8)

    def get(self, _):
        return 0.0


def test_max_frames_and_a_camera_index(model_file, tmp_path, run, monkeypatch):
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    flags = ["--input", 0, "--max-frames", 5, "--model", model_file, "--out-dir", tmp_path]
    code, text, _ = run(infer_video, *flags)
    monkeypatch.undo()
    (made,) = (tmp_path / "inference_results_video").iterdir()
    assert code == 0 and made.name.startswith("camera0_") and "5 frames" in text
    assert len(list(VideoReader(made))) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("frames", [3, 0])
def test_stopping_a_camera_is_its_normal_end(model_file, tmp_path, run, monkeypatch, number, frames):
    def timed(reader):
        for count in range(100):
            if count == frames:
                os.kill(os.getpid(), number)
                time.sleep(0.5)  # none comes for a while
            yield reader.read()[1], count / 10
            time.sleep(0.1)  # none is dropped

    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    monkeypatch.setattr(VideoReader, "timed", lambda reader: timed(reader.capture))
    flags = ["--input", 0, "--model", model_file, "--backend", "torch", "--out-dir", tmp_path]
    code, text, err = run(infer_video, *flags)
    monkeypatch.undo()
    made = list((tmp_path / "inference_results_video").iterdir())
    assert code == (0 if frames else 128 + number) and len(made) == bool(frames), text + err
    assert not made or 0 < len(list(VideoReader(made[0]))) <= frames


@pytest.mark.parametrize("script", [infer_image, infer_video], ids=["image", "video"])
def test_show_without_a_display_leaves_earlier_outputs(model_file, tmp_path, run, monkeypatch, script):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    clip = write_clip(tmp_path / "clip.mp4", 2)
    flags = ("--input", clip, "--model", model_file, "--out-dir", tmp_path / "out")
    code, _, err = run(script, *flags, "--show")
    assert code == 2 and "--show" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_no_window_unless_asked(model_file, tmp_path, run, monkeypatch):
    windows = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(visualize.cv2, "imshow", lambda title, frame: windows.append(frame.shape))
    monkeypatch.setattr(visualize.cv2, "waitKey", lambda delay: ord("q") if len(windows) == 3 else -1)
    clip = write_clip(tmp_path / "clip.mp4", 8)
    flags = ("--input", clip, "--model", model_file, "--out-dir", tmp_path)
    assert run(infer_video, *flags)[0] == 0 and not windows
    code, text, _ = run(infer_video, *flags, "--show")
    assert code == 0 and len(windows) == 3 and "3 frames" in text


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_leaves_a_playable_file(model_file, tmp_path, number):
    """In a process of its own, the only one whose signals are those of a terminal."""
    clip = write_clip(tmp_path / "clip.mp4", 500)
    flags = ["--input", clip, "--model", model_file, "--out-dir", tmp_path, "--imgsz", "224", "224"]
    process = subprocess.Popen([sys.executable, "infer_video.py", *flags, "--backend", "torch"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    started = time.time()
    while not list(tmp_path.glob("inference_results_video/.*.mp4")) and time.time() - started < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, out + err
    (made,) = (tmp_path / "inference_results_video").iterdir()
    assert 0 < len(list(VideoReader(made))) < 500


def test_real_clip_and_photos(model_file, tmp_path, run):
    clip, images = real_data("video") / "car-detection.mp4", real_data("images")
    flags = ["--model", model_file, "--out-dir", tmp_path]
    code, text, _ = run(infer_video, "--input", clip, "--max-frames", 8, *flags)
    assert code == 0 and "768x432" in text and "12.5 frames/s" in text
    assert run(infer_image, "--input", images, *flags)[0] == 0
    overlay = Image.open(tmp_path / "inference_results_image/bus_overlay.jpg")
    assert overlay.size == Image.open(images / "bus.jpg").size
