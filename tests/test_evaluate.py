"""evaluate.py against plain computations; official heads; intervals over groups; memory of large images."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, blocks, call, load, random_images, write_folder, write_pair, write_tree
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

import evaluate
import infer_image
import train
import utils
from dataio.classes import ADE20K, VOC
from inference.predictor import choose_protocol, label_map, make_protocol, views_of
from dataio.transforms import resize_image
from metrics import counts_of, miou_of_counts
from checkpoint import load_model, load_official
from dataio.readers import read_image, read_mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose masks and images differ in size, and a finished run on it: (data, out)."""
    data, out = write_folder(tmp_path_factory.mktemp("data"), count=10), tmp_path_factory.mktemp("run")
    for number in (1, 4, 7):
        image = Image.open(data / f"images/{number:02d}.png")
        image.resize((90, 70)).save(data / f"images/{number:02d}.png")
    flags = ["--dataset", "folder", "--data-root", data, "--out-dir", out, "--backbone", "vit_tiny"]
    flags += [
        "--unfreeze",
        "all",
        "--imgsz",
        42,
        56,
        "--epochs",
        2,
        "--workers",
        0,
        "--amp",
        "off",
        "--lr",
        5e-4,
    ]
    call(train, *flags)
    return data, out


def score(run, out, *flags):
    """Run evaluate.py; return (text, metrics.json)."""
    code, text, err = run(evaluate, *flags, "--out-dir", out)
    assert code == 0, err
    return text, json.loads((out / "evaluation/metrics.json").read_text())


def plain_scores(data, model_file, split="val"):
    """Return (mIoU by torchmetrics, the confusion matrix by a loop over images) of a plain evaluation."""
    model, checkpoint = load_model(model_file)
    source = load("folder", data)
    jaccard = MulticlassJaccardIndex(3, ignore_index=255, average="macro")
    confusion = np.zeros((3, 3), np.int64)
    for sample in source.splits[split]:
        truth = torch.from_numpy(read_mask(sample.mask, source.table))
        with torch.no_grad():
            logits = model(resize_image(read_image(sample.image)[None], checkpoint["imgsz"]))
        logits = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False)
        pred = logits.argmax(1)[0]
        jaccard.update(pred, truth.long())
        np.add.at(confusion, (truth[truth != 255].numpy(), pred[truth != 255].numpy()), 1)
    return jaccard.compute().item(), confusion


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Score in float32, so that plain computations agree to the pixel."""
    monkeypatch.setitem(utils.PRECISIONS, "auto", lambda device: None)


def test_scores_equal_a_plain_loop_with_torchmetrics(trained, tmp_path, run):
    data, out = trained
    text, result = score(run, tmp_path, "--model", out / "best_model_iou.pth")
    miou, confusion = plain_scores(data, out / "best_model_iou.pth")
    assert np.abs(np.array(result["confusion"]) - confusion).sum() <= 4  # ties of rounding
    assert result["miou"] == pytest.approx(miou, abs=1e-3)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert result["miou"] == pytest.approx(max(row["val_miou"] for row in history), abs=1e-3)
    total = sum(np.array(confusion).ravel())
    assert result["pixel_accuracy"] == pytest.approx(np.trace(confusion) / total, abs=1e-3)
    names = [Path(record["name"]).name for record in result["records"]]
    assert len(names) == len(set(names)) == result["protocol"]["images"] == 2
    matrix = np.zeros((3, 3), np.int64)
    for record in result["records"]:
        for truth, pred, pixels in record["cells"]:
            matrix[truth, pred] += pixels
    assert matrix.tolist() == result["confusion"]  # per-image matrices sum to the total
    low, high = result["miou_interval"]
    assert low <= result["miou"] <= high and f"mIoU {result['miou']:.4f} (95 % interval" in text


def test_the_protocol_says_all_a_score_depends_on(trained, tmp_path, run):
    data, out = trained
    model = out / "best_model_iou.pth"
    text, result = score(run, tmp_path, "--model", model, "--protocol", "slide", "--tta", "ms,flip")
    protocol = result["protocol"]
    want = dict(dataset="folder", split="val", images=2, classes=3, ignore=255, imgsz=[42, 56])
    want |= dict(slide=True, stride=[28, 37], scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=True)
    want |= dict(precision="float32")
    assert {key: protocol[key] for key in want} == want
    import hashlib

    assert protocol["weights_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    line = next(line for line in text.splitlines() if line.startswith("protocol: "))
    for part in ("folder val", "2 images", "3 classes", "ignore 255", "window 42x56, stride 28x37", "flip",
                 "float32", "0.75 % of the diagonal", protocol["data_fingerprint"][:8],
                 protocol["split_fingerprint"][:8], protocol["weights_sha256"]):  # fmt: skip
        assert part in line
    _, other = score(run, tmp_path, "--model", model, "--imgsz", 28, 28, "--split", "train")
    assert other["protocol"]["views"] == "whole image at 28x28" and other["protocol"]["images"] == 8


@pytest.mark.parametrize("flags", [("slide", ""), ("whole", "flip"), ("slide", "ms")], ids=str)
def test_other_protocols_score_what_predict_predicts(trained, tmp_path, run, flags):
    data, out = trained
    kind, tta = flags
    more = ["--protocol", kind] + (["--tta", tta] if tta else [])
    _, result = score(run, tmp_path, "--model", out / "best_model_iou.pth", *more, "--batch-size", 3)
    model, checkpoint = load_model(out / "best_model_iou.pth")
    source = load("folder", data)
    protocol = make_protocol(kind, tta, checkpoint["imgsz"])
    confusion = np.zeros((3, 3), np.int64)
    for sample in source.splits["val"]:
        truth = read_mask(sample.mask, source.table)
        views = views_of(
            model, read_image(sample.image)[None], protocol, utils.Precision("off", utils.pick_device("cpu"))
        )
        pred = label_map(views, truth.shape).numpy()
        np.add.at(confusion, (truth[truth != 255], pred[truth != 255]), 1)
    assert np.abs(np.array(result["confusion"]) - confusion).sum() <= 4


def test_the_split_of_the_run_is_scored_and_others_when_asked(trained, tmp_path, run):
    data = tmp_path / "data"
    for part in ("images", "masks"):
        shutil.copytree(trained[0] / part, data / "train" / part)
        (data / "test" / part).mkdir(parents=True)
        for number in (8, 9):
            shutil.move(data / f"train/{part}/{number:02d}.png", data / f"test/{part}/{number:02d}.png")
    flags = ["--dataset", "folder", "--data-root", data, "--out-dir", tmp_path, "--backbone", "vit_tiny"]
    flags += ["--unfreeze", "all", "--imgsz", 28, 28, "--epochs", 1, "--workers", 0, "--val-fraction", 0.5]
    assert run(train, *flags, "--classes", "a", "b", "c", "--resplit")[0] == 0
    model = ["--model", tmp_path / "best_model_iou.pth"]
    trained_on = json.loads((tmp_path / "config.json").read_text())
    for split, count in (("val", 4), ("train", 4), ("test", 2), ("all", 10)):
        text, result = score(run, tmp_path, *model, "--split", split)
        assert result["protocol"]["images"] == count and "4 of 8 images validate" in text
        assert result["protocol"]["split_fingerprint"] == trained_on["split_fingerprint"]
    assert [row["name"] for row in result["per_class"]] == ["a", "b", "c"]
    code, _, err = run(evaluate, "--model", trained[1] / "best_model_iou.pth", "--split", "test")
    assert code == 2 and "--split test: folder has no such images; it has 8 train, 2 val" in err


def test_files_hold_the_same_numbers(trained, tmp_path, run):
    _, out = trained
    _, result = score(run, tmp_path, "--model", out / "best_model_iou.pth")
    lines = (tmp_path / "evaluation/per_class.csv").read_text().splitlines()
    assert lines[0].startswith("name,pixels,predicted,images,iou,dice,precision,recall,boundary_f1")
    for line, row in zip(lines[1:], result["per_class"], strict=True):
        name, pixels, _, _, iou, *_ = line.split(",")
        assert name == row["name"] and int(pixels) == row["pixels"]
        assert iou == "" if row["iou"] is None else float(iou) == row["iou"]
    confusion = np.array(result["confusion"])
    boundaries = np.array([record["boundary"] for record in result["records"]], float)
    for id, row in enumerate(result["per_class"]):
        right, truth, pred = confusion[id, id], confusion[id].sum(), confusion[:, id].sum()
        for key, value in (("precision", right / max(pred, 1)), ("recall", right / max(truth, 1))):
            assert row[key] is None or row[key] == pytest.approx(value)
        seen = boundaries[~np.isnan(boundaries[:, id]), id]
        assert row["boundary_f1"] is None or row["boundary_f1"] == pytest.approx(seen.mean())
    for name in ("per_class_iou.png", "confusion_matrix.png"):
        assert np.array(Image.open(tmp_path / "evaluation" / name)).std() > 1
    assert not (tmp_path / "evaluation/report.html").exists()


def test_absent_classes_are_named_and_left_out(trained, tmp_path, run):
    _, out = trained
    data = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            mask = blocks(45, 61, (0, 1) if split == "val" else (0, 1, 2), seed=number)
            write_pair(data / f"{split}/images/{number}.png", data / f"{split}/masks/{number}.png", mask)
    (data / "classes.txt").write_text("background\nclass 1\nclass 2\n")
    text, result = score(
        run, tmp_path, "--model", out / "best_model_iou.pth", "--dataset", "folder", "--data-root", data
    )
    row = result["per_class"][2]
    if row["predicted"] == 0:
        assert row["iou"] is None and result["absent"] == ["class 2"] and "absent from truth" in text
    assert row["pixels"] == 0 and row["recall"] is None


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--dataset", "camvid", "--data-root", "x"], "no CamVid under x"),
        (
            ["--dataset", "aeroscapes", "--data-root", "TREE"],
            "the model's classes are not those of --dataset aer",
        ),
        (["--imgsz", "0", "5"], "from 1 to 65,535"),
        (["--protocol", "window"], "slide"),
        (["--group-by", "("], "--group-by ( is no regular expression"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, run, flags, reason):
    write_tree("aeroscapes", tmp_path / "tree")
    flags = [str(tmp_path / "tree") if flag == "TREE" else flag for flag in flags]
    if "--model" not in flags:
        flags = ["--model", trained[1] / "best_model_iou.pth", *flags]
    code, _, err = run(evaluate, *flags, "--out-dir", tmp_path / "out")
    assert code == 2 and reason in err and "Traceback" not in err


# --- groups of images -------------------------------------------------------------------------------------
def test_the_interval_over_groups_is_that_of_their_sums(trained, tmp_path, run):
    """Images 0..7 in two groups: the bootstrap draws the two sums."""
    _, out = trained
    flags = ("--model", out / "best_model_iou.pth", "--split", "train")
    _, plain = score(run, tmp_path / "a", *flags)
    text, result = score(run, tmp_path / "b", *flags, "--group-by", r"[0-3](\.)|[4-9]\.")
    assert result["miou"] == plain["miou"] and result["interval_over"].startswith("2 groups by")
    assert "(95 % interval over 2 groups by" in text and plain["interval_over"] == "8 images"
    counts = counts_of(result["records"], len(result["per_class"]))
    numbers = [int(re.search(r"(\d)\D*$", record["name"])[1]) > 3 for record in result["records"]]
    parts = np.stack([counts[np.array(numbers) == side].sum(0) for side in (False, True)])
    sets = miou_of_counts(np.stack([2 * parts[0], parts.sum(0), 2 * parts[1]]))
    assert result["miou_interval"] == [pytest.approx(sets.min()), pytest.approx(sets.max())]
    code, _, err = run(evaluate, *flags, "--group-by", "zebra", "--out-dir", tmp_path)
    assert code == 2 and "--group-by zebra does not match" in err and err.count("\n") == 1


# --- official heads ---------------------------------------------------------------------------------------
@pytest.fixture
def official(hub_cache):
    """Head files as published, in torch.hub's cache, for the small stand-in backbone of hub_cache."""
    torch.manual_seed(1)
    for dataset, classes in (("voc2012", 21), ("ade20k", 150)):
        for kind, maps in (("linear", 1), ("ms", 4)):
            width = 48 * maps
            bn = dict(weight=torch.rand(width) + 0.5, bias=torch.randn(width))
            bn |= dict(running_mean=torch.randn(width), running_var=torch.rand(width) + 0.5)
            bn |= dict(num_batches_tracked=torch.tensor(9))
            conv = dict(weight=torch.randn(classes, width, 1, 1), bias=torch.randn(classes))
            state = {f"decode_head.bn.{key}": value for key, value in bn.items()}
            state |= {f"decode_head.conv_seg.{key}": value for key, value in conv.items()}
            name = f"dinov2_vits14_{dataset}_{kind}_head.pth"
            file = {"meta": {"epoch": 1, "CLASSES": ("a", "b")}, "state_dict": state}
            torch.save(file, hub_cache / "hub/checkpoints" / name)
    return hub_cache


@pytest.mark.parametrize("dataset", ["voc2012", "ade20k"])
@pytest.mark.parametrize(("kind", "maps"), [("linear", 1), ("ms", 4)])
def test_official_heads_equal_batchnorm_1x1_convolution_and_resize(official, dataset, kind, maps):
    name = f"dinov2_vits14_{dataset}_{kind}"
    model, checkpoint = load_official(name)
    images = random_images(2, 3, 50, 64)
    state = torch.load(official / f"hub/checkpoints/{name}_head.pth")["state_dict"]
    state = {key.removeprefix("decode_head."): value for key, value in state.items()}
    with torch.no_grad():
        pixels = (images - model.mean) / model.std
        padded = F.pad(pixels, (3, 3, 3, 3))  # 50 -> 56, 64 -> 70
        features = torch.cat(
            model.backbone.net.get_intermediate_layers(padded, n=maps, reshape=True, norm=True), 1
        )
        mean, var = (state[f"bn.running_{key}"].view(1, -1, 1, 1) for key in ("mean", "var"))
        features = (features - mean) / (var + 1e-5).sqrt()
        features = features * state["bn.weight"].view(1, -1, 1, 1) + state["bn.bias"].view(1, -1, 1, 1)
        logits = torch.einsum("bdhw,kd->bkhw", features, state["conv_seg.weight"][:, :, 0, 0])
        logits = logits + state["conv_seg.bias"].view(1, -1, 1, 1)
        want = F.interpolate(logits, size=(50, 64), mode="bilinear", align_corners=False)  # as mmsegmentation
        assert torch.allclose(model(images), want, atol=1e-3)
    classes = VOC if dataset == "voc2012" else ADE20K
    assert checkpoint["classes"] == [[class_name, list(color)] for class_name, color in classes]


def test_official_heads_are_scored_by_their_own_protocol_unless_told_otherwise(official, tmp_path, run):
    write_tree("voc", tmp_path / "voc", counts=(1, 1))
    flags = ["--dataset", "voc", "--data-root", tmp_path / "voc", "--model"]
    _, result = score(run, tmp_path, *flags, "dinov2_vits14_voc2012_linear")
    assert result["protocol"]["views"] == "window 512x512, stride 341x341"
    _, other = score(
        run, tmp_path, *flags, "dinov2_vits14_voc2012_linear", "--imgsz", 98, 98, "--protocol", "whole"
    )
    assert other["protocol"]["views"] == "whole image at 98x98"
    assert result["protocol"]["weights_sha256"] == other["protocol"]["weights_sha256"]
    for given, views in (
        ({}, "window 640x640, stride 320x320, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(tta="flip"), "window 640x640, stride 320x320, flip"),
        (dict(imgsz=(518, 518)), "window 518x518, stride 345x345, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(kind="slide"), "window 640x640, stride 320x320, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(kind="whole"), "whole image at 640x640, scales 1 1.32 1.73 2.28 3, flip"),
    ):
        assert str(choose_protocol(load_model("dinov2_vits14_voc2012_ms")[1], **given)) == views
    code, _, err = run(evaluate, "--model", "dinov2_vits14_voc2012_linear", "--out-dir", tmp_path)
    assert code == 2 and "--dataset is missing" in err


def test_official_heads_segment_images_and_say_where_their_file_goes(official, tmp_path, run, monkeypatch):
    write_tree("voc", tmp_path / "voc", counts=(1, 1))
    picture = tmp_path / "voc/JPEGImages/val_000000.jpg"
    flags = ["--input", picture, "--imgsz", 56, 70, "--out-dir", tmp_path, "--model"]
    assert run(infer_image, *flags, "dinov2_vits14_ade20k_linear")[0] == 0
    mask = np.array(Image.open(tmp_path / "inference_results_image/val_000000_mask.png"))
    assert mask.shape == (45, 61) and mask.max() < 150

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    code, _, err = run(infer_image, *flags, "dinov2_vitb14_ade20k_ms")
    place = official / "hub/checkpoints"
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_ade20k_ms_head.pth"
    assert code == 2 and f"put {url} into {place}" in err and err.count("\n") == 1


# --- memory -----------------------------------------------------------------------------------------------
LARGE = """
import sys, torch
import utils
from inference.predictor import Protocol, predict
from models.logits import Logits
class Net(torch.nn.Module):
    num_classes = 150
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 150, 1)
    def forward(self, images):
        return self.conv(images.float())
    def logits(self, images):
        return Logits(self(images))
torch.manual_seed(0)
net = Net().eval()
side = int(sys.argv[2])
image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
precision = utils.Precision("off", torch.device("cpu"))
scales = {"whole": (1.0,), "flip": (1.0,), "slide": (1.0, 1.5)}[sys.argv[1]]
slide = sys.argv[1] == "slide"
protocol = Protocol((384, 384), slide, (256, 256), scales, flip=sys.argv[1] == "flip")
pred = predict(net, image, protocol, precision, batch_size=2)
assert pred.shape == (1, side, side)
print(next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if "VmHWM" in line))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as on Linux")
@pytest.mark.parametrize(
    ("kind", "side", "most"),
    [
        pytest.param("whole", 1536, 1.2, marks=pytest.mark.long),
        pytest.param("whole", 2048, 1.5, marks=pytest.mark.long),
        pytest.param("whole", 4096, 3.0, marks=pytest.mark.long),
        pytest.param("slide", 2048, 2.5, marks=pytest.mark.long),
    ],
)
def test_large_images_with_150_classes_stay_within_memory(kind, side, most):
    """Logits alone take 1.4 GB at 1536x1536 pixels, 2.5 at 2048x2048, 10 at 4096x4096; two views twice."""
    command = [sys.executable, "-c", LARGE, kind, str(side)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most


def test_moved_data_and_a_copied_model_are_scored_alike(trained, tmp_path, run):
    data, out = trained
    _, here = score(run, tmp_path, "--model", out / "best_model_iou.pth")
    shutil.copytree(data, tmp_path / "moved")
    shutil.copy(out / "best_model_iou.pth", tmp_path / "copy.pth")
    _, there = score(run, tmp_path, "--model", tmp_path / "copy.pth", "--data-root", tmp_path / "moved")
    assert here["confusion"] == there["confusion"]
    for key in ("weights_sha256", "data_fingerprint", "split_fingerprint"):
        assert here["protocol"][key] == there["protocol"][key]
    counts = evaluate.counts_of(here["records"], 3)
    assert miou_of_counts(counts.sum(0)) == pytest.approx(here["miou"])
    assert re.fullmatch("[0-9a-f]{16}", here["protocol"]["weights_sha256"])


def test_another_folder_is_scored_whole_the_training_folder_as_it_was_split(trained, tmp_path, run):
    data, out = trained
    flags = ("--model", out / "best_model_iou.pth", "--data-root")
    text, result = score(run, tmp_path / "a", *flags, write_folder(tmp_path / "other", count=7))
    protocol = result["protocol"]
    assert (protocol["images"], protocol["split"], len(result["records"])) == (7, "all", 7)
    assert "folder all, 7 images" in text and "validate" not in text
    assert "mask values 0, 1, ... are read as background, class 1, class 2, the model's classes" in text
    text, own = score(run, tmp_path / "b", *flags, data)
    assert own["protocol"]["split"] == "val" and own["protocol"]["images"] == 2
    shutil.copytree(data, tmp_path / "moved")  # the same files elsewhere: what was trained on is not scored
    text, moved = score(run, tmp_path / "c", *flags, tmp_path / "moved")
    assert [Path(one["name"]).name for one in moved["records"]] == [
        Path(one["name"]).name for one in own["records"]
    ]
    assert moved["miou"] == own["miou"] and "warning" not in text


def test_a_training_folder_with_new_files_is_warned_of(trained, tmp_path, run):
    data, out = trained
    name = data / "images/new.png"
    shutil.copy(data / "images/00.png", name)
    shutil.copy(data / "masks/00.png", data / "masks/new.png")
    try:
        text, _ = score(run, tmp_path, "--model", out / "best_model_iou.pth", "--data-root", data)
    finally:
        name.unlink()
        (data / "masks/new.png").unlink()
    assert "warning: files were added, removed or changed since training" in text


def test_folders_that_are_not_there_and_runs_without_background(trained, tmp_path, run):
    data, out = trained
    flags = ("--model", out / "best_model_iou.pth", "--out-dir", tmp_path, "--dataset", "folder")
    for root, reason in ((tmp_path / "nowhere", "does not exist"), (data / "masks/00.png", "is a file")):
        code, _, err = run(evaluate, *flags, "--data-root", root)
        assert code == 2 and reason in err and err.count("\n") == 1
    trains = ["--dataset", "folder", "--data-root", data, "--out-dir", tmp_path / "run"]
    trains += ["--backbone", "vit_tiny", "--imgsz", 42, 56, "--epochs", 1, "--workers", 0]
    trains += ["--unfreeze", "all", "--ignore-background"]
    code, text, err = run(train, *trains)
    assert code == 0, err
    shutil.copytree(data, tmp_path / "copy")
    flags = ("--model", tmp_path / "run/best_model_iou.pth", "--data-root", tmp_path / "copy")
    _, result = score(run, tmp_path, *flags)
    assert [row["name"] for row in result["per_class"]] == ["class 1", "class 2"]
    best = json.loads((tmp_path / "run/history.jsonl").read_text().splitlines()[-1])
    assert result["miou"] == pytest.approx(best["val_miou"], abs=1e-6)
