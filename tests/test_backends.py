"""Exported models and other runtimes: the same logits, masks and scores as PyTorch; clear refusals."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, random_images, tiny, write_folder
from PIL import Image

import evaluate
import export
import infer_image
import infer_video
from inference import backends, predictor
import train
from config import InputError
from checkpoint import load_model, pack_checkpoint
from inference.backends import convert
from models.heads import HEADS
from test_video import write_clip

SIZE = (30, 43)  # no multiple of the patches
CONVERTED = [("openvino", "deconv")]  # by every run
KINDS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/, a model that was trained on it, and its exported forms, for which torch's ONNX
    exporter takes most of the seconds.
    """
    place = tmp_path_factory.mktemp("exported")
    write_folder(place / "data", count=10)
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        place / "data",
        "--backbone",
        "vit_tiny",
        "--unfreeze",
        "all",
    ]
    flags += ["--imgsz", *SIZE, "--epochs", 3, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    flags += ["--out-dir", place]
    call(train, *flags)
    for kind, batch in (("onnx", 0), ("openvino", 1), ("torchscript", 2)):
        model = ["--model", place / "best_model_iou.pth"]
        call(export, *model, "--format", kind, "--batch-size", batch)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_exported_logits_are_those_of_pytorch(trained, kind):
    images = random_images(3, 3, *SIZE)
    model, _ = load_model(trained / "best_model_iou.pth")
    other, facts = load_model(trained / f"best_model_iou{KINDS[kind]}", precise=True)
    with torch.no_grad():
        want, got = model(images), other(images)
    assert got.shape == want.shape and torch.allclose(got, want, atol=2e-3 * want.abs().max())
    assert facts["imgsz"] == list(SIZE) and len(facts["classes"]) == other.num_classes == 3
    assert facts["batch"] == {"onnx": 0, "openvino": 1, "torchscript": 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_scores_are_those_of_pytorch(trained, tmp_path, run, kind):
    masks, scores = [], []
    for name in ("best_model_iou.pth", f"best_model_iou{KINDS[kind]}"):
        out = tmp_path / name
        flags = ["--model", trained / name, "--out-dir", out]
        images = ["--input", trained / "data/images"]
        code, text, err = run(infer_image, *flags, *images, "--backend", "auto")
        assert code == 0, err
        paths = sorted((out / "inference_results_image").glob("*_mask.png"))
        masks.append(np.stack([np.array(Image.open(path)) for path in paths]))
        assert run(evaluate, *flags)[0] == 0
        scores.append(json.loads((out / "evaluation/metrics.json").read_text()))
    assert len(masks[0]) == 10 and (masks[0] == masks[1]).mean() > 0.99  # PyTorch's are in bfloat16 here
    assert scores[0]["miou"] == pytest.approx(scores[1]["miou"], abs=0.02)
    names = [score["protocol"]["weights_sha256"] for score in scores]
    assert names[0] != names[1] and scores[0]["protocol"]["precision"] != scores[1]["protocol"]["precision"]


@pytest.mark.parametrize(("name", "head"), [
    pytest.param(name, head, marks=[] if (name, head) in CONVERTED else pytest.mark.long)
    for name in ("openvino", "onnxruntime") for head in HEADS])
def test_a_model_converted_in_memory_gives_the_same_logits(name, head):
    net = tiny(head=head).eval().requires_grad_(False)
    other = convert(net, SIZE, name)
    images = random_images(2, 3, *SIZE)
    with torch.no_grad():
        want, got, one = net(images), other(images), other(images[1:])
    for seen, wanted in ((got, want), (one, want[1:])):  # two side by side, one alone
        assert torch.allclose(seen, wanted, atol=0.03 * want.abs().max())  # OpenVINO may use bfloat16
    with pytest.raises(InputError, match="exported for 30x43 pixels and is asked for 28x42"):
        other.logits(random_images(1, 3, 28, 42))


@pytest.mark.parametrize("faster", ["torch", "openvino"])
def test_the_backend_is_chosen_by_trying_and_named(trained, monkeypatch, faster):
    tried = []

    def seconds(function, model, images):
        tried.append(type(model).__name__)
        return float((type(model).__name__ == "ExportedModel") == (faster == "torch"))

    def converted(model, size, name):
        other = backends.ExportedModel(size)
        other.name = "OpenVINO"
        return other

    monkeypatch.setattr(predictor, "shortest_time", seconds)
    monkeypatch.setattr(predictor, "convert", converted)
    path = trained / "best_model_iou.pth"
    long = predictor.Predictor(*load_model(path), "cpu", backend="auto", expected=None)
    assert tried == ["Segmenter", "ExportedModel"] and ("OpenVINO" in str(long)) == (faster == "openvino")
    short = predictor.Predictor(*load_model(path), "cpu", backend="auto", expected=3)
    assert len(tried) == 2 and "torch" in str(short)  # not worth the seconds it takes to start


@pytest.mark.long
def test_a_clip_runs_in_openvino_from_a_checkpoint(trained, tmp_path, run):
    path = trained / "best_model_iou.pth"
    clip = write_clip(tmp_path / "clip.mp4", 12)
    flags = ["--model", path, "--input", clip, "--out-dir", tmp_path, "--backend", "openvino"]
    code, text, err = run(infer_video, *flags, "--batch-size", 5)
    assert code == 0 and "12 frames" in text and "OpenVINO" in text, err


def test_backends_that_cannot_be(trained, tmp_path, run, monkeypatch):
    flags = ["--input", trained / "data/images", "--out-dir", tmp_path]
    exported = [*flags, "--model", trained / "best_model_iou.onnx"]
    for more, message in (
        (["--backend", "openvino"], "leave it out"),
        (["--imgsz", 28, 42], "was exported for 30x43 pixels"),
        (["--tta", "ms"], "was exported for 30x43 pixels"),
    ):
        code, _, err = run(infer_image, *exported, *more)
        assert code == 2 and message in err and err.count("\n") == 1, err
    code, _, err = run(export, "--model", trained / "best_model_iou.onnx", "--out", tmp_path / "again.onnx")
    assert code == 2 and "is exported already" in err and err.count("\n") == 1, err
    code, _, err = run(infer_image, *flags, "--model", trained / "best_model_iou.pth", "--tta", "ms",
                       "--backend", "openvino")
    assert code == 2 and "at one size" in err and err.count("\n") == 1
    for package, name, file in (("openvino", "OpenVINO", "xml"), ("onnxruntime", "ONNX Runtime", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        code, _, err = run(infer_image, *flags, "--model", trained / f"best_model_iou.{file}")
        assert code == 2 and f"{name} is not installed: pip install {package}" in err


def test_flip_and_windows_work_with_an_exported_file(trained, tmp_path, run):
    for more in (["--tta", "flip"], ["--protocol", "slide"]):
        flags = ["--model", trained / "best_model_iou.onnx", "--out-dir", tmp_path]
        code, text, err = run(infer_image, *flags, "--input", trained / "data/images/00.png", *more)
        assert code == 0 and "ONNX Runtime" in text, err


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "missing", "foreign", "no bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_one_line(trained, tmp_path, run, damage, kind):
    path = tmp_path / f"broken{KINDS[kind]}"
    source = trained / f"best_model_iou{KINDS[kind]}"
    whole = source.read_bytes()
    if kind == "openvino" and damage != "no bin":
        shutil.copy(source.with_suffix(".bin"), path.with_suffix(".bin"))
    if damage == "foreign":
        whole = whole.replace(b"dinoseg", b"another")
    elif damage == "no bin" and kind != "openvino":
        pytest.skip("only OpenVINO has two files")
    if damage != "missing":
        content = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no model at all"}
        path.write_bytes(content.get(damage, whole))
    code, _, err = run(infer_image, "--model", path, "--input", trained / "data/images/00.png")
    assert code == 2 and err.startswith("error: ") and "broken" in err and err.count("\n") == 1, err


# --- export.py --------------------------------------------------------------------------------------------
def test_an_export_that_disagrees_is_not_written(tmp_path, run, monkeypatch):
    classes = [("a", (0, 0, 0)), ("b", (9, 9, 9)), ("c", (1, 2, 3))]
    torch.save(pack_checkpoint(tiny(), classes, SIZE), tmp_path / "m.pth")
    monkeypatch.setattr(export, "agreement", lambda *_: 0.9985)
    flags = ["--model", tmp_path / "m.pth", "--format", "torchscript"]
    code, _, err = run(export, *flags)
    assert code == 2 and "99.850 % on" in err and [path.name for path in tmp_path.iterdir()] == ["m.pth"]
    monkeypatch.undo()
    for more, message in (
        (["--out", tmp_path / "m.onnx"], "ends in .torchscript"),
        (["--batch-size", 0], "one batch size"),
        (["--model", tmp_path / "gone.pth"], "gone.pth does not exist"),
    ):
        code, _, err = run(export, *flags, *more)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_the_agreement_sees_a_wrong_model(trained):
    model, _ = load_model(trained / "best_model_iou.pth")
    images = random_images(2, 3, *SIZE)
    assert export.agreement(model, trained / "best_model_iou.torchscript", images) > 0.999
    model.head.conv_seg.bias[0] += 100
    assert export.agreement(model, trained / "best_model_iou.torchscript", images) < 0.999


@pytest.mark.parametrize(
    "change",
    [
        {"imgsz": "224"},
        {"imgsz": [224]},
        {"batch": "1"},
        {"batch": -1},
        {"classes": "abc"},
        {"classes": [["a", [0, 0, 300]]]},
        {"protocol": {"foo": 1}},
        {"format": "other"},
    ],
    ids=str,
)
def test_metadata_that_export_did_not_write(change, tmp_path):
    good = {"format": "dinoseg", "imgsz": [28, 42], "batch": 1, "classes": [["a", [0, 0, 0]]]}
    assert backends.check_facts(json.dumps(good), "m.onnx") == good
    for text in (json.dumps(good | change), "[" * 100_000, None):
        with pytest.raises(InputError, match="m.onnx "):
            backends.check_facts(text, "m.onnx")


def test_checking_an_export_downloads_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in ("streets", "voc", "pet", "camvid"):
        facts = {"config": {"dataset": dataset, "data_root": str(tmp_path)}}
        images, origin = export.real_images(facts, (28, 42))
        assert images.shape == (4, 3, 28, 42) and origin == "images of drawn streets"
    assert not list(tmp_path.iterdir())


def test_a_padded_batch_is_cut_back(monkeypatch):
    class Mean(backends.ExportedModel):
        def run(self, images):
            assert images.shape == (4, 3, 6, 8)
            return images.astype(np.float32).mean(1, keepdims=True)

    images = random_images(6, 3, 6, 8)
    assert torch.allclose(Mean((6, 8), batch=4)(images), images.float().mean(1, keepdim=True))


# --- hubconf.py -------------------------------------------------------------------------------------------
HUB = """
import os, sys, types
import numpy as np, torch
names = ("datasets", "utils", "config", "evaluate", "models", "models.heads", "engine", "model")
theirs = {name: types.ModuleType(name) for name in names}
sys.modules.update(theirs)
before, path = dict(sys.modules), list(sys.path)
segmenter = torch.hub.load(sys.argv[1], "segmenter", sys.argv[2], source="local")
exported = torch.hub.load(sys.argv[1], "segmenter", sys.argv[4], source="local", protocol="whole")
assert all(sys.modules[name] is module for name, module in before.items()) and sys.path == path
ours = [name for name, module in sys.modules.items() if name not in before
        and (getattr(module, "__file__", None) or "").startswith(sys.argv[1] + os.sep)
        and ".venv" not in module.__file__]
assert ours in ([], ["hubconf"]), ours
one = segmenter.predict(sys.argv[3])
two = segmenter.predict(np.zeros((20, 31, 3), np.uint8))
assert (exported.predict(sys.argv[3]) == one).mean() > 0.9
assert one.shape == (45, 61) and two.shape == (20, 31) and one.dtype == np.uint8, (one.shape, two.shape)
assert [name for name, _ in segmenter.classes] == ["background", "class 1", "class 2"]
try:
    segmenter.predict(np.zeros((20, 31), np.uint8))
except Exception as error:
    print("refused:", type(error).__name__, error)
"""


def test_three_lines_in_another_program_that_has_modules_of_the_same_names(trained, tmp_path):
    """In a process of its own, which imports torch and ONNX Runtime anew."""
    files = [ROOT, trained / "best_model_iou.pth", trained / "data/images/00.png",
             trained / "best_model_iou.onnx"]
    done = subprocess.run([sys.executable, "-c", HUB, *map(str, files)], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "refused: InputError an image is an array (H, W, 3)" in done.stdout
