"""check_data.py on data sets with one fault each: the verdict, the files that are listed; --fix."""

import re
import sys
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import blocks, load, real_data, refused, write_folder, write_pair, write_tree
from PIL import Image
from test_scan import painted, photo
from trees import TREES, follow_advice, frames, save

import check_data
import datasets
from config import DataOptions
from dataio.readers import DataSource, Sample, index_table, pack_color, read_mask, read_sample, value_table

NOTHING = {"warning": [], "problem": [], "to do": []}


def check(run, root, out, *flags):
    """Run check_data.py on a folder; return (exit code, its text, {kind: [files listed of each item]})."""
    code, text, err = run(check_data, "--data-root", root, "--out-dir", out, *flags)
    assert "Traceback" not in err
    items = {kind: [] for kind in NOTHING}
    for kind, files in re.findall(r"^(warning|problem|to do): .*\n((?: {6}.*\n)*)", text, re.M):
        items[kind].append([line.strip().removeprefix(f"{root}/") for line in files.splitlines()])
    return code, text + err, items


def write_photos(root, count=8, values=(0, 1, 2), first=0, encode=lambda mask: mask, **options):
    """Write a folder of photos that do not look alike, with masks; encode: (H, W) ids -> what is stored."""
    ending = "jpg" if options else "png"
    for number in range(count):
        save(root / f"images/{number:02d}.png", photo(first + number, (60, 80)))
        save(root / f"masks/{number:02d}.{ending}", encode(blocks(60, 80, values, seed=number)), **options)
    return root


# --- one fault each: what is changed in a good folder ------------------------------------------------------
def unpaired(root):
    (root / "masks/03.png").unlink()
    (root / "images/05.png").unlink()


def broken(root):
    (root / "images/02.png").write_bytes(b"broken")
    (root / "masks/04.png").write_bytes((root / "masks/04.png").read_bytes()[:60])


def turned_image(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(root / "images/04.png", photo(4, (60, 80)), exif=exif)


def all_ignored(root):
    write_photos(root, values=(0,))
    (root / "classes.txt").write_text("ignore\na\nb\n")


def same_masks(root):
    for number in range(8):
        save(root / f"masks/{number:02d}.png", blocks(60, 80, (0, 1, 2), seed=1))


def jpeg_masks(root):
    shutil.rmtree(root)
    write_photos(root, quality=95)


FAULTS = {  # what is changed, the exit code, the kind of line and the files it lists
    "unpaired": (unpaired, 1, "problem", [["images/03.png"], ["masks/05.png"]]),
    "broken": (broken, 1, "problem", [["images/02.png", "masks/04.png"]]),
    "gray image": (lambda root: save(root / "images/01.png", photo(1, (60, 80))[..., 0]),
                   0, "warning", [["images/01.png"]]),
    "small mask": (lambda root: save(root / "masks/02.png", blocks(30, 40, (0, 1, 2))),
                   0, "warning", [["masks/02.png"]]),
    "transposed mask": (lambda root: save(root / "masks/02.png", blocks(80, 60, (0, 1, 2))),
                        0, "warning", [["masks/02.png"]]),
    "empty mask": (lambda root: save(root / "masks/03.png", np.zeros((60, 80), np.uint8)),
                   0, "warning", [["masks/03.png"]]),
    "turned image": (turned_image, 0, "warning", [["images/04.png"]]),
    "JPEG masks": (jpeg_masks, 1, "warning", [[f"masks/{number:02d}.jpg" for number in range(8)]]),
    "same masks": (same_masks, 0, "warning", [[]]),
    "single value": (lambda root: write_photos(root, values=(0,)), 1, "problem", [[]]),
    "all ignored": (all_ignored, 1, "problem", [[], []]),
}


@pytest.mark.parametrize(("fault", "code", "kind", "files"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_files(tmp_path, run, fault, code, kind, files):
    root = write_photos(tmp_path / "data")
    fault(root)
    verdict, text, items = check(run, root, tmp_path)
    listed = [[line.split()[0] for line in lines] for lines in items[kind]]
    assert verdict == code and listed == files, text


@pytest.mark.plots
def test_a_good_folder_is_ready_and_the_command_to_train_is_printed(tmp_path, run):
    root = write_photos(tmp_path / "data")
    code, text, items = check(run, root, tmp_path)
    assert code == 0 and items == NOTHING
    assert f"python train.py --dataset folder --data-root {root}" in text
    assert "8 train" in text and "0..2" in text and "L PNG (8)" in text
    picture = np.array(Image.open(tmp_path / "check.png"))
    assert picture.std() > 10 and picture.shape[1] > 1000


def test_images_much_larger_than_imgsz_are_named_with_the_flag(tmp_path, run, monkeypatch):
    root = write_photos(tmp_path / "data")
    for size, named in (((20, 20), True), ((24, 30), False)):
        monkeypatch.setattr(check_data, "TrainConfig", lambda size=size: SimpleNamespace(imgsz=size))
        code, text, _ = check(run, root, tmp_path)
        assert code == 0 and ("--train-scale native" in text) == named == ("3.5" in text)


def test_missing_roots_exit_with_2(tmp_path, run):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        code, text, _ = check(run, tmp_path / name, tmp_path)
        assert code == 2 and text.count("\n") == 1 and name in text


# --- values and colors: what is advised works (more in test_folder.py) ------------------------------------
def test_primary_colors_and_black_masks_saved_as_gray_get_a_classes_txt_that_works(tmp_path, run):
    colors = np.array([(0, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    root = write_photos(tmp_path / "data", encode=lambda mask: colors[mask])
    save(root / "masks/03.png", np.zeros((60, 80), np.uint8))
    code, text, _ = check(run, root, tmp_path)
    follow_advice(root, text, "advice")
    assert code == 1 and check(run, root, tmp_path)[0] == 0
    source = load("folder", root)
    assert len(source.classes) == 3
    assert (read_mask(root / "masks/03.png", source.table) == source.table[0]).all()


def test_a_16_bit_mask_among_painted_masks_is_a_problem(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1), encode=painted)
    save(root / "masks/03.png", np.full((60, 80), 300, np.uint16))
    follow_advice(root, check(run, root, tmp_path)[1], "advice")
    code, text, _ = check(run, root, tmp_path)
    assert code == 1 and "masks/03.png" in re.search("^problem: (.*)$", text, re.M)[1]


def test_rare_classes_are_not_accidents_and_scattered_pixels_are(tmp_path, run):
    root, generator = write_photos(tmp_path / "data", count=30, values=(0, 40)), np.random.default_rng(0)
    for path in sorted((root / "masks").iterdir()):
        mask = np.array(Image.open(path))
        mask[:3, :3] = 200  # few pixels in every mask
        if path.stem == "07":
            mask[20:40, 20:40] = 90  # many in a single one
        mask[generator.random(mask.shape) < 0.02] = 133
        save(path, mask)
    code, text, items = check(run, root, tmp_path)
    assert code == 1 and [files[-1] for files in items["warning"]] == ["and 22 more"]
    assert "133" in re.search("^warning: (.*)$", text, re.M)[1]
    follow_advice(root, text, "advice")
    assert load("folder", root).table[[0, 40, 90, 133, 200]].tolist() == [0, 1, 2, 255, 3]


def test_lossy_masks_without_clear_values_get_no_advice(tmp_path, run):
    def noise(mask):
        noisy = mask + np.random.default_rng(0).integers(0, 60, mask.shape, np.uint8)
        return np.stack([noisy, 255 - noisy, noisy // 2], 2)

    root = write_photos(tmp_path / "data", count=3, values=(0, 85, 170), encode=noise, quality=50)
    code, text, items = check(run, root, tmp_path)
    assert code == 1 and items["to do"] == [[]], text


def test_the_plain_list_of_all_names_is_advised_first_unless_values_are_grays(tmp_path, run):
    for values, count in (((0, 11, 97, 181), 2), ((0, 85, 170), 1)):
        _, text, items = check(run, write_photos(tmp_path / f"{values[1]}", values=values), tmp_path)
        assert len(items["to do"]) == count + 1 and ("182" in text) == (count == 2)  # the last is --fix


# --- splits -----------------------------------------------------------------------------------------------
def test_classes_missing_from_a_split_are_named(tmp_path, run):
    write_photos(tmp_path / "data/train", 3, (0, 1, 2))
    write_photos(tmp_path / "data/val", 3, (0, 1), first=3)
    (tmp_path / "data/classes.txt").write_text("sky\nroad\ncar\n")
    code, text, _ = check(run, tmp_path / "data", tmp_path)
    assert code == 0 and re.search("^warning: .*car in val$", text, re.M)


def test_copies_and_look_alikes_between_train_and_val_are_listed(tmp_path, run):
    root = tmp_path / "data"
    write_photos(root / "train", count=4)
    write_photos(root / "val", count=4, first=40)
    shutil.copy(root / "train/images/00.png", root / "val/images/00.png")
    Image.open(root / "train/images/02.png").resize((100, 75)).save(root / "val/images/02.png")
    code, text, items = check(run, root, tmp_path)
    images = f"{root}/train/images"
    assert code == 1 and items["problem"] == [[f"val/images/00.png = {images}/00.png"]]
    assert [f"val/images/02.png ~ {images}/02.png"] in items["warning"], text


def test_deep_gray_images_are_not_copies_of_one_another(tmp_path, run):
    root = tmp_path / "data"
    for split, first in (("train", 0), ("val", 4)):
        write_photos(root / split, count=4)
        for number in range(4):
            deep = photo(first + number, (60, 80))[..., 0].astype(np.uint16) * 16
            save(root / f"{split}/images/{number:02d}.png", deep)
    code, text, items = check(run, root, tmp_path)
    assert code == 0 and not items["problem"] and not items["warning"]
    assert "uint16" in text


def test_frames_of_a_clip_in_both_splits_are_warned_of(tmp_path, run):
    frames(tmp_path / "clip", step=2)
    for path in sorted((tmp_path / "clip").rglob("frame_*")):
        split = "val" if int(path.stem[-4:]) % 4 == 0 else "train"
        target = tmp_path / "data" / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    code, text, _ = check(run, tmp_path / "data", tmp_path)
    assert code == 0 and re.search(r"^warning: 10 of 10 ", text, re.M)


def test_sparse_labels_can_train_and_the_quick_check_is_spread(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", count=40, values=(0, 1))
    (root / "classes.txt").write_text("a\nb\n")
    for path in (root / "masks").iterdir():
        if path.stem != "17":
            save(path, np.full((45, 61), 255, np.uint8))
    source = datasets.folder(root, DataOptions())
    source.splits = {"train": sorted(source.splits["train"] + source.splits["val"])}
    datasets.quick_check(source)  # a single labeled mask is enough
    read = []
    monkeypatch.setattr(datasets, "read_mask", lambda path, table: read.append(path) or np.zeros((2, 2), int))
    datasets.quick_check(source)
    assert len(read) == 8 and (read[0].stem, read[-1].stem) == ("00", "39")
    save(root / "masks/17.png", np.full((45, 61), 255, np.uint8))
    monkeypatch.undo()
    with refused("masks/", "check_data.py"):
        load("folder", root)


# --- registered data sets ---------------------------------------------------------------------------------
def test_leaks_wrong_values_and_missing_files_of_a_listed_data_set(tmp_path, run):
    root, flags = tmp_path / "data", ("--dataset", "aeroscapes")
    write_tree("aeroscapes", root)
    names = root / "ImageSets/trn.txt"
    names.write_text(names.read_text() + "val_000001\n")
    save(root / "SegmentationClass/train_000000.png", np.full((45, 61), 77, np.uint8))
    code, text, items = check(run, root, tmp_path, *flags)
    assert code == 1 and "77" in text
    assert items["problem"] == [["JPEGImages/val_000001.jpg"], ["SegmentationClass/train_000000.png"]]
    (root / "ImageSets/val.txt").write_text("nothing_here\n")
    code, text, _ = check(run, root, tmp_path, *flags)
    assert code == 2 and "nothing_here.jpg" in text and text.count("\n") == 1


def test_painted_masks_of_a_registered_data_set_name_the_folder_data_set(tmp_path, run):
    write_tree("voc", tmp_path / "data")
    for path in (tmp_path / "data/SegmentationClass").iterdir():
        save(path, painted(np.array(Image.open(path)) % 2))
    code, text, _ = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
    assert code == 1 and "--dataset folder" in text
    with refused("--dataset folder"):
        load("voc", tmp_path / "data")


def test_a_registered_data_set_of_painted_masks(tmp_path, run, monkeypatch):
    """As the data set of a researcher may be; then a mask has a color too many, or has numbers."""
    samples = []
    for number in range(8):
        samples.append(Sample(tmp_path / f"data/{number}.png", tmp_path / f"data/m/{number}.png"))
        write_pair(samples[-1].image, samples[-1].mask, blocks(20, 30, (0, 1), seed=number))
        save(samples[-1].mask, painted(blocks(20, 30, (0, 1), seed=number)))
    colors = [(255, 0, 0), (0, 255, 0)]
    table = value_table({pack_color(*color): id for id, color in enumerate(colors)}, size=1 << 24)
    source = DataSource("mine", [("a", colors[0]), ("b", colors[1])],
                        {"train": samples[:6], "val": samples[6:]}, table)
    monkeypatch.setitem(datasets.DATASETS, "voc", (lambda *_: source, None))
    assert check(run, tmp_path / "data", tmp_path, "--dataset", "voc")[0] == 0
    for mode, color in (("RGB", (1, 2, 3)), ("I;16", 300)):
        Image.new(mode, (30, 20), color).save(samples[0].mask)
        code, text, items = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
        assert code == 1 and items["problem"] == [["m/0.png"]] and ("(1, 2, 3)" in text) == (mode == "RGB")


def test_real_data_sets(tmp_path, run):
    code, text, items = check(run, real_data("ade20k_sample"), tmp_path, "--dataset", "ade20k")
    assert code == 1 and items["problem"] == [[]] and "135" in text  # classes that are missing
    code, text, _ = check(run, real_data("camvid"), tmp_path, "--dataset", "camvid")
    assert code == 0 and "367 train, 101 val" in text and "0..11" in text
    code, text, _ = check(run, real_data("person_sample"), tmp_path)
    assert code == 0 and re.search("^warning: 43 masks", text, re.M) and "warning: 2 images" in text
    assert check(run, real_data("crackforest"), tmp_path)[0] == 0


# --- --fix ------------------------------------------------------------------------------------------------
def test_a_clean_copy_holds_the_same_masks_lists_and_names(tmp_path, run):
    root = write_photos(tmp_path / "data", count=10, values=(0, 85, 170))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "images/03.png", Image.open(root / "images/03.png"), exif=exif)
    (root / "classes.txt").write_text("sea = 0\nland = 85\ncloud = 170\n")
    code, text, _ = check(run, root, tmp_path, "--fix", tmp_path / "clean")
    assert code == 0 and "8 train, 2 val" in text
    before, after = load("folder", root), load("folder", tmp_path / "clean")
    assert before.classes == after.classes and [name for name, _ in after.classes] == ["sea", "land", "cloud"]
    for split in ("train", "val"):
        for original, copy in zip(before.splits[split], after.splits[split], strict=True):
            assert original.image.name == copy.image.name and copy.mask.suffix == ".png"
            assert original.image.read_bytes() == copy.image.read_bytes()
            image, targets = read_sample(original, before.table)
            _, copied = read_sample(copy, index_table(3))
            assert (targets["mask"] == copied["mask"]).all() and targets["mask"].shape == image.shape[1:]
    code, _, items = check(run, tmp_path / "clean", tmp_path)
    assert code == 0 and items["problem"] == items["to do"] == []


def test_copies_between_splits_and_damaged_files_are_left_out_of_a_copy(tmp_path, run):
    root = tmp_path / "data"
    write_photos(root / "train", count=5)
    write_photos(root / "val", count=2)  # the same names, and the same pictures
    (root / "train/masks/04.png").write_bytes(b"")
    code, text, _ = check(run, root, tmp_path, "--fix", tmp_path / "clean")
    assert code == 0 and "04.png" in text
    source = load("folder", tmp_path / "clean")
    assert len(source.splits["train"]) == 2 and len(source.splits["val"]) == 2
    assert len(list((tmp_path / "clean/masks").iterdir())) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes, as Linux has them")
def test_names_of_a_copy_stand_in_its_lists_whatever_bytes_they_had(tmp_path, run):
    root = write_photos(tmp_path / "data", count=6)
    for number, name in enumerate(("\udcff", "\udcfe", "a\nb", "a\tb")):  # of bytes that are not UTF-8
        for kind in ("images", "masks"):
            path = root / kind / f"{number:02d}.png"
            path.rename(path.with_name(f"{name}.png"))
    code, text, _ = check(run, root, tmp_path, "--fix", tmp_path / "clean")
    assert code == 0, text
    splits = load("folder", tmp_path / "clean").splits
    assert sum(map(len, splits.values())) == 6 and len(splits["val"]) > 0


def test_what_must_not_be_written_is_refused_before_anything_is_read(tmp_path, run, monkeypatch):
    root = write_folder(tmp_path / "data", count=3)
    monkeypatch.setattr(check_data, "find_samples", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for target in (root, root / "x/y", tmp_path / "full"):
        code, text, _ = check(run, root, tmp_path, "--fix", target)
        assert code == 2 and f"--fix {target}" in text and text.count("\n") == 1


@pytest.mark.parametrize("name", ["0 1 255, all areas", "JPEG, 0 1 2"])
def test_doubts_are_not_guessed(name, tmp_path, run):
    TREES[name].write(tmp_path / "data")
    code, text, _ = check(run, tmp_path / "data", tmp_path, "--fix", tmp_path / "clean")
    assert code == 2 and "--fix" in text and not (tmp_path / "clean").exists()
