"""A folder of the user's own: every layout, every kind of classes, and a fair split."""

import numpy as np
import pytest
from conftest import blocks, load, real_data, write_folder, write_pair
from PIL import Image

from config import InputError
from dataio.folder import decide_classes
from dataio.readers import IMAGE_ENDINGS, read_mask

LAYOUTS = [
    ("train_images", "train_labels", "valid_images", "valid_labels"),
    ("train_images", "train_masks", "val_images", "val_masks"),
    ("train/images", "train/masks", "val/images", "val/masks"),
    ("Train/Images", "Train/Labels", "Valid/Images", "Valid/Labels"),
    ("images/train", "masks/train", "images/val", "masks/val"),
    ("img/training", "annotations/training", "img/validation", "annotations/validation"),
    ("images/train", "labels/train", "images/val", "labels/val"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_every_layout(tmp_path, layout):
    for number in range(5):
        images, masks = layout[:2] if number < 3 else layout[2:]
        write_pair(
            tmp_path / images / f"{number}.png",
            tmp_path / masks / f"{number}.png",
            blocks(20, 30, (0, 1, 2), seed=number),
        )
    source = load("folder", tmp_path)
    assert [sample.image.stem for sample in source.splits["train"]] == ["0", "1", "2"]
    assert [sample.mask.stem for sample in source.splits["val"]] == ["3", "4"]
    assert [name for name, _ in source.classes] == ["class 0", "class 1", "class 2"]


def test_no_layout_is_one_line_that_lists_them(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="train_images train_labels valid_images valid_labels") as error:
        load("folder", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("white", [255, 65535])
def test_binary_masks_become_0_and_1_and_the_run_says_so(tmp_path, white):
    write_folder(tmp_path, values=(0, 1))
    for path in (tmp_path / "masks").iterdir():
        mask = np.array(Image.open(path)).astype(np.uint16) * white
        Image.fromarray(mask if white > 255 else mask.astype(np.uint8)).save(path)
    source = load("folder", tmp_path, classes=("background", "person"))
    assert f"masks hold 0 and {white}: read as 0 = background, 1 = person" in source.notes
    assert set(np.unique(read_mask(source.splits["train"][0].mask, source.table))) == {0, 1}
    assert [name for name, _ in load("folder", tmp_path).classes] == ["background", "foreground"]


def test_classes_txt_names_colors_and_ignore(tmp_path):
    write_folder(tmp_path, values=(0, 1, 2, 3))
    (tmp_path / "classes.txt").write_text("road\nignore\ntraffic light 1 2 3\n\ntree\n", encoding="utf-8")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["road", "traffic light", "tree"]
    assert source.classes[1][1] == (1, 2, 3)
    assert source.table[:4].tolist() == [0, 255, 1, 2] and source.table[255] == 255


def test_masks_painted_in_the_colors_of_classes_txt(tmp_path):
    palette = np.array([(10, 20, 30), (200, 0, 0), (0, 0, 0)], np.uint8)
    write_folder(tmp_path, values=(0, 1, 2))
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(palette[np.array(Image.open(path))]).save(path)
    (tmp_path / "classes.txt").write_text("grass 10 20 30\nroof 200 0 0\nignore 0 0 0\n")
    source = load("folder", tmp_path)
    sample = source.splits["train"][0]
    want = np.array([0, 1, 255])[blocks(45, 61, (0, 1, 2), seed=int(sample.mask.stem))]
    assert (read_mask(sample.mask, source.table) == want).all()
    odd = np.array(Image.open(sample.mask))
    odd[3, 4] = (9, 9, 9)
    Image.fromarray(odd).save(sample.mask)
    with pytest.raises(InputError, match=rf"{sample.mask.name} has the color \(9, 9, 9\)"):
        load("folder", tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one\n", "1 classes"),
        ("a 1 2 3\nb 300 0 0\n", "line 2"),
        ("", "0 classes"),
        ("a = 1\nb\n", "on some lines only"),
        ("a = 1\nb = 1\n", "value 1 twice"),
        ("a = 1\nb = x\n", "line 2: write `name = VALUE`"),
        ("a = 70000\nb = 1\n", "line 1: write `name = VALUE`"),
        ("a\na\n", "names 1 classes"),
        ("a 1 2 3\nb 1 2 3\n", "color .1, 2, 3. twice"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_bad_classes_txt_is_named(tmp_path, text, reason):
    write_folder(tmp_path, count=2)
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"classes.txt.*{reason}"):
        load("folder", tmp_path)


def test_lines_of_one_name_are_one_class(tmp_path):
    write_folder(tmp_path, values=(0, 1, 2, 3))
    (tmp_path / "classes.txt").write_text("road\ncar\nroad\nignore\n")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["road", "car"]
    assert source.table[:5].tolist() == [0, 1, 0, 255, 254]


def test_values_are_mapped_as_classes_txt_says(tmp_path):
    write_folder(tmp_path, values=(0, 85, 170, 200))
    (tmp_path / "classes.txt").write_text("sea = 85\nland = 0 170\nignore = 200\n")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["sea", "land"]
    assert source.table[[85, 0, 170, 200, 255, 1]].tolist() == [0, 1, 1, 255, 255, 254]


def test_several_colors_of_one_class_and_the_nearest_of_an_unknown_one(tmp_path):
    write_folder(tmp_path, count=4, values=(0, 1, 2))
    palette = np.array([[0, 0, 0], [200, 30, 30], [210, 90, 30]], np.uint8)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(palette[np.array(Image.open(path))]).save(path)
    text = "background 0 0 0\nroof 200 30 30\nroof 210 90 30\n"
    (tmp_path / "classes.txt").write_text(text)
    source = load("folder", tmp_path)
    assert source.classes == [("background", (0, 0, 0)), ("roof", (200, 30, 30))]
    mask = read_mask(source.splits["train"][0].mask, source.table)
    colors = np.array(Image.open(source.splits["train"][0].mask))
    assert ((mask == 1) == (colors[..., 0] > 0)).all() and set(np.unique(mask)) == {0, 1}
    colors[3, 4:7] = 205, 31, 30
    Image.fromarray(colors).save(tmp_path / "masks/02.png")
    with pytest.raises(
        InputError,
        match=r"02.png has the color \(205, 31, 30\) \(3 pixels\).*nearest is roof \(200, 30, 30\)",
    ):
        load("folder", tmp_path)


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"0, 3..4, 255, which are not 0..K-1 \(3 first in m.png"):
        decide_classes(dict.fromkeys([0, 3, 4, 255], "m.png"), [], colors=False)
    with pytest.raises(InputError, match="values 0, which"):
        decide_classes({0: "m.png"}, [], colors=False)
    with pytest.raises(InputError, match="at least two names"):
        decide_classes(dict.fromkeys([0, 1]), [("only", None)], colors=False)
    classes, table, _ = decide_classes(
        dict.fromkeys([0, 1, 255]), [], colors=False
    )  # 255 beside 1 is ignore, not white
    assert len(classes) == 2 and table[255] == 255


def test_255_is_ignore_where_classes_txt_lists_ignore():
    named = [("road", None), ("car", None), ("ignore", None)]
    _, table, notes = decide_classes(dict.fromkeys([0, 255]), named, colors=False)
    assert table[255] == 255 and not notes


def test_palette_masks_whose_indices_are_not_the_order_of_classes_txt_are_read_by_color(tmp_path):
    write_folder(tmp_path, values=(0, 1))
    for number, path in enumerate(sorted((tmp_path / "masks").iterdir())):
        mask = np.array(Image.open(path))
        painted = Image.fromarray(1 - mask if number % 2 else mask)  # every second one in another order
        painted.putpalette([200, 30, 30, 0, 0, 0] if number % 2 else [0, 0, 0, 200, 30, 30])
        painted.save(path)
    (tmp_path / "classes.txt").write_text("# two classes\nbg 0 0 0\nroof 200 30 30\n")
    source = load("folder", tmp_path)
    for sample in [*source.splits["train"], *source.splits["val"]]:
        assert (
            read_mask(sample.mask, source.table) == blocks(45, 61, (0, 1), seed=int(sample.mask.stem))
        ).all()


def test_a_value_outside_is_named_before_training(tmp_path):
    write_folder(tmp_path, values=(0, 1, 2))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"masks/00.png has the value 2 "):
        load("folder", tmp_path)


def test_a_stray_value_in_binary_masks_is_named(tmp_path):
    write_folder(tmp_path, values=(0, 255))
    mask = np.array(Image.open(tmp_path / "masks/05.png"))
    mask[7, 7] = 3
    Image.fromarray(mask).save(tmp_path / "masks/05.png")
    with pytest.raises(InputError, match=r"masks/05.png has the value 3 \(1 pixels\).*classes are 0, 255"):
        load("folder", tmp_path, classes=("road", "crack"))


def test_real_crackforest_pairs_by_suffix_in_any_case():
    source = load("folder", real_data("crackforest"), classes=("road", "crack"))
    assert len(source.splits["train"]) == 19 and len(source.splits["val"]) == 5
    assert all(sample.mask.name == f"{sample.image.stem}_label.PNG" for sample in source.splits["val"])


def test_real_person_photos(tmp_path):
    source = load("folder", real_data("person_sample"), classes=("background", "person"))
    assert len(source.splits["train"]) == 96 and len(source.splits["val"]) == 24
    assert any("43 of 120 masks differ in size" in note for note in source.notes)
    assert source.classes[1] == ("person", (0, 255, 0)) and source.classes[0][1] == (0, 0, 0)
    assert {sample.image.suffix for sample in source.splits["train"]} <= set(IMAGE_ENDINGS)
