"""evaluate.py against plain computations; which data it scores; official heads; memory of large images."""

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, blocks, call, load, random_images, refused, write_folder, write_pair, write_tree
from labeling_tools import TOOLS
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

import evaluate
import infer_image
import train
import utils
from checkpoint import load_model, load_official
from dataio.classes import ADE20K, VOC
from dataio.contents import paths_in
from dataio.image_rule import read_image
from dataio.readers import read_mask
from dataio.resizing import resize_image
from inference.predictor import choose_protocol
from metrics import ConfusionMatrix, counts_per_image, miou_from_counts


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Score in float32, so that plain computations agree to the pixel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(utils.PRECISIONS, "auto", lambda device: None)
        yield


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A folder that nothing was trained on, without a split."""
    return write_folder(tmp_path_factory.mktemp("other"), count=7)


def score(out, *flags, plots=False):
    """Run evaluate.py; return (stdout, metrics.json)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        call(evaluate, *flags, "--out-dir", out, plots=plots)
    return text.getvalue(), json.loads((out / "evaluation/metrics.json").read_text())


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """The best model of the run on its own validation images: (stdout, metrics.json, folder)."""
    out = tmp_path_factory.mktemp("scored")
    return *score(out, "--model", trained[1] / "best_model_iou.pth", plots=True), out


# --- numbers ----------------------------------------------------------------------------------------------
def test_scores_equal_a_plain_loop_with_torchmetrics(trained, scored):
    data, out = trained
    text, result, _ = scored
    model, checkpoint = load_model(out / "best_model_iou.pth")
    source, jaccard = load("folder", data), MulticlassJaccardIndex(3, ignore_index=255, average="macro")
    confusion = np.zeros((3, 3), np.int64)
    for sample in source.splits["val"]:
        truth = torch.from_numpy(read_mask(sample.mask, source.table))
        with torch.no_grad():
            logits = model(resize_image(read_image(sample.image)[None], checkpoint["imgsz"]))
        pred = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False).argmax(1)[0]
        jaccard.update(pred, truth.long())
        np.add.at(confusion, (truth[truth != 255].numpy(), pred[truth != 255].numpy()), 1)
    assert np.abs(np.array(result["confusion"]) - confusion).sum() <= 4  # ties of rounding
    assert result["miou"] == pytest.approx(jaccard.compute().item(), abs=1e-3)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert result["miou"] == pytest.approx(max(row["val_miou"] for row in history), abs=1e-3)
    assert result["pixel_accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum(), abs=1e-3)
    names = [Path(record["name"]).name for record in result["records"]]
    assert len(names) == len(set(names)) == result["protocol"]["images"] == 2
    matrix = np.zeros((3, 3), np.int64)
    for record in result["records"]:
        for truth, pred, pixels in record["cells"]:
            matrix[truth, pred] += pixels
    assert matrix.tolist() == result["confusion"]  # per-image matrices sum to the total
    low, high = result["miou_interval"]
    assert low <= result["miou"] <= high and f"mIoU {result['miou']:.4f}" in text


def test_files_hold_the_same_numbers(scored):
    _, result, out = scored
    lines = (out / "evaluation/per_class.csv").read_text().splitlines()
    assert lines[0].startswith("name,pixels,predicted,images,iou,dice,precision,recall,boundary_f1")
    confusion = np.array(result["confusion"])
    boundaries = np.array([record["boundary"] for record in result["records"]], float)
    for id, (line, row) in enumerate(zip(lines[1:], result["per_class"], strict=True)):
        name, pixels, _, _, iou, *_ = line.split(",")
        assert name == row["name"] and int(pixels) == row["pixels"]
        assert iou == "" if row["iou"] is None else float(iou) == row["iou"]
        correct, truth, pred = confusion[id, id], confusion[id].sum(), confusion[:, id].sum()
        for key, value in (("precision", correct / max(pred, 1)), ("recall", correct / max(truth, 1))):
            assert row[key] is None or row[key] == pytest.approx(value)
        known = boundaries[~np.isnan(boundaries[:, id]), id]
        assert row["boundary_f1"] is None or row["boundary_f1"] == pytest.approx(known.mean())
    for name in ("per_class_iou.png", "confusion_matrix.png"):
        assert np.array(Image.open(out / "evaluation" / name)).std() > 1
    assert not (out / "evaluation/report.html").exists()


@pytest.mark.parametrize(("flags", "views"), [
    ("--tta ms,flip --imgsz 28 42", "whole image at 28x42, scales 0.5 0.75 1 1.25 1.5 1.75, flip"),
    ("--protocol slide --tta flip", "window 42x56, stride 28x37, flip"),
    ("--protocol tile --overlap 14 --imgsz 28 28", "tiles of 28x28 pixels, stride 14x14"),
], ids=str)
def test_scores_are_of_the_masks_that_infer_image_writes(trained, tmp_path, run, flags, views):
    """Of images of a folder that nothing was trained on."""
    folder = write_folder(tmp_path / "data", count=3)
    flags = ["--model", trained[1] / "best_model_iou.pth", *flags.split()]
    text, result = score(tmp_path, *flags, "--data-root", folder, "--batch-size", 2)
    assert result["protocol"]["views"] == views and views in text and len(result["records"]) == 3
    flags += ["--input", folder / "images", "--backend", "torch", "--out-dir", tmp_path]
    assert run(infer_image, *flags)[0] == 0
    for record in result["records"]:
        stem, counts = Path(record["name"]).stem, np.zeros((3, 3), np.int64)
        truth = np.array(Image.open(folder / f"masks/{stem}.png"))
        pred = np.array(Image.open(tmp_path / f"inference_results_image/{stem}_mask.png"))
        np.add.at(counts, (truth, pred), 1)
        for true_id, predicted_id, pixels in record["cells"]:
            counts[true_id, predicted_id] -= pixels
        assert np.abs(counts).sum() <= 2  # ties of rounding


def test_the_protocol_holds_all_that_a_score_depends_on(trained, scored):
    text, result, _ = scored
    protocol, weights = result["protocol"], (trained[1] / "best_model_iou.pth").read_bytes()
    expected = dict(dataset="folder", split="val", images=2, classes=3, ignore=255, imgsz=[42, 56],
                    slide=False, stride=[], scales=[1], flip=False, precision="float32",
                    weights_sha256=hashlib.sha256(weights).hexdigest()[:16])
    assert {key: protocol[key] for key in expected} == expected
    line = next(line for line in text.splitlines() if line.startswith("protocol: "))
    for fact in ("folder val", protocol["views"], protocol["data_fingerprint"][:8],
                 protocol["split_fingerprint"][:8], protocol["weights_sha256"]):
        assert fact in line


def test_the_boundary_score_is_a_mean_over_classes_each_of_which_counts_once():
    """However many images a class is in."""
    boundaries = [[1.0, math.nan], [0.5, math.nan], [0.0, 0.9]]
    records = [dict(name=f"{number}.png", cells=[[0, 0, 5]], boundary=boundary)
               for number, boundary in enumerate(boundaries)]
    total = ConfusionMatrix(2)
    total.counts[0, 0] = 15
    classes = [("background", (0, 0, 0)), ("cat", (255, 0, 0))]
    scores = evaluate.summarize(total, records, classes, [record["name"] for record in records])
    assert [row["boundary_f1"] for row in scores["per_class"]] == pytest.approx([0.5, 0.9])
    assert scores["boundary_f1"] == pytest.approx(0.7)


def test_the_worst_images_are_those_of_the_lowest_miou_and_unlabeled_ones_the_last():
    cells = [[[0, 0, 9], [1, 0, 1]], [], [[0, 0, 5], [1, 0, 5]], [[0, 0, 9]]]
    records = [dict(name=f"{number}.png", cells=entries) for number, entries in enumerate(cells)]
    assert [index for _, index in evaluate.worst_images(records, 2)] == [2, 0, 3, 1]


def test_absent_classes_are_named_and_left_out(trained, tmp_path):
    data = tmp_path / "data"
    for split, classes in (("train", (0, 1, 2)), ("val", (0, 1))):
        for number in range(2):
            mask = blocks(45, 61, classes, seed=number)
            write_pair(data / f"{split}/images/{number}.png", data / f"{split}/masks/{number}.png", mask)
    (data / "classes.txt").write_text("background\nclass 1\nclass 2\n")
    text, result = score(tmp_path, "--model", trained[1] / "best_model_iou.pth", "--data-root", data)
    row = result["per_class"][2]
    assert result["protocol"]["split"] == "val" and row["pixels"] == 0 and row["recall"] is None
    if row["predicted"] == 0:
        assert row["iou"] is None and result["absent"] == ["class 2"] and "absent" in text


def test_the_interval_over_groups_is_that_of_their_sums(trained, tmp_path, run):
    """Images 0..7 in two groups: the bootstrap draws the two sums."""
    _, result = score(tmp_path, "--model", trained[1] / "best_model_iou.pth", "--split", "train",
                      "--group-by", r"[0-3](\.)|[4-9]\.")
    assert len(result["records"]) == 8 and result["units"] == 2
    counts = counts_per_image(result["records"], len(result["per_class"]))
    assert miou_from_counts(counts.sum(0)) == pytest.approx(result["miou"])
    high_numbers = [int(re.search(r"(\d)\D*$", record["name"])[1]) > 3 for record in result["records"]]
    sums = np.stack([counts[np.array(high_numbers) == side].sum(0) for side in (False, True)])
    mious = miou_from_counts(np.stack([2 * sums[0], sums.sum(0), 2 * sums[1]]))
    assert result["miou_interval"] == [pytest.approx(mious.min()), pytest.approx(mious.max())]


# --- bad input --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "named"), [
    ("--model nowhere.pth", "nowhere.pth"),
    ("--dataset camvid --data-root x", "CamVid"),
    ("--dataset aeroscapes --data-root TREE", "--dataset aeroscapes"),
    ("--dataset folder --data-root nowhere", "nowhere"),
    ("--dataset folder --data-root TREE/ImageSets/trn.txt", "trn.txt"),
    ("--split test", "--split test"),
    ("--imgsz 0 5", "--imgsz"),
    ("--protocol window", "--protocol"),
    ("--protocol tile --tta ms", "--tta ms"),
    ("--group-by (", "--group-by ("),
    ("--group-by zebra", "--group-by zebra"),
    ("--tile-scale 2", "--tile-scale"),
], ids=str)
def test_bad_input_is_one_line(trained, tmp_path, run, flags, named):
    write_tree("aeroscapes", tmp_path / "tree")
    flags = flags.replace("TREE", str(tmp_path / "tree")).split()
    if "--model" not in flags:
        flags += ["--model", trained[1] / "best_model_iou.pth"]
    code, _, err = run(evaluate, *flags, "--out-dir", tmp_path / "out")
    *_, last = err.splitlines()  # argparse prints the usage before it
    assert code == 2 and named in last and (err.count("\n") == 1 or err.startswith("usage"))


# --- which data are scored --------------------------------------------------------------------------------
def opened(root, checkpoint, tmp_path, split=None):
    """Return (split, its number of images, class names) that evaluate.py takes of a folder."""
    args = SimpleNamespace(dataset="folder", data_root=str(root), out_dir=str(tmp_path), split=split)
    data, split = evaluate.open_data(args, checkpoint)
    return split, len(evaluate.split_samples(data, split)), [name for name, _ in data.classes]


def checkpoint_of(root, names, **settings):
    """Return what a checkpoint holds of its training on a folder."""
    data = load("folder", root, **settings)
    return dict(data.fingerprints(), classes=[(name, (0, 0, 0)) for name in names],
                config=dict(settings, dataset="folder", data_root=str(root)))


NAMES = ["background", "class 1", "class 2"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [({}, NAMES), (dict(classes=("a", "b", "c")), ["a", "b", "c"]), (dict(ignore_background=True), NAMES[1:]),
     (dict(fold=(1, 2)), NAMES)],
    ids=str,
)
def test_a_folder_is_split_as_in_training_another_is_scored_entirely(other_folder, tmp_path, settings, names,
                                                                     capsys):
    checkpoint = checkpoint_of(other_folder, names, **settings)
    val = len(load("folder", other_folder, **settings).splits["val"])
    assert opened(other_folder, checkpoint, tmp_path) == ("val", val, names)
    shutil.copytree(other_folder, tmp_path / "moved")  # the same files: what was trained on is not scored
    assert opened(tmp_path / "moved", checkpoint, tmp_path) == ("val", val, names)
    assert "warning" not in capsys.readouterr().out
    other = write_folder(tmp_path / "new", count=4)
    assert opened(other, checkpoint, tmp_path) == ("all", 4, names)
    shutil.copy(other_folder / "images/00.png", tmp_path / "moved/images/new.png")
    shutil.copy(other_folder / "masks/00.png", tmp_path / "moved/masks/new.png")
    moved = dict(checkpoint, config=dict(checkpoint["config"], data_root=str(tmp_path / "moved")))
    assert opened(tmp_path / "moved", moved, tmp_path)[0] == "val"
    assert "warning" in capsys.readouterr().out


def test_images_that_were_trained_on_are_counted_whatever_they_are_called(trained, tmp_path, run):
    data, out = trained
    checkpoint = load_model(out / "best_model_iou.pth")[1]
    samples = load("folder", data).splits
    assert not paths_in(checkpoint["trained_on"], [sample.image for sample in samples["val"]])
    other = write_folder(tmp_path / "other", count=3, size=(40, 50))
    for split, name in (("train", "a"), ("val", "b")):
        shutil.copy(samples[split][0].image, other / f"images/{name}.png")
        shutil.copy(samples[split][0].mask, other / f"masks/{name}.png")
    flags = ("--model", out / "best_model_iou.pth", "--out-dir", tmp_path)
    code, text, err = run(evaluate, *flags, "--data-root", other)
    assert code == 0 and text.count("warning: 1 of 5 images") == 1 and "images/a.png" in text, err
    for split in ("val", "train"):
        code, text, err = run(evaluate, *flags, "--split", split)
        assert code == 0 and "warning" not in text, err


def test_what_the_head_was_trained_on_before_counts_too_also_when_resumed(tmp_path, run):
    data, first, second = write_folder(tmp_path / "data", count=6), tmp_path / "first", tmp_path / "second"
    flags = ("--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--weights", "none",
             "--imgsz", 28, 28, "--batch-size", 4, "--workers", 0, "--epochs", 1)
    code, text, err = run(train, *flags, "--fold", "1/3", "--out-dir", first)
    assert code == 0 and "trained on" not in text, err
    head = "--head-weights", first / "last.pth"
    code, text, err = run(train, *flags, "--fold", "2/3", *head, "--out-dir", second)
    assert code == 0 and "warning: 2 of 2 images" in text, err
    shutil.rmtree(first)
    for epochs in (1, 2):
        code, text, err = run(evaluate, "--model", second / "last.pth", "--out-dir", second)
        assert code == 0 and "warning: 2 of 2 images" in text, err
        if epochs == 1:
            assert run(train, "--resume", "--epochs", 2, "--out-dir", second)[0] == 0


def test_files_that_change_while_they_are_scored_give_no_scores(trained, tmp_path, run, monkeypatch):
    data, score = shutil.copytree(trained[0], tmp_path / "data"), evaluate.score

    def score_and_change(*args):
        shutil.copy(data / "masks/01.png", data / "masks/00.png")
        return score(*args)

    monkeypatch.setattr(evaluate, "score", score_and_change)
    flags = ("--model", trained[1] / "last.pth", "--data-root", data, "--out-dir", tmp_path)
    code, _, err = run(evaluate, *flags)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "evaluation/metrics.json").exists()


@pytest.mark.parametrize("tool", ["YOLO, classes.txt", "SuperAnnotate", "labelme"])
def test_a_class_list_beside_annotation_files_is_not_in_the_way_of_classes(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, names = tmp_path / "data", ["background", "tree", "car"]
    TOOLS[tool](root)
    if tool == "labelme":
        (root / "classes.txt").write_text("car\nship\n")
    checkpoint = checkpoint_of(root, names, classes=tuple(names))
    training = opened(root, checkpoint, tmp_path)
    assert training[2] == names and opened(root, checkpoint, tmp_path, "all")[1] == 6
    assert any("ship" in note and "classes.txt" in note for note in load("folder", root).notes) == \
        (tool == "labelme")
    root.rename(tmp_path / "moved")
    assert opened(tmp_path / "moved", checkpoint, tmp_path) == training


def test_the_class_list_of_masks_counts_where_it_came_after_classes(other_folder, tmp_path):
    checkpoint = checkpoint_of(other_folder, ["a", "b", "c"], classes=("a", "b", "c"))
    shutil.copytree(other_folder, tmp_path / "new")
    (tmp_path / "new/classes.txt").write_text("a\nb\nc\n")
    assert opened(tmp_path / "new", checkpoint, tmp_path)[2] == ["a", "b", "c"]
    (tmp_path / "new/classes.txt").write_text("a\nc\nb\n")
    with refused("b against c"):
        opened(tmp_path / "new", checkpoint, tmp_path)


def test_splits_are_those_of_the_training(tmp_path):
    root = tmp_path / "data"
    for number in range(10):
        folder = root / ("test" if number > 7 else "train")
        mask = blocks(45, 61, (0, 1, 2), seed=number)
        write_pair(folder / f"images/{number}.png", folder / f"masks/{number}.png", mask)
    checkpoint = checkpoint_of(root, NAMES, resplit=True, val_fraction=0.5)
    for split, count in ((None, 4), ("train", 4), ("test", 2), ("all", 10)):
        assert opened(root, checkpoint, tmp_path, split) == (split or "val", count, NAMES)


# --- official heads ---------------------------------------------------------------------------------------
@pytest.fixture
def official(hub_cache):
    """Head files as published, in torch.hub's cache, for the small stand-in backbone of hub_cache."""
    torch.manual_seed(1)
    for dataset, classes in (("voc2012", 21), ("ade20k", 150)):
        for kind, maps in (("linear", 1), ("ms", 4)):
            width = 48 * maps
            net = nn.ModuleDict(dict(bn=nn.BatchNorm2d(width), conv_seg=nn.Conv2d(width, classes, 1)))
            for value in net.state_dict().values():
                if value.is_floating_point():
                    value.uniform_(0.5, 1.5)
            state = {f"decode_head.{key}": value for key, value in net.state_dict().items()}
            name = f"dinov2_vits14_{dataset}_{kind}_head.pth"
            file = {"meta": {"epoch": 1, "CLASSES": ("a", "b")}, "state_dict": state}
            torch.save(file, hub_cache / "hub/checkpoints" / name)
    return hub_cache


@pytest.mark.parametrize(("dataset", "kind", "maps"), [("voc2012", "linear", 1), ("ade20k", "ms", 4)])
def test_official_heads_equal_batchnorm_1x1_convolution_and_resize(official, dataset, kind, maps):
    name = f"dinov2_vits14_{dataset}_{kind}"
    model, checkpoint = load_official(name)
    images = random_images(2, 3, 50, 64)
    state = torch.load(official / f"hub/checkpoints/{name}_head.pth")["state_dict"]
    state = {key.removeprefix("decode_head."): value for key, value in state.items()}
    with torch.no_grad():
        pixels = F.pad((images - model.mean) / model.std, (3, 3, 3, 3))  # 50 -> 56, 64 -> 70
        maps = model.backbone.net.get_intermediate_layers(pixels, n=maps, reshape=True, norm=True)
        features = F.batch_norm(torch.cat(maps, 1), state["bn.running_mean"], state["bn.running_var"],
                                state["bn.weight"], state["bn.bias"])
        logits = F.conv2d(features, state["conv_seg.weight"], state["conv_seg.bias"])
        expected = F.interpolate(logits, size=(50, 64), mode="bilinear", align_corners=False)
        assert torch.allclose(model(images), expected, atol=1e-3)
    classes = VOC if dataset == "voc2012" else ADE20K
    assert checkpoint["classes"] == [[class_name, list(color)] for class_name, color in classes]


def test_official_heads_are_scored_by_their_own_protocol_unless_told_otherwise(official, tmp_path, run):
    write_tree("voc", tmp_path / "voc", counts=(1, 1))
    flags = ["--dataset", "voc", "--data-root", tmp_path / "voc", "--model"]
    _, result = score(tmp_path, *flags, "dinov2_vits14_voc2012_linear")
    assert result["protocol"]["views"] == "window 512x512, stride 341x341"
    _, other = score(tmp_path, *flags, "dinov2_vits14_voc2012_linear", "--imgsz", 98, 98, "--protocol",
                     "whole")
    assert other["protocol"]["views"] == "whole image at 98x98"
    assert result["protocol"]["weights_sha256"] == other["protocol"]["weights_sha256"]
    for flags, views in (
        ({}, "window 640x640, stride 320x320, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(tta="flip"), "window 640x640, stride 320x320, flip"),
        (dict(imgsz=(518, 518)), "window 518x518, stride 345x345, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(kind="slide"), "window 640x640, stride 320x320, scales 1 1.32 1.73 2.28 3, flip"),
        (dict(kind="whole"), "whole image at 640x640, scales 1 1.32 1.73 2.28 3, flip"),
    ):
        assert str(choose_protocol(load_model("dinov2_vits14_voc2012_ms")[1], **flags)) == views
    code, _, err = run(evaluate, "--model", "dinov2_vits14_voc2012_linear", "--out-dir", tmp_path)
    assert code == 2 and "--dataset" in err and err.count("\n") == 1


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
    folder = official / "hub/checkpoints"
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_ade20k_ms_head.pth"
    assert code == 2 and url in err and str(folder) in err and err.count("\n") == 1


# --- memory -----------------------------------------------------------------------------------------------
LARGE = """
import sys, torch
import utils
from inference.predictor import Predictor, Protocol
from models.upsampling import geometry_of
class Net(torch.nn.Module):
    num_classes = 150
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 150, 1)
    def forward(self, images):
        return self.conv(images.float())
    def logits(self, images):
        return self(images), geometry_of(images.shape[-2:])
torch.manual_seed(0)
net = Net().eval()
side = int(sys.argv[2])
image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
slide = sys.argv[1] == "slide"
protocol = Protocol((384, 384), slide, (256, 256), (1.0, 1.5) if slide else (1.0,))
predictor = Predictor(net, dict(classes=[]), "cpu", protocol)
predictor.precision = utils.Precision("off", predictor.device)
pred = predictor(image)
assert pred.shape == (1, side, side)
print(next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if "VmHWM" in line))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as on Linux")
@pytest.mark.parametrize(
    ("kind", "side", "most"),
    [("whole", 4096, 3.0), ("slide", 2048, 2.5)],
)
@pytest.mark.long
def test_large_images_with_150_classes_stay_within_memory(kind, side, most):
    """Logits alone take 2.5 GB at 2048x2048 pixels, 10 at 4096x4096; two views twice."""
    command = [sys.executable, "-c", LARGE, kind, str(side)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most
