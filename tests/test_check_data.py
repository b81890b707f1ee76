"""check_data.py on data sets with one fault each: the fault is named, the advice works."""

import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import blocks, load, real_data, write_folder, write_pair, write_tree
from PIL import Image
from test_folder import write_frames
from test_scan import painted, photo
from trees import void_borders

import check_data
from config import DataOptions
import datasets

from dataio.readers import DataSource, Sample, pack_color, read_mask, value_table


def check(run, root, out, *flags):
    """Run check_data.py on a folder; return (exit code, its text)."""
    code, text, err = run(check_data, "--data-root", root, "--out-dir", out, *flags)
    assert "Traceback" not in err
    return code, text + err


def write_photos(root, count=8, values=(0, 1, 2)):
    """Write a folder of photos that do not look alike, with index masks."""
    for number in range(count):
        for part, array in (
            ("images", photo(number, (60, 80))),
            ("masks", blocks(60, 80, values, seed=number)),
        ):
            path = root / part / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


@pytest.mark.plots
def test_a_good_folder_is_ready_and_says_how_to_train(tmp_path, run):
    root = write_photos(tmp_path / "data")
    code, text = check(run, root, tmp_path)
    assert code == 0 and "verdict: ready, with 0 warnings" in text
    assert f"python train.py --dataset folder --data-root {root}" in text
    assert "8 pairs (8 train)" in text and "mask values: 0..2" in text and "masks: 8 L PNG" in text
    picture = np.array(Image.open(tmp_path / "check.png"))
    assert picture.std() > 10 and picture.shape[1] > 1000


def test_images_much_larger_than_imgsz_are_named_with_what_to_do(tmp_path, run, monkeypatch):
    root, says = write_photos(tmp_path / "data"), "add --train-scale native"
    monkeypatch.setattr(check_data, "TrainConfig", lambda: SimpleNamespace(imgsz=(20, 20)))
    code, text = check(run, root, tmp_path)
    assert code == 0 and "3.5 times as long and wide as --imgsz 20 20" in text and says in text
    monkeypatch.setattr(check_data, "TrainConfig", lambda: SimpleNamespace(imgsz=(24, 30)))
    assert says not in check(run, root, tmp_path)[1]


def test_unpaired_files_are_all_counted_and_named(tmp_path, run):
    root = write_photos(tmp_path / "data")
    (root / "masks/03.png").unlink()
    (root / "images/05.png").unlink()
    code, text = check(run, root, tmp_path)
    assert code == 1 and "verdict: not ready, 2 problems" in text
    assert re.search(r"1 train image has no mask.*\n.*images/03.png", text)
    assert re.search(r"1 train mask has no image.*\n.*masks/05.png", text)


def test_unreadable_files_are_named_and_the_rest_is_checked(tmp_path, run):
    root = write_photos(tmp_path / "data")
    (root / "images/02.png").write_bytes(b"broken")
    (root / "masks/04.png").write_bytes((root / "masks/04.png").read_bytes()[:60])
    code, text = check(run, root, tmp_path)
    assert code == 1 and "2 files cannot be read" in text and "02.png" in text and "04.png" in text
    assert "images: 6 RGB" in text


def test_warnings_do_not_stop_a_training(tmp_path, run):
    root = write_photos(tmp_path / "data")
    Image.open(root / "images/01.png").convert("L").save(root / "images/01.png")
    Image.open(root / "masks/02.png").resize((40, 30), Image.Resampling.NEAREST).save(root / "masks/02.png")
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(root / "masks/03.png")
    turned = Image.fromarray(photo(4, (60, 80)))
    turned.getexif()[0x0112] = 3
    turned.save(root / "images/04.jpg", exif=turned.getexif())
    (root / "images/04.png").unlink()
    code, text = check(run, root, tmp_path)
    assert code == 0, text
    for said, name in (
        ("1 image is not RGB", "images/01.png"),
        ("1 mask differs in size", "masks/02.png"),
        ("holds a single class", "masks/03.png"),
        ("1 image is turned upright by EXIF, but their masks stay", "images/04.jpg"),
    ):
        assert re.search(f"warning: .*{said}.*\n.*{name}", text), said


def test_stray_values_in_binary_masks_are_found_and_the_advice_repairs_them(tmp_path, run):
    """CrackForest as published: 0 and 255, with a few pixels of 3 and 4."""
    root = write_photos(tmp_path / "data", values=(0, 255))
    for number, value in ((2, 3), (6, 4)):
        mask = np.array(Image.open(root / f"masks/{number:02d}.png"))
        mask[5, 5:8] = value
        Image.fromarray(mask).save(root / f"masks/{number:02d}.png")
    code, text = check(run, root, tmp_path)
    assert code == 1 and "1 mask holds the value 3, 3 pixels in all: an accident?" in text
    write_advice(root, text)
    code, text = check(run, root, tmp_path)
    assert code == 0, text
    source = load("folder", root)
    assert [name for name, _ in source.classes] == ["background", "class 1"]
    assert source.table[[0, 255, 3, 4]].tolist() == [0, 1, 255, 255]


def write_advice(root, text):
    """Write the classes.txt that check_data.py suggested, the last one of two."""
    lines = re.findall(r"write this to .*classes.txt.*:\n((?: {6}.*\n)+)", text)[-1]
    (root / "classes.txt").write_text("\n".join(line.strip() for line in lines.splitlines()) + "\n")


@pytest.mark.parametrize("values", [(0, 85, 170), (7, 8, 11, 255), (1, 2)])
def test_values_with_gaps_get_a_classes_txt_that_works(tmp_path, run, values):
    root = write_photos(tmp_path / "data", values=values)
    code, text = check(run, root, tmp_path)
    assert code == 1 and "which are not 0..K-1" in text
    write_advice(root, text)
    assert check(run, root, tmp_path)[0] == 0
    assert len(load("folder", root).classes) == len(set(values) - {255})


def test_painted_masks_get_a_classes_txt_that_works(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1))
    for path in (root / "masks").iterdir():
        Image.fromarray(painted(np.array(Image.open(path)))).save(path)
    code, text = check(run, root, tmp_path)
    assert code == 1 and "is painted in colors" in text and "class 0 0 255 0" in text
    write_advice(root, text)
    assert check(run, root, tmp_path)[0] == 0
    source = load("folder", root)
    assert source.table[255 << 8] == 0 and source.table[255 << 16] == 1


def test_lossy_masks_are_told_to_be_exported_again(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 85, 170))
    for path in list((root / "masks").iterdir()):
        noisy = np.array(Image.open(path)) + np.random.default_rng(0).integers(0, 60, (60, 80), np.uint8)
        Image.fromarray(np.stack([noisy, 255 - noisy, noisy // 2], 2)).save(
            path.with_suffix(".jpg"), quality=50
        )
        path.unlink()
    code, text = check(run, root, tmp_path)
    assert code == 1 and "8 masks are JPEG files" in text and "export them again as PNG" in text


def test_index_masks_saved_as_jpeg_are_a_problem(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1, 2))
    for path in list((root / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    code, text = check(run, root, tmp_path)
    assert code == 1 and "8 masks are JPEG files, which blur class borders" in text


def test_blue_is_a_color_like_others(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1, 2))
    for path in (root / "masks").iterdir():
        Image.fromarray(np.eye(3, dtype=np.uint8)[np.array(Image.open(path))] * 255).save(path)
    code, text = check(run, root, tmp_path)
    write_advice(root, text)
    assert code == 1 and check(run, root, tmp_path)[0] == 0
    assert len(load("folder", root).classes) == 3


def test_a_black_mask_saved_as_gray_among_painted_ones(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1))
    for path in (root / "masks").iterdir():
        colors = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    Image.new("L", (80, 60), 0).save(root / "masks/03.png")
    text = check(run, root, tmp_path)[1]
    write_advice(root, text)
    assert check(run, root, tmp_path)[0] == 0
    source = load("folder", root)
    assert (read_mask(root / "masks/03.png", source.table) == source.table[0]).all()


def test_transposed_masks_are_noticed(tmp_path, run):
    root = write_photos(tmp_path / "data")
    mask = np.array(Image.open(root / "masks/02.png"))
    Image.fromarray(np.ascontiguousarray(mask.T)).save(root / "masks/02.png")
    assert re.search(r"1 mask differs in size.*\n.*masks/02.png", check(run, root, tmp_path)[1])


def test_a_rare_class_that_is_in_every_file_is_no_accident(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 40))
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[:3, :3] = 90
        Image.fromarray(mask).save(path)
    code, text = check(run, root, tmp_path)
    assert code == 1 and "an accident" not in text
    write_advice(root, text)
    assert len(load("folder", root).classes) == 3


def test_masks_with_one_value_and_with_nothing_counted(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0,))
    code, text = check(run, root, tmp_path)
    assert code == 1 and "all masks hold one single value" in text
    (root / "classes.txt").write_text("ignore\na\nb\n")
    code, text = check(run, root, tmp_path)
    assert code == 1 and "hold nothing but ignored pixels: there is nothing to learn" in text


def test_classes_missing_from_a_part_are_named(tmp_path, run):
    for split, values in (("train", (0, 1, 2)), ("val", (0, 1))):
        for part in ("images", "masks"):
            shutil.move(
                write_photos(tmp_path / split / "x", 3, values) / part, tmp_path / f"data/{split}_{part}"
            )
    (tmp_path / "data/classes.txt").write_text("sky\nroad\ncar\n")
    assert "warning: no pixel of car in val" in check(run, tmp_path / "data", tmp_path)[1]


def test_sparse_labels_can_train_and_the_check_is_spread(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", count=40, values=(0, 1))
    (root / "classes.txt").write_text("a\nb\n")
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        if number != 17:
            Image.fromarray(np.full((45, 61), 255, np.uint8)).save(path)
    source = datasets.folder(root, DataOptions())
    source.splits = {"train": [sample for part in source.splits.values() for sample in part]}
    datasets.quick_check(source)  # one labeled mask is enough
    seen = []
    empty = np.zeros((2, 2), np.uint8)
    monkeypatch.setattr(datasets, "read_mask", lambda path, table: seen.append(path) or empty)
    datasets.quick_check(source)
    order = [sample.mask for sample in source.splits["train"]]
    assert len(seen) == 8 and order.index(seen[-1]) == 39 and order.index(seen[0]) == 0


def test_copies_and_look_alikes_between_train_and_val(tmp_path, run):
    for split, start in (("train", 0), ("val", 10)):
        write_photos(tmp_path / "staging", count=4)
        for number in range(4):
            for part in ("images", "masks"):
                target = tmp_path / "data" / split / part / f"{start + number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(tmp_path / f"staging/{part}/{number:02d}.png", target)
    val = tmp_path / "data/val/images"
    for number in (11, 12, 13):  # 10 stays a copy of 0
        Image.fromarray(photo(40 + number, (60, 80))).save(val / f"{number}.png")
    alike = Image.open(tmp_path / "data/train/images/2.png").resize((100, 75))
    alike.save(val / "12.png")
    code, text = check(run, tmp_path / "data", tmp_path)
    assert code == 1 and re.search(r"1 validation image is a copy.*\n.*10.png = .*0.png", text)
    assert re.search(r"warning: 1 validation image looks like.*\n.*12.png ~ .*2.png", text)


def test_leaks_and_wrong_values_of_a_listed_data_set(tmp_path, run):
    write_tree("aeroscapes", tmp_path / "data")
    lists = tmp_path / "data/ImageSets"
    (lists / "trn.txt").write_text((lists / "trn.txt").read_text() + "val_000001\n")
    mask = tmp_path / "data/SegmentationClass/train_000000.png"
    Image.new("L", (61, 45), 77).save(mask)
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "aeroscapes")
    assert code == 1 and "1 validation image is in the training list too" in text
    assert f"1 mask holds values that are no class: {mask} has the value 77" in text
    (lists / "val.txt").write_text("nothing_here\n")
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "aeroscapes")
    assert code == 2 and "nothing_here.jpg is listed but does not exist" in text


def test_a_data_set_to_evaluate_on_is_not_ready_to_train(tmp_path, run):
    code, text = check(run, real_data("ade20k_sample"), tmp_path, "--dataset", "ade20k")
    assert code == 1 and "no training image" in text and "and 135 more in val" in text


def test_missing_roots_exit_with_2(tmp_path, run):
    assert check(run, tmp_path / "nowhere", tmp_path) == (
        2,
        f"error: --data-root {tmp_path / 'nowhere'} does not exist: "
        "give the folder that holds the data set\n",
    )
    (tmp_path / "empty").mkdir()
    assert check(run, tmp_path / "empty", tmp_path)[0] == 2


def test_training_refuses_nonsense_at_once(tmp_path):
    root = write_folder(tmp_path / "data", count=6, values=(0, 1))
    (root / "classes.txt").write_text("a\nb\n")
    for path in (root / "masks").iterdir():
        Image.fromarray(np.full((45, 61), 255, np.uint8)).save(path)
    with pytest.raises(check_data.InputError, match="hold nothing but ignored pixels.*check_data.py"):
        load("folder", root)


def test_real_data_sets(tmp_path, run):
    started = time.perf_counter()
    code, text = check(run, real_data("camvid"), tmp_path, "--dataset", "camvid")
    assert code == 0 and "468 pairs (367 train, 101 val)" in text and "mask values: 0..11" in text
    assert time.perf_counter() - started < 60
    code, text = check(run, real_data("person_sample"), tmp_path)
    assert code == 0 and "43 masks differ in size" in text and "2 images are not RGB" in text
    code, text = check(run, real_data("crackforest"), tmp_path)
    assert code == 0 and "masks hold 0 and 255" in text


def test_pairs_in_sub_folders_and_write_pair(tmp_path, run):
    for place in ("a", "b"):
        write_pair(
            tmp_path / f"data/images/{place}/x.png",
            tmp_path / f"data/masks/{place}/x_mask.png",
            blocks(40, 50, (0, 1, 2), seed=ord(place)),
        )
    assert check(run, tmp_path / "data", tmp_path)[0] == 0


def test_one_class_alone_is_a_problem_and_the_advice_starts_anew(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 255))
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    code, text = check(run, root, tmp_path)
    assert code == 1 and "problem: only one class, sky, has pixels in train" in text
    assert "background = 0\n      class 1 = 255\n" in text and re.search(r"ignored: \d+\.\d % of the", text)
    assert re.search(r"warning: \d+\.\d % of the pixels are ignored: is one of", text)


def test_a_class_in_few_masks_is_no_accident_and_scattered_pixels_are(tmp_path, run):
    root = write_photos(tmp_path / "data", count=30, values=(0, 40))
    generator = np.random.default_rng(0)
    for path in sorted((root / "masks").iterdir()):
        mask = np.array(Image.open(path))
        if path.stem == "07":
            mask[20:40, 20:40] = 90
        mask[generator.random(mask.shape) < 0.02] = 133  # in every mask, 2 % of the pixels
        Image.fromarray(mask).save(path)
    code, text = check(run, root, tmp_path)
    assert code == 1 and "the value 90" not in text
    assert re.search(r"warning: 30 masks hold the value 133, \d+ pixels in all: an accident", text)
    write_advice(root, text)
    assert load("folder", root).table[[0, 40, 90, 133]].tolist() == [0, 1, 2, 255]


def test_the_plain_list_of_all_names_comes_first(tmp_path, run):
    text = check(run, write_photos(tmp_path / "data", values=(0, 11, 97, 181)), tmp_path)[1]
    plain, guess = text.index("in their order (at least 182)"), text.index("write this to")
    assert plain < guess
    text = check(run, write_photos(tmp_path / "gray", values=(0, 85, 170)), tmp_path)[1]
    assert "in their order" not in text


def test_deep_gray_images_are_no_copies_of_one_another(tmp_path, run):
    root = tmp_path / "data"
    for split, seeds in (("train", range(4)), ("val", range(4, 7))):
        write_photos(root / split, count=3)
        for number, seed in enumerate(seeds):
            deep = photo(seed, (60, 80))[..., 0].astype(np.uint16) * 16  # 12 bit
            Image.fromarray(deep).save(root / f"{split}/images/{number:02d}.png")
    shutil.copy(root / "train/masks/00.png", root / "train/masks/03.png")
    code, text = check(run, root, tmp_path)
    assert code == 0 and "look" not in text and "cop" not in text, text
    assert "7 images deeper than 8 bit: scaled to 8 by the depth of the values, 12 bit" in text


def test_frames_of_one_clip_in_both_parts_are_warned_of(tmp_path, run):
    source = write_frames(tmp_path / "frames", 40, 3)
    for path in sorted(source.rglob("*.png")):
        split = "val" if int(path.stem[-4:]) % 4 == 0 else "train"
        target = tmp_path / "data" / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    text = check(run, tmp_path / "data", tmp_path)[1]
    assert "10 of 10 validation images (100%) have a near neighbor in training" in text
    text = check(run, source, tmp_path)[1]  # split by this code: in blocks
    assert "8 of 40 images would validate, stratified by blocks of consecutive frames" in text


def test_painted_masks_of_a_registered_data_set(tmp_path, run):
    write_tree("voc", tmp_path / "data")
    for path in (tmp_path / "data/SegmentationClass").iterdir():
        Image.fromarray(painted(np.array(Image.open(path)) % 2)).save(path)
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
    assert code == 1 and "is painted in colors, voc has masks of class numbers" in text
    assert "give --dataset folder" in text


def test_a_registered_data_set_of_painted_masks(tmp_path, run, monkeypatch):
    """As the data set of a researcher may be; then one mask has a color too many, and one has numbers."""
    for index in range(8):
        labels = blocks(20, 30, (0, 1), seed=index)
        write_pair(tmp_path / f"data/{index}.png", tmp_path / f"data/m/{index}.png", labels)
        Image.fromarray(painted(labels)).save(tmp_path / f"data/m/{index}.png")
    colors = [tuple(int(part) for part in color) for color in painted(np.array([[0, 1]], np.uint8))[0]]
    table = value_table({pack_color(*color): id for id, color in enumerate(colors)}, size=1 << 24)
    samples = [Sample(tmp_path / f"data/{index}.png", tmp_path / f"data/m/{index}.png") for index in range(8)]
    source = DataSource("mine", [("a", colors[0]), ("b", colors[1])],
                        {"train": samples[:6], "val": samples[6:]}, table)
    monkeypatch.setitem(datasets.DATASETS, "voc", (lambda *_: source, None))
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
    assert code == 0, text
    Image.new("RGB", (30, 20), (1, 2, 3)).save(samples[0].mask)
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
    assert code == 1 and "0.png has the color (1, 2, 3) (600 pixels)" in text, text
    Image.new("I;16", (30, 20), 300).save(samples[0].mask)
    code, text = check(run, tmp_path / "data", tmp_path, "--dataset", "voc")
    assert code == 1 and "0.png holds class numbers" in text, text


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 7, 8)])
def test_thin_lines_of_255_between_classes_are_void_without_a_question(tmp_path, run, values):
    root = write_photos(tmp_path / "data", values=(0, 1, 2))
    for path in (root / "masks").iterdir():
        drawn = void_borders(np.array(Image.open(path)), 0)
        Image.fromarray(np.array([*values, *[255] * 253], np.uint8)[drawn]).save(path)
    code, text = check(run, root, tmp_path)
    assert "255 is" not in text and (code == 0) == (values == (0, 1, 2)), text
    if code:
        write_advice(root, text)
    source = load("folder", root)
    assert len(source.classes) == 3 and source.table[255] == 255


def test_masks_that_are_all_the_same_are_warned_of(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1))
    assert "look all alike" not in check(run, root, tmp_path)[1]
    for path in (root / "masks").iterdir():
        Image.fromarray(blocks(60, 80, (0, 1), seed=1)).save(path)
    assert "warning: the masks look all alike" in check(run, root, tmp_path)[1]


def test_a_16_bit_mask_among_painted_ones_is_a_problem_and_no_traceback(tmp_path, run):
    root = write_photos(tmp_path / "data", values=(0, 1))
    for path in (root / "masks").iterdir():
        Image.fromarray(painted(np.array(Image.open(path)))).save(path)
    Image.fromarray(np.full((60, 80), 300, np.uint16)).save(root / "masks/03.png")
    code, text = check(run, root, tmp_path)
    assert code == 1 and "is painted in colors" in text and "class 0 0 255 0" in text
    write_advice(root, text)
    code, text = check(run, root, tmp_path)
    assert code == 1 and "03.png has no colors, and other masks are painted" in text
