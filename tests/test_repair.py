"""check_data.py --fix: the clean copy holds what was meant, the original stays, doubts are not guessed."""

import numpy as np
import pytest
from conftest import blocks, load, write_folder
from PIL import Image
from test_check_data import check, write_photos
from test_folder import as_jpeg
from trees import TREES

import check_data
from dataio.readers import index_table, read_mask, read_sample


def test_a_clean_copy_holds_the_same_masks_lists_and_names(tmp_path, run):
    root = write_photos(tmp_path / "data", count=10, values=(0, 85, 170))
    (root / "classes.txt").write_text("sea = 0\nland = 85\ncloud = 170\n")
    code, text = check(run, root, tmp_path, "--fix", tmp_path / "clean")
    assert code == 0 and "clean copy: " in text and "10 pairs, 8 train, 2 val" in text
    before, after = load("folder", root), load("folder", tmp_path / "clean")
    assert [name for name, _ in after.classes] == ["sea", "land", "cloud"]
    assert before.classes == after.classes
    for split in ("train", "val"):
        assert [pair.image.name for pair in before.splits[split]] == [
            pair.image.name for pair in after.splits[split]
        ]
        for one, other in zip(before.splits[split], after.splits[split], strict=True):
            assert one.image.read_bytes() == other.image.read_bytes()
            assert (read_mask(one.mask, before.table) == read_mask(other.mask, index_table(3))).all()
    assert "verdict: ready, with 0 warnings" in check(run, tmp_path / "clean", tmp_path)[1]


def test_blurred_masks_become_png_files_of_class_ids(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1))
    drawn = as_jpeg(root, (0, 255))
    assert check(run, root, tmp_path, "--fix", tmp_path / "clean")[0] == 0
    for path in (tmp_path / "clean/masks").iterdir():
        assert path.suffix == ".png" and (np.array(Image.open(path)) == drawn[path.stem]).all()


def test_copies_between_the_parts_are_on_no_training_list_and_equal_names_stay_apart(tmp_path, run):
    root = tmp_path / "data"
    write_photos(root / "train", count=4)
    write_photos(root / "val", count=2)  # the same names, and the same pictures
    for number in (2, 3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)).save(
            root / f"train/images/{number:02d}.png"
        )
    text = check(run, root, tmp_path, "--fix", tmp_path / "clean")[1]
    assert "2 training images also in another part: on no list" in text
    source = load("folder", tmp_path / "clean")
    assert len(source.splits["train"]) == 2 and len(source.splits["val"]) == 2
    assert len(list((tmp_path / "clean/masks").iterdir())) == 6


def test_masks_follow_images_that_are_turned_by_exif(tmp_path, run):
    root = write_photos(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "images/03.png").save(root / "images/03.png", exif=exif)
    assert check(run, root, tmp_path, "--fix", tmp_path / "clean")[0] == 0
    pairs = [
        (
            part,
            next(
                one
                for parts in load("folder", part).splits.values()
                for one in parts
                if "03" in one.mask.name
            ),
        )
        for part in (root, tmp_path / "clean")
    ]
    (image, targets), (copy, copied) = (read_sample(pair, index_table(3)) for _, pair in pairs)
    mask = targets["mask"]
    assert (image == copy).all() and (mask == copied["mask"]).all() and mask.shape == image.shape[1:]


def test_what_must_not_be_written_is_refused_before_anything_is_read(tmp_path, run, monkeypatch):
    root = write_folder(tmp_path / "data", count=3)
    monkeypatch.setattr(check_data, "find_samples", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for target, reason in (
        (root, "in the data set"),
        (root / "x/y", "in the data set"),
        (tmp_path / "full", "empty"),
    ):
        code, text = check(run, root, tmp_path, "--fix", target)
        assert code == 2 and reason in text and text.count("\n") == 1


@pytest.mark.parametrize("name", ["0 1 255, all areas", "JPEG, 0 1 2"])
def test_doubts_are_not_guessed(name, tmp_path, run):
    TREES[name][0](tmp_path / "data")
    code, text = check(run, tmp_path / "data", tmp_path, "--fix", tmp_path / "clean")
    assert code == 2 and "nothing is written" in text and not (tmp_path / "clean").exists()
    assert ("Choose one" in text) == (name == "0 1 255, all areas")


def test_a_damaged_file_is_left_out_and_named(tmp_path, run):
    root = write_photos(tmp_path / "data")
    (root / "masks/04.png").write_bytes(b"")
    code, text = check(run, root, tmp_path, "--fix", tmp_path / "clean")
    assert code == 0 and "04.png" in text and "7 pairs" in text
    assert (
        blocks(60, 80, (0, 1, 2), seed=2).tolist()
        == np.array(Image.open(tmp_path / "clean/masks/02.png")).tolist()
    )
