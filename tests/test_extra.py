"""--extra: images of another folder train beside those of a data set, and never those it validates on."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, refused, write_folder, write_tree
from PIL import Image

import evaluate
import train
from dataio.contents import paths_in
from dataio.readers import read_sample
from datasets import with_extra
from losses import class_weights


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def masks_of(samples, table):
    """Return {name of the image: mask (H, W)}."""
    return {sample.image.name: read_sample(sample, table)[1]["mask"].numpy() for sample in samples}


@pytest.fixture
def pseudo(tmp_path):
    """A folder of masks with the ids of 150 classes at most, some pixels ignored."""
    root = write_folder(tmp_path / "pseudo", count=4, values=(0, 1, 2, 255))
    for path in [*(root / "images").iterdir(), *(root / "masks").iterdir()]:
        path.rename(path.with_stem(f"more {path.stem}"))
    return root


@pytest.mark.parametrize("name", ["voc", "cityscapes", "pet", "ade20k"])
def test_masks_come_out_as_the_data_set_reads_its_own(name, tmp_path, pseudo):
    write_tree(name, tmp_path / "data")
    source = load(name, tmp_path / "data")
    (pseudo / "classes.txt").write_text("\n".join(name for name, _ in source.classes))
    both = with_extra(source, pseudo)
    assert both.splits == source.splits and len(both.training) == len(source.splits["train"]) + 4
    for path, mask in masks_of(both.extra, both.table).items():
        assert (mask == np.array(Image.open(pseudo / "masks" / path))).all()
    before, after = (masks_of(data.splits["val"], data.table) for data in (source, both))
    assert all((after[path] == mask).all() for path, mask in before.items())


def test_classes_are_matched_by_name_and_painted_masks_take_colors(tmp_path, pseudo):
    data = write_folder(tmp_path / "data", count=6)
    colors = np.array([(9, 9, 9), (200, 0, 0), (0, 0, 200)], np.uint8)
    for path in (data / "masks").iterdir():
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    (data / "classes.txt").write_text("ground 9 9 9\nroof 200 0 0\npool 0 0 200\n")
    (pseudo / "classes.txt").write_text("pool\nground\nroof\n")
    source = load("folder", data)
    both = with_extra(source, pseudo)
    lookup = np.full(256, 255)
    lookup[:3] = 2, 0, 1
    for path, mask in masks_of(both.extra, both.table).items():
        assert (mask == lookup[np.array(Image.open(pseudo / "masks" / path))]).all()
    changed = next((pseudo / "masks").iterdir())
    Image.fromarray(np.zeros((45, 61), np.uint8)).save(changed)  # not those that were written before
    assert (masks_of(with_extra(source, pseudo).extra, both.table)[changed.name] == 2).all()
    (pseudo / "classes.txt").write_text("pool\nground\nboat\n")
    with refused("--extra", pseudo, "boat"):
        with_extra(source, pseudo)


def test_images_of_the_data_set_are_left_out_whatever_they_are_called(tmp_path, pseudo):
    data = write_folder(tmp_path / "data", count=8)
    source = load("folder", data, val_fraction=0.25)
    val, trained = source.splits["val"][0], source.splits["train"][0]
    for number, sample in enumerate((val, trained)):
        shutil.copy(sample.image, pseudo / f"images/copy {number}.png")
        shutil.copy(sample.mask, pseudo / f"masks/copy {number}.png")
    both = with_extra(source, pseudo)
    assert len(both.extra) == 4 and not [extra for extra in both.extra if "copy" in extra.image.name]
    assert any("2 of --extra" in note for note in both.notes)
    few = load("folder", data, val_fraction=0.25, train_images=2)
    for sample in few.splits["unused"]:  # those that pseudo-labels are for
        shutil.copy(sample.image, pseudo / f"images/{sample.image.name}")
        shutil.copy(sample.mask, pseudo / f"masks/{sample.image.name}")
    names = {sample.image.name for sample in with_extra(few, pseudo).extra}
    assert names >= {sample.image.name for sample in few.splits["unused"]} and val.image.name not in names


def test_class_weights_are_of_all_images_that_train(tmp_path, pseudo):
    both = with_extra(load("folder", write_folder(tmp_path / "data", count=6)), pseudo)
    settings = SimpleNamespace(class_weights="enet", loss="ce", out_dir=tmp_path)
    weights = train.build_criterion(settings, both, torch.device("cpu")).class_weights
    masks = masks_of(both.training, both.table).values()
    assert len(masks) == len(both.splits["train"]) + 4
    pixels = np.stack([np.bincount(mask[mask != 255], minlength=3) for mask in masks])
    assert torch.equal(weights, class_weights(pixels, "enet"))


def test_a_run_with_more_images_resumes_scores_and_notices_their_change(tmp_path, pseudo, run):
    data, out = write_folder(tmp_path / "data", count=8), tmp_path / "out"
    flags = ["--dataset", "folder", "--data-root", data, "--extra", pseudo, "--backbone", "vit_tiny"]
    flags += ["--unfreeze", "all", "--imgsz", 42, 56, "--workers", 0, "--device", "cpu", "--out-dir", out]
    flags += ["--class-weights", "enet", "--epochs", 1]
    code, text, err = run(train, *flags)
    assert code == 0 and "6 train, 2 val, 4 extra" in text, err
    assert json.loads((out / "config.json").read_text())["images"] == {"train": 6, "val": 2, "extra": 4}
    assert run(train, "--resume", "--epochs", 2, "--out-dir", out)[0] == 0
    moved = pseudo.rename(tmp_path / "elsewhere")
    code, text, err = run(evaluate, "--model", out / "last.pth", "--out-dir", out)
    assert code == 0 and "2 images" in text, err  # which needs none of them
    trained_on = torch.load(out / "last.pth")["trained_on"]
    assert len(paths_in(trained_on, (moved / "images").iterdir())) == 4
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", out)
    assert code == 2 and "--extra " in err and "pseudo" in err and err.count("\n") == 1
    assert run(train, "--resume", "--epochs", 3, "--extra", moved, "--out-dir", out)[0] == 0
    next((moved / "images").iterdir()).unlink()
    shutil.rmtree(moved / "masks")
    shutil.copytree(data / "masks", moved / "masks")
    code, _, err = run(train, "--resume", "--epochs", 4, "--extra", "", "--out-dir", out)
    assert code == 2 and "--extra" in err and err.count("\n") == 1  # an empty variable of a shell
    code, _, err = run(train, "--resume", "--epochs", 4, "--extra", moved, "--out-dir", out)
    assert code == 2 and err.count("\n") == 1
