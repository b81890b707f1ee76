"""Every recipe runs for one step at its real image size, on a tiny tree of its data set."""

import dataclasses
import json

import pytest
import torch
from conftest import write_folder, write_tree
from torchvision.models import resnet101

import config
import infer_image
from dataio import streets
import train
from config import BUDGETS, RECIPES, resolve
from dataio.dataloader import SegmentationDataset
from datasets import DATASETS

FILES = {"loss.png", "miou.png", "config.json", "best_model_iou.pth", "last.pth", "valid_preds"}


@pytest.fixture
def data_root(tmp_path):
    """Return write(data set) -> a root with two training images and one validation image of it."""

    def write(name):
        root = tmp_path / "data"
        if name == "folder":
            write_folder(root, count=3, size=(45, 61), values=(0, 1))
        elif name != "streets":
            write_tree(name, root, counts=(2, 1))
        return root

    return write


def few_streets(monkeypatch):
    """Let the drawn data set hold a few scenes."""
    draw = streets.write_streets

    def write(base, classes, train, val, size, seed):
        return draw(base, classes, train=2, val=1, size=(64, 80), seed=seed)

    monkeypatch.setattr(streets, "write_streets", write)
    monkeypatch.setattr(streets, "is_current", lambda *args, **kwargs: False)
    monkeypatch.setattr(streets, "write_examples", lambda root: (root / "picture.png", root / "clip.mp4"))


LARGE = {"drone-deeplab", "voc-unet", "aeroscapes-deconv"}  # the others are quick at their own size
QUICK = {"person-bn", "voc-ms", "pet-segformer"}  # one of each kind
CASES = [pytest.param(name, (70, 98) if name in LARGE else (),
                      marks=() if name in QUICK else pytest.mark.long)
         for name in RECIPES if name != "drone-deeplab"]
CASES += [pytest.param(name, (), marks=pytest.mark.long) for name in sorted(LARGE)]


@pytest.mark.plots
@pytest.mark.parametrize(("name", "imgsz"), CASES)
def test_a_recipe_runs_from_its_name_alone(name, imgsz, data_root, tmp_path, hub_cache, run, monkeypatch):
    few_streets(monkeypatch)
    weights_file = hub_cache / "hub/checkpoints/resnet101-63fe2227.pth"
    dataset = resolve({"recipe": name}).dataset
    flags = ["--recipe", name, "--data-root", data_root(dataset), "--out-dir", tmp_path / "out"]
    flags += ["--epochs", 1, "--workers", 0, "--batch-size", 2, "--accumulate", 2]
    flags += ["--imgsz", *imgsz] if imgsz else []
    if name == "drone-deeplab":
        torch.save(resnet101().state_dict(), weights_file)
    elif RECIPES[name][1].get("backbone") == "dinov2_vitb14":
        flags += ["--weights", "none"]
    code, text, err = run(train, *flags)
    assert code == 0, err
    settings = json.loads((tmp_path / "out/config.json").read_text())
    resolved = dict(RECIPES[name][1], epochs=1, workers=0, batch_size=2, accumulate=2)
    resolved |= dict(steps=0)  # --epochs alone means passes over the images
    resolved |= dict(imgsz=imgsz) if imgsz else {}
    for key, value in resolved.items():
        assert settings[key] == (list(value) if isinstance(value, tuple) else value) or key == "weights"
        assert f"{key}=" in text  # the settings are printed as resolved
    classes = DATASETS[dataset][1] or [("background",), ("person",)]
    assert settings["class_names"] == [entry[0] for entry in classes]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    (row,) = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    assert {f"train_loss_{term}" for term in settings["loss"].split("+")} <= row.keys()
    picture = next(path for path in (tmp_path / "data").rglob("*") if path.suffix in (".jpg", ".png"))
    code, _, err = run(
        infer_image,
        "--input",
        picture,
        "--model",
        tmp_path / "out/best_model_iou.pth",
        "--out-dir",
        tmp_path / "out",
    )
    assert code == 0, err


@pytest.mark.plots
def test_cache_features_alone_spends_a_budget_and_a_flag_beats_it(data_root, tmp_path, hub_cache, run,
                                                                  monkeypatch):
    small = dataclasses.replace(BUDGETS[5], passes=30)
    monkeypatch.setitem(BUDGETS, 5, small)
    monkeypatch.setattr(config, "PASS_PIXELS", 70 * 98)
    flags = ["--dataset", "folder", "--data-root", data_root("folder"), "--classes", "background", "person"]
    flags += ["--weights", "none", "--workers", 0]
    flags += ["--cache-features", tmp_path / "cache"]
    code, text, err = run(train, *flags, "--out-dir", tmp_path / "out")
    assert code == 0, err
    settings = json.loads((tmp_path / "out/config.json").read_text())
    spent = small.spend(2, 1, resolve({"budget": 5, "cache_features": "cache"}))
    assert {name: settings[name] for name in spent} == spent and f"{spent['steps']} steps" in text
    code, _, err = run(train, *flags, "--out-dir", tmp_path / "out", "--resume")
    assert code == 0, err
    code, _, err = run(train, *flags, "--out-dir", tmp_path / "two", "--cache-views", 2, "--imgsz", 42, 28)
    assert code == 0, err
    settings = json.loads((tmp_path / "two/config.json").read_text())
    assert (settings["cache_views"], settings["imgsz"]) == (2, [42, 28])


@pytest.mark.plots
def test_a_run_may_train_at_another_size_than_it_validates_at(data_root, tmp_path, hub_cache, run):
    flags = ["--dataset", "folder", "--data-root", data_root("folder"), "--classes", "background", "person"]
    flags += ["--weights", "none", "--workers", 0, "--epochs", 1, "--out-dir", tmp_path / "out"]
    seen = []

    class Seen(SegmentationDataset):
        def __getitem__(self, item):
            image, targets, name = super().__getitem__(item)
            seen.append((self.augments is not None, tuple(image.shape[1:]), tuple(targets["mask"].shape)))
            return image, targets, name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SegmentationDataset", Seen)
        code, _, err = run(train, *flags, "--imgsz", 56, 70, "--train-imgsz", 28, 42, "--copy-paste", 1)
    assert code == 0, err
    assert {(image, mask) for training, image, mask in seen if training} == {((28, 42), (28, 42))}
    assert {image for training, image, _ in seen if not training} == {(56, 70)}
    assert tuple(torch.load(tmp_path / "out/last.pth", weights_only=True)["imgsz"]) == (56, 70)
