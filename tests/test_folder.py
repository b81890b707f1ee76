"""A folder of the user's own: every tree of trees.py, class lists of every form, a fair split."""

import re
import sys

import numpy as np
import pytest
from conftest import load, real_data, refused, write_folder
from PIL import Image
from trees import COLORS, ENCODINGS, PLAIN, TREES, flags_of_training, follow_advice, frames, save

import check_data
import train
from dataio.classes import ADE20K
from dataio.labels import find_modes, read_classes, save_classes, snap
from dataio.layout import NoMasks, find_pairs, list_images, role_of
from dataio.readers import index_table, read_mask
from datasets import check_trainable
from visualize import background_id


# --- every tree -------------------------------------------------------------------------------------------
def prepare(name, tmp_path, run):
    """Write a tree and do what check_data.py tells until it is ready; return (folder, pairs of the tree)."""
    tree, data, clean = TREES[name], tmp_path / "data", tmp_path / "clean"
    data.mkdir()
    pairs = tree.write(data)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    flags = ["--data-root", data, "--out-dir", tmp_path]
    code, text, err = run(check_data, *flags, *(["--fix", clean] if tree.action == "fix" else []))
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    if tree.refused:
        assert code in (1, 2) and "Traceback" not in err
    elif tree.action == "fix":
        assert code == 0 and run(check_data, "--data-root", clean, "--out-dir", tmp_path)[0] == 0
        return clean, [pair._replace(image=clean / "images" / pair.image.name,
                                     mask=clean / f"masks/{pair.image.stem}.png") for pair in pairs]
    elif tree.action:
        assert code == (0 if tree.action in ("first", "second") else 1), text
        follow_advice(data, text, tree.action)
        assert run(check_data, *flags)[0] == 0
    else:
        assert code == 0, text
    return data, pairs


@pytest.mark.parametrize("name", TREES)
def test_every_tree_gives_the_pairs_classes_and_pixels_that_were_drawn(name, tmp_path, run):
    tree, (data, pairs) = TREES[name], prepare(name, tmp_path, run)
    if tree.refused:
        with refused(*tree.refused):
            load("folder", data)
        return
    source = load("folder", data)
    names = [name for name, _ in source.classes]
    assert tree.action == "list" or {*names} == {*tree.classes} - {"ignore"}
    names = np.array(names + ["ignore"] * (256 - len(names)), object)
    splits = {sample.image: (split, sample) for split, samples in source.splits.items() for sample in samples}
    used = [pair for pair in pairs if pair.split is not None]
    assert splits.keys() == {pair.image for pair in used}
    for pair in used:
        split, sample = splits[pair.image]
        assert pair.split in ("", split) and sample.mask == pair.mask
        decoded = names[read_mask(sample.mask, source.table)]
        same = decoded == np.array(tree.classes, object)[pair.ids]
        assert same.all() or tree.lossy and same.mean() > 0.8 and (same | (decoded == "ignore")).mean() > 0.97
    for words in tree.notes:
        assert any(words in note for note in source.notes), source.notes


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, tree in ENCODINGS.items() if not tree.refused])
def test_training_learns_every_class(name, tmp_path, run):
    data, _ = prepare(name, tmp_path, run)
    code, text, err = run(train, *flags_of_training(data, tmp_path / "out"))
    assert code == 0, err
    learned = re.search(r"^per class: (.*)$", text, re.M)[1].split(", ")
    ious = {name: float(iou) for name, iou in (entry.rsplit(" ", 1) for entry in learned)}
    assert {name for name, iou in ious.items() if iou > 0.3} >= {*TREES[name].classes} - {"ignore"}, ious


@pytest.mark.parametrize(("folders", "role"), [
    ("SegmentationObject", ("other", "", ())),
    ("val2017/drive_3/leftImg8bit", ("images", "val", ("2017", "drive", "3"))),
    ("road segmentation/images/test", ("images", "test", ("road",))),
    ("gt_image_2", ("masks", "", ("2",))),
    ("RGBFrames/valid", ("images", "val", ())),
    ("pictures/of/cats", ("images", "", ("cats",))),
])
def test_what_the_names_of_folders_tell(folders, role):
    assert role_of(tuple(folders.split("/")))[:3] == role


def test_panoptic_pictures_of_coco_are_no_masks(tmp_path):
    for number in range(3):
        save(tmp_path / f"train2017/{number}.jpg", np.zeros((40, 50, 3), np.uint8))
        segments = np.full((40, 50, 3), number, np.uint8)
        save(tmp_path / f"annotations/panoptic_train2017/{number}.png", segments)
    (tmp_path / "annotations/instances_train2017.json").write_text("{}")
    with pytest.raises(NoMasks):
        find_pairs(tmp_path)


def test_real_folders():
    source = load("folder", real_data("crackforest"), classes=("road", "crack"))
    assert len(source.splits["train"]) == 19 and len(source.splits["val"]) == 5
    assert all(sample.mask.name == f"{sample.image.stem}_label.PNG" for sample in source.splits["val"])
    source = load("folder", real_data("person_sample"), classes=("background", "person"))
    assert len(source.splits["train"]) == 96 and len(source.splits["val"]) == 24
    assert any("43 of 120" in note for note in source.notes)  # masks of another size than their image
    assert source.classes == [("background", (0, 0, 0)), ("person", (0, 255, 0))]


@pytest.mark.parametrize("dataset", ["folder", "voc", "streets", "camvid"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path, dataset):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with refused("--data-root", "data.zip"):
        load(dataset, tmp_path / "data.zip")


def test_validation_folders_alone_can_be_scored_and_not_trained(tmp_path):
    write_folder(tmp_path / "val", count=3)
    write_folder(tmp_path / "test", count=3)
    source = load("folder", tmp_path)
    assert len(source.splits["val"]) == len(source.splits["test"]) == 3 and not source.splits["train"]
    with refused():
        check_trainable(source)


def test_stacks_of_pages_are_refused_and_previews_are_not(tmp_path):
    write_folder(tmp_path, count=3)
    page = Image.open(tmp_path / "images/00.png").copy()
    (tmp_path / "images/00.png").unlink()
    page.save(tmp_path / "images/00.tif", save_all=True, append_images=[page.resize((30, 22))])
    load("folder", tmp_path)
    page.save(tmp_path / "images/00.tif", save_all=True, append_images=[page])
    with refused("00.tif"):
        load("folder", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_to_folders_are_followed_and_lead_nowhere_twice(tmp_path):
    root, store = tmp_path / "data", tmp_path / "store"
    write_folder(store, count=3)
    write_folder(root / "test", count=2)
    write_folder(root / ".versions", count=2)
    for link, target in {"train/images": store / "images", "train/masks": store / "masks",
                         "val": root / ".versions", "best": root / "test", "test/back": root,
                         "test/images/up": root / "test", "all": tmp_path}.items():
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(target, target_is_directory=True)
    content = find_pairs(root)
    assert {split: len(samples) for split, samples in content.splits.items()} == dict(train=3, val=2, test=2)
    listed = list_images(root)
    assert listed == sorted(listed) and len(listed) == 14 and listed[-1] == root / "val/masks/01.png"
    (root / "train/masks").unlink()
    with refused("images/ holds 3 x .png"):
        find_pairs(root / "train")
    for link, target in (("images", "masks"), ("masks", "images")):  # a loop of two
        (store / link / "other").symlink_to(store / target, target_is_directory=True)
    assert len(list_images(root)) == 14


def test_images_that_exif_turns_to_the_same_size_are_warned_of(tmp_path):
    for number, (orientation, height) in enumerate(((1, 40), (3, 40), (6, 40), (8, 60))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(tmp_path / f"images/{number}.png", np.zeros((height, 60, 3), np.uint8), exif=exif)
        save(tmp_path / f"masks/{number}.png", np.eye(height, 60, dtype=np.uint8))
    note, = [note for note in load("folder", tmp_path).notes if "EXIF" in note]
    assert note.startswith("warning: 2 ") and "images/1.png" in note


# --- splits -----------------------------------------------------------------------------------------------
def numbers_of(samples):
    """Return the numbers at the end of the names of images."""
    return [int(re.search(r"\d+$", sample.image.stem)[0]) for sample in samples]


def test_frames_of_a_clip_are_split_in_blocks_and_folds_score_each_of_them_once(tmp_path):
    frames(tmp_path, step=1)
    numbers = numbers_of(load("folder", tmp_path).splits["val"])
    assert numbers == list(range(numbers[0], numbers[0] + 8))
    scored = []
    for fold in range(1, 5):
        source = load("folder", tmp_path, fold=(fold, 4))
        numbers = numbers_of(source.splits["val"])
        assert numbers == list(range(numbers[0], numbers[0] + 10)) and len(source.splits["train"]) == 30
        scored += numbers
    assert sorted(scored) == list(range(40))


def test_numbered_photos_that_do_not_look_alike_are_not_a_clip(tmp_path):
    PLAIN(tmp_path)
    first, second = numbers_of(load("folder", tmp_path).splits["val"])
    assert abs(first - second) > 1


def test_flags_that_split_have_no_effect_beside_a_validation_folder(tmp_path):
    write_folder(tmp_path / "train", count=6)
    write_folder(tmp_path / "val", count=2)
    with refused("--fold", "--resplit"):
        load("folder", tmp_path, fold=(1, 4))
    assert len(load("folder", tmp_path, fold=(1, 4), resplit=True).splits["val"]) == 2
    for fraction, warned in ((0.2, False), (0.4, True), (0, False)):  # 0.2 is the default, 0 for scoring
        source = load("folder", tmp_path, val_fraction=fraction)
        assert len(source.splits["val"]) == 2
        assert any("warning" in note and "--val-fraction" in note for note in source.notes) == warned


# --- class lists ------------------------------------------------------------------------------------------
COLOR_LIST = [("ground", (0, 0, 0), None), ("roof", (200, 30, 30), None)]
VALUE_LIST = [("ground", None, 0), ("roof", None, 7)]


@pytest.mark.parametrize(("text", "entries"), [
    ("name,r,g,b\nground,0,0,0\nroof,200,30,30\n", COLOR_LIST),
    ("ground;0;0;0\nroof;200;30;30\n", COLOR_LIST),
    ("r,g,b,class\n0,0,0,ground\n200,30,30,roof\n", COLOR_LIST),
    ('Name, R, G, B\n"ground", 0, 0, 0\n# comment\n"roof", 200, 30, 30\n', COLOR_LIST),
    ("ground 0 0 0\nroof 200 30 30\n", COLOR_LIST),
    ("0 0 0\tground\n200 30 30\troof\n", COLOR_LIST),
    ("name,r,g,b\nground,0,0,0\nroof,200,30,30\n,,,\n", COLOR_LIST),
    ("id\tname\tred\tgreen\tblue\n0\tground\t0\t0\t0\n7\troof\t200\t30\t30\n",
     [("ground", (0, 0, 0), 0), ("roof", (200, 30, 30), 7)]),
    ("0 ground 0 0 0\n7 roof 200 30 30\n", [("ground", (0, 0, 0), 0), ("roof", (200, 30, 30), 7)]),
    ("Pixel Value, Class\n0, ground\n7, roof\n", VALUE_LIST),
    ("0: ground\n7: roof\n", VALUE_LIST),
    ("0 ground\n7 roof\n", VALUE_LIST),
    ("0. ground\n7. roof\n", VALUE_LIST),
    ("ground,0\nroof,7\n", VALUE_LIST),
    ("ground = 0\nroof = 7\n", VALUE_LIST),
    ("0.0,ground\n7.0,roof\n", VALUE_LIST),
    ("name,id,area\nground,0,7\nroof,7,9\n", VALUE_LIST),
    ("sea = 1 3\nIgnore = 0\nland = 2\n",
     [("sea", None, 1), ("sea", None, 3), ("ignore", None, 0), ("land", None, 2)]),
    ("id,name\n-1,ignore\n0,ground\n7,roof\n", [("ignore", None, -1), *VALUE_LIST]),
    ("-1 ignore\n0 ground\n7 roof\n", [("ignore", None, -1), *VALUE_LIST]),
    ("ground = 0\nroof = 7\n_Ignore_ = -1 -9999\n",
     [*VALUE_LIST, ("ignore", None, -1), ("ignore", None, -9999)]),
    ("sea\nland\nignore = -9999\n", [("sea", None, None), ("land", None, None), ("ignore", None, -9999)]),
    ("__ignore__\n_background_\nland\n",  # labelme's list counts from -1
     [("_background_", None, None), ("land", None, None), ("ignore", None, -1)]),
    ("_background_\n__ignore__\nland\n",  # a line like others
     [("_background_", None, None), ("ignore", None, None), ("land", None, None)]),
    ("ignore\nbackground\nland\n",
     [("ignore", None, None), ("background", None, None), ("land", None, None)]),
    ("__ignore__ 1 1 1\nground 0 0 0\nroof 200 30 30\n", [("ignore", (1, 1, 1), None), *COLOR_LIST]),
    ("class\nbackground\ncat\n", [("background", None, None), ("cat", None, None)]),
    ("road\ntraffic light 1 2 3\n\ntree\n",
     [("road", None, None), ("traffic light", (1, 2, 3), None), ("tree", None, None)]),
    ("wall, outer\nwall, inner\n3d print\n",
     [("wall, outer", None, None), ("wall, inner", None, None), ("3d print", None, None)]),
    (f"road,{'x' * 200_000}\ncar,2\n",  # more than csv takes for a cell
     [(f"road,{'x' * 200_000}", None, None), ("car,2", None, None)]),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_forms_of_class_lists(tmp_path, text, entries):
    (tmp_path / "classes.csv").write_text(text, encoding="utf-8-sig")
    assert [tuple(entry) for entry in read_classes(tmp_path / "classes.csv")] == entries


@pytest.mark.parametrize(("text", "words"), [
    ("one\n", "1"), ("", "0"), ("a\na\n", "1"), (b"\xff\xfe\x00", "UTF-8"),
    ("a 1 2 3\nb 300 0 0\n", "b needs"), ("name,r,g,b\nground,0,0,0\nroof,300,30,30\n", "roof"),
    ("a = 1\nb\n", "VALUE"), ("a = 1\nb = 1\n", "value 1"), ("a = 1\nb = x\n", "b needs"),
    ("a = 1\nb =\n", "b needs"), ("a = 70000\nb = 1\n", "a needs"),
    ("name,id\na,1\nb,99999999999\n", "b needs"),
    ("a = 1\nb = -40000\n", "b needs"), ("a -1 2 3\nb 1 2 3\n", "a needs"), ("a\nb\nignore = 1\n", "VALUE"),
    ("a\nignore = 255\nb\n", "VALUE"), ("a\nb\nc = 7\n", "VALUE"),
    ("a 1 2 3\nb 1 2 3\n", "(1, 2, 3)"), ("name,id,trainId\nroad,7,0\ncar,26,13\n", "2 columns"),
])
def test_bad_classes_txt_is_named(tmp_path, text, words):
    write_folder(tmp_path, count=2)
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused("classes.txt", words):
        load("folder", tmp_path)


@pytest.mark.parametrize("text", [
    "", "[]", "3", '["road", "car"]', '[{"name": "road"}]', "[" * 100_000,
    '[{"name": "a", "color": "#ffff"}]',
    '[{"name": "a", "color": "red"}]', '[{"name": "a", "color": [1, 2, 3]}]',
    '[{"name": "a", "color": "#000001", "png_index": [1]}]',
    '[{"name": "a", "color": "#000001", "png_index": 1.5}]',
    '[{"name": "a", "color": "#000001"}, {"name": "b", "color": "#000001"}]',
])
def test_bad_classes_json_is_named(tmp_path, text):
    write_folder(tmp_path, count=2)
    (tmp_path / "classes.json").write_text(text)
    with refused("classes.json"):
        load("folder", tmp_path)


def test_tables_of_classes_that_differ_are_not_guessed_and_names_are_given_once(tmp_path):
    write_folder(tmp_path / "city", values=(0, 1))
    (tmp_path / "city/a_classes.csv").write_text("name,id\nroad,0\ncar,1\n")
    (tmp_path / "city/b_classes.csv").write_text("name,id\nroad,1\ncar,0\n")
    with refused("a_classes.csv", "b_classes.csv"):
        load("folder", tmp_path)
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    with refused("--classes", "classes.txt"):
        load("folder", tmp_path, classes=("road", "car"))


@pytest.mark.parametrize("names", [("only",), ("ignore",), ("a", "ignore"), [f"c{id}" for id in range(251)]])
def test_names_of_the_command_line_are_two_to_250(tmp_path, names):
    write_folder(tmp_path, count=3, values=(0, 1))
    with refused("--classes"):
        load("folder", tmp_path, classes=tuple(names))


@pytest.mark.parametrize(("text", "table"), [
    ("road\ncar\nroad\nignore\n", [0, 1, 0, 255, 254, 255]),
    ("a = 1\nb = 0 2\nignore = 3\n", [1, 0, 1, 255, 254, 255]),
    ("road\nignore\ncar\ntree\n", [0, 255, 1, 2, 254, 255]),  # 255 beside 1
    ("__ignore__\n_background_\na\nb\nc\n", [0, 1, 2, 3, 254, 255]),
    ("a\nb\nc\nd\nignore = -1 4\n", [0, 1, 2, 3, 255, 255]),
])
def test_the_table_holds_what_the_list_names_255_and_nothing_else(tmp_path, text, table):
    write_folder(tmp_path, values=(0, 1, 2, 3))
    (tmp_path / "classes.txt").write_text(text)
    found = load("folder", tmp_path).table
    assert found[[0, 1, 2, 3, 4, 255]].tolist() == table
    assert found[-1] == (255 if "-1" in text or "__" in text else 254) and found[65535] == 254


@pytest.mark.parametrize("names", [("ignore", "a", "b"), ("__ignore__", "_background_", "a", "b")])
def test_names_of_the_command_line_are_those_of_a_list(tmp_path, names):
    source = load("folder", write_folder(tmp_path), classes=names)
    assert [name for name, _ in source.classes] == [name for name in names if "ignore" not in name]
    assert source.table[:3].tolist() == ([255, 0, 1] if names[0] == "ignore" else [0, 1, 2])


@pytest.mark.parametrize("name", ["background", "_background_", "__Background__"])
def test_a_background_is_one_under_the_names_of_the_tools(tmp_path, name):
    source = load("folder", write_folder(tmp_path), classes=("road", name, "car"))
    assert background_id(source.classes) == 1 and source.classes[1] == (name, (0, 0, 0))
    without = load("folder", tmp_path, classes=("road", name, "car"), ignore_background=True)
    assert [name for name, _ in without.classes] == ["road", "car"]
    assert without.table[:3].tolist() == [0, 255, 1]


@pytest.mark.parametrize("names", [
    ("#1 defect", "# two"), ("3 roof", "7 road"), ("a=b", "c = 4"), ("wall\tfloor", "x"), ("1", "2"),
    ("3.0 mm", "#"), ("ignore", "__ignore__", "background"), ("", " ", "a"), ("name", "class"),
    ("a;b", "c;d"), ("wall, outer", '"wall", inner'), ("a  b", " a b", "a b"), ("roof 1 2 3", "1 2 3 roof"),
    ("a\nb", "a b", "\udcff"), ("\ufeffa", "b;c", "d:e"),
], ids=ascii)
def test_a_class_list_is_read_as_it_was_written(tmp_path, names, capsys):
    classes = [(name, (10 * id, 0, 9)) for id, name in enumerate(names)]
    save_classes(classes, tmp_path)
    entries, printed = read_classes(tmp_path / "classes.txt"), capsys.readouterr().out
    entries = [entry for entry in entries if entry != ("ignore", None, 255)]
    assert [entry.color for entry in entries] == [color for _, color in classes]
    assert len({entry.name for entry in entries}) == len(names)
    for name, entry in zip(names, entries, strict=True):
        can_be = name.isprintable() and name == name.strip() and name.strip("_") not in ("", "ignore")
        assert (entry.name == name) == (repr(name) not in printed) and (entry.name == name or not can_be)


def test_class_lists_of_odd_characters_and_equal_colors_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(300):
        names = ["".join(rng.choice(list("aB1 0.5-=#,;:\t\"'_é\n"), rng.integers(1, 7)))
                 for _ in range(rng.integers(2, 6))]
        names = list(dict.fromkeys(names))
        colors = rng.integers(0, 3 if rng.random() < 0.3 else 256, (len(names), 3)).tolist()
        if len(names) < 2:
            continue
        save_classes(list(zip(names, colors, strict=True)), tmp_path)
        read = [entry.name for entry in read_classes(tmp_path / "classes.txt") if entry.name != "ignore"]
        for name, stored in zip(names, read, strict=True):
            assert stored == name or "\n" in name or "\t" in name or name != name.strip(), (names, read)
    save_classes(ADE20K, tmp_path)
    assert [entry.name for entry in read_classes(tmp_path / "classes.txt")] == [name for name, _ in ADE20K]


# --- masks that do not fit --------------------------------------------------------------------------------
def test_a_value_or_color_that_is_not_listed_is_named(tmp_path):
    write_folder(tmp_path, values=(0, 255))
    mask = np.array(Image.open(tmp_path / "masks/05.png"))
    mask[7, 7] = 3
    Image.fromarray(mask).save(tmp_path / "masks/05.png")
    with refused("masks/05.png", " 3 "):
        load("folder", tmp_path, classes=("road", "crack"))
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(COLORS[np.array(Image.open(path)) // 255]).save(path)
    (tmp_path / "classes.txt").write_text("ground 0 0 0\nroof 200 30 30\n")
    colors = np.array(Image.open(tmp_path / "masks/02.png"))
    colors[3, 4:7] = 205, 31, 30
    Image.fromarray(colors).save(tmp_path / "masks/02.png")
    with refused("masks/02.png", "(205, 31, 30) (3 ", "roof (200, 30, 30)"):
        load("folder", tmp_path)


def test_masks_of_a_single_class_do_not_train(tmp_path):
    write_folder(tmp_path, values=(0, 255))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    with refused("sky", "check_data.py"):
        check_trainable(load("folder", tmp_path))


@pytest.mark.parametrize("array", [np.zeros((0, 5)), np.full((4, 5), np.nan), np.full((4, 5), -1),
                                   np.full((4, 5), 0.5), np.full((4, 5), 1e9), np.full((4, 5, 3), -1),
                                   np.full((4, 5), 1j), np.array([["a"]]), np.array([[{}]])], ids=str)
def test_arrays_that_are_not_masks_are_named(tmp_path, array):
    np.save(tmp_path / "mask.npy", array, allow_pickle=True)
    with refused("mask.npy"):
        read_mask(tmp_path / "mask.npy", index_table(3))


@pytest.mark.parametrize(("array", "words"), [
    (np.array([[0, 1, 65436]]), ("65436",)),  # -100, where values are taken for 16 bit
    (np.array([[0, 1, -9]]), ("-9",)), (np.array([[0, 1, -32769]]), ("-32769",)),
    (np.array([[0, 1, 0.5]]), ("0.5",)), (np.array([[0, 1, 70000]]), ("70000",)),
])
def test_what_is_named_as_no_data_is_ignored_and_nothing_near_it(tmp_path, array, words):
    write_folder(tmp_path, count=3, values=(0, 1))
    for path in (tmp_path / "masks").iterdir():
        np.save(path.with_suffix(".npy"), np.array(Image.open(path)).astype(float))
        path.unlink()
    (tmp_path / "classes.txt").write_text("road\ncar\nignore = -100\n")
    mask = np.load(tmp_path / "masks/01.npy")
    mask[3, 4:7] = [0, -100, np.nan]
    np.save(tmp_path / "masks/01.npy", mask)
    source = load("folder", tmp_path)
    assert read_mask(tmp_path / "masks/01.npy", source.table)[3, 4:7].tolist() == [0, 255, 255]
    mask[3, 4:7] = array
    np.save(tmp_path / "masks/01.npy", mask)
    with refused("01.npy", *words):
        load("folder", tmp_path)
    with refused("01.npy", *words):
        read_mask(tmp_path / "masks/01.npy", source.table)


def test_a_rare_value_of_blurred_masks_is_a_mode_and_noise_is_not():
    noise = {value: 30 for value in range(1, 25)} | {value: 30 for value in range(231, 255)}
    pixels = {0: 900_000, 255: 99_000, 128: 900, **noise}
    assert sorted(find_modes(np.array(list(pixels)), np.array(list(pixels.values())), False)) == [0, 128, 255]
    snapped = snap(pixels, False)
    assert snapped[20] is None and snapped[5] == 0 and snapped[250] == 255 and snapped[128] == 128
    assert not snap({0: 900, 1: 900, 2: 900}, False)  # too near to one another
    assert not snap(dict.fromkeys(range(256), 100), False)  # a photo
