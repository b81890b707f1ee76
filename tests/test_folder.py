"""A folder of the user's own: every layout, every kind of classes, and a fair split."""

import numpy as np
import pytest
from conftest import blocks, load, real_data, write_folder, write_pair, write_tree
from PIL import Image
from test_scan import photo

from config import InputError
from dataio.labels import decide_classes, find_modes, read_classes, snap
from dataio.layout import place_of
from dataio.readers import IMAGE_ENDINGS, index_table, read_mask
from datasets import check_trainable

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
    assert [name for name, _ in source.classes] == ["background", "class 1", "class 2"]


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
        ("one\n", "names 1 class;"),
        ("a 1 2 3\nb 300 0 0\n", "line 2"),
        ("", "0 classes"),
        ("a = 1\nb\n", "on some lines only"),
        ("a = 1\nb = 1\n", "value 1 twice"),
        ("a = 1\nb = x\n", "line 2: write `name = VALUE`"),
        ("a = 70000\nb = 1\n", "line 1: write `name = VALUE`"),
        ("a\na\n", "names 1 class;"),
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


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32, "(1, H, W)", "(H, W, 1)"], ids=str)
def test_masks_as_numpy_arrays_are_read_as_their_pictures_are(tmp_path, kind):
    values = (0, 1) if kind is bool else (0, 1, 2)
    for root in (tmp_path / "pictures", tmp_path / "arrays"):
        write_folder(root, values=values)
    for path in (tmp_path / "arrays/masks").iterdir():
        mask = np.array(Image.open(path))
        if isinstance(kind, type):
            mask = mask.astype(kind)
        else:
            mask = mask[None] if kind[1] == "1" else mask[..., None]
        np.save(path.with_suffix(".npy"), mask)
        path.unlink()
    pictures, arrays = (load("folder", tmp_path / name) for name in ("pictures", "arrays"))
    assert arrays.classes == pictures.classes
    for ours, theirs in zip(arrays.splits["train"], pictures.splits["train"], strict=True):
        assert ours.mask.suffix == ".npy" and (read_mask(ours.mask, arrays.table)
                                               == read_mask(theirs.mask, pictures.table)).all()


@pytest.mark.parametrize(("content", "says"), [
    (np.zeros((4, 5, 2)), r"an array of the shape \(4, 5, 2\)"), (np.zeros((0, 5)), "shape"),
    (np.full((4, 5), 0.5), "does not hold integers"), (np.full((4, 5), np.nan), "does not hold integers"),
    (np.full((4, 5), -1), "does not hold integers"), (np.array([["a"]]), "does not hold integers"),
    (b"no array", "not a readable array"), (np.array([[{}]]), "not a readable array")], ids=str)
def test_arrays_that_are_no_masks_are_one_line(tmp_path, content, says):
    path = tmp_path / "mask.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=f"mask.npy .*{says}"):
        read_mask(path, index_table(3))


# --- layouts ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("folders", "place"),
    [
        ("SegmentationClassPNG", ("masks", "", ())),
        ("SegmentationObject", ("other", "", ())),
        ("Training_Images", ("images", "train", ())),
        ("val2017/drive_3/leftImg8bit", ("images", "val", ("2017", "drive", "3"))),
        ("road segmentation/images/test", ("images", "test", ("road",))),
        ("gt_image_2", ("masks", "", ("2",))),
        ("RGBFrames/valid", ("images", "val", ())),
        ("pictures/of/cats", ("images", "", ("cats",))),
    ],
)
def test_what_the_names_of_folders_say(folders, place):
    assert place_of(folders.split("/"))[:3] == place


def test_overlays_and_instances_beside_the_masks_are_named_as_unused(tmp_path):
    write_folder(tmp_path, count=6)
    for name in ("masks_overlay", "instances"):
        for number in range(6):
            write_pair(
                tmp_path / name / f"{number:02d}.png", tmp_path / "x.png", np.zeros((9, 9), np.uint8), number
            )
    (tmp_path / "x.png").unlink()
    source = load("folder", tmp_path)
    assert "images: images (6); masks: masks (6)" in source.notes
    assert "not used: instances (6), masks_overlay (6)" in source.notes


def test_two_folders_of_masks_for_the_same_images_are_not_guessed(tmp_path):
    write_folder(tmp_path, count=4)
    (tmp_path / "labels").mkdir()
    Image.new("L", (61, 45)).save(tmp_path / "labels/00.png")
    with pytest.raises(InputError, match="/labels and .*/masks both hold 00: move one of these folders away"):
        load("folder", tmp_path)


def test_folders_of_scenes_with_equal_file_names_pair_within_each(tmp_path):
    for scene in ("north", "south"):
        for number in range(3):
            mask = blocks(20, 30, (0, 1, 2), seed=number + len(scene) * (scene == "south"))
            write_pair(
                tmp_path / scene / f"images/{number}.png", tmp_path / scene / f"masks/{number}.png", mask
            )
    pairs = [sample for part in load("folder", tmp_path).splits.values() for sample in part]
    assert len(pairs) == 6 and all(pair.image.parent.parent == pair.mask.parent.parent for pair in pairs)


@pytest.mark.parametrize("entry", ["{}", "{}.png", "images/{}.png", "./images/{}.png masks/{}.png"])
def test_lists_of_names_and_paths_decide_the_split(tmp_path, entry):
    write_folder(tmp_path, count=7)
    for name, numbers in (("train", range(4)), ("val", (4, 5))):
        lines = [entry.format(f"{number:02d}", f"{number:02d}") for number in numbers]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    source = load("folder", tmp_path)
    assert [sample.image.stem for sample in source.splits["val"]] == ["04", "05"]
    assert [sample.image.stem for sample in source.splits["train"]] == ["00", "01", "02", "03"]
    assert "split as train.txt, val.txt say; 1 pair on none of them: not used" in source.notes


def test_lists_that_do_not_fit_are_errors_and_lists_that_are_not_read_are_named(tmp_path):
    write_folder(tmp_path / "a", count=4)
    (tmp_path / "a/train.txt").write_text("00\nnothing\n")
    with pytest.raises(InputError, match="train.txt lists nothing, and there is no image of that name"):
        load("folder", tmp_path / "a")
    (tmp_path / "a/train.txt").rename(tmp_path / "a/val.txt")
    assert "not used: val.txt (none lists images to train on)" in load("folder", tmp_path / "a").notes


@pytest.mark.parametrize("dataset", ["folder", "voc", "streets", "camvid"])
def test_a_file_in_place_of_the_folder_is_named_as_such(tmp_path, dataset):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="data.zip is a file: give the folder"):
        load(dataset, tmp_path / "data.zip")


def test_validation_folders_alone_can_be_scored_and_not_trained(tmp_path):
    write_folder(tmp_path / "val", count=3)
    write_folder(tmp_path / "test", count=3)
    source = load("folder", tmp_path)
    assert len(source.splits["val"]) == len(source.splits["test"]) == 3 and not source.splits["train"]
    with pytest.raises(InputError, match="no training image of its own"):
        check_trainable(source)


def test_another_folder_that_looks_like_masks_is_warned_of(tmp_path):
    write_folder(tmp_path, count=4)
    (tmp_path / "masks").rename(tmp_path / "drawn")
    for number in range(4):  # the camera's field of view, as in sets of retinas
        (tmp_path / "mask").mkdir(exist_ok=True)
        Image.fromarray(blocks(45, 61, (0, 1))).save(tmp_path / f"mask/{number:02d}.png")
    assert any(
        note.startswith("warning: drawn is not used and looks like masks too")
        for note in load("folder", tmp_path).notes
    )


def test_lists_name_images_by_their_folders_where_names_alone_do_not_tell(tmp_path):
    for scene in ("seq1", "seq2"):
        for number in range(4):
            paths = [tmp_path / scene / part / f"{number:03d}.png" for part in ("Images", "Labels")]
            write_pair(*paths, blocks(20, 30, (0, 1, 2), seed=number))
    (tmp_path / "train.txt").write_text("seq2/000\nseq1/Images/001.png\nseq2/002\n")
    (tmp_path / "val.txt").write_text("/data/home/seq1/003\n")
    splits = load("folder", tmp_path).splits
    named = [f"{sample.image.parent.parent.name} {sample.image.stem}" for sample in splits["train"]]
    assert named == ["seq2 000", "seq1 001", "seq2 002"] and "seq1" in str(splits["val"][0].image)
    (tmp_path / "val.txt").write_text("003\n")
    with pytest.raises(InputError, match="val.txt lists 003, and .*003.png and .*003.png have that name"):
        load("folder", tmp_path)


def test_several_lists_of_one_part_and_lists_of_something_else(tmp_path):
    write_folder(tmp_path, count=6)
    (tmp_path / "train_log.txt").write_text("epoch 1 loss 0.3\n")
    assert any("not used: train_log.txt" in note for note in load("folder", tmp_path).notes)
    (tmp_path / "train.txt").write_text("00\n01\n02\n03\n")
    (tmp_path / "val.txt").write_text("04\n")
    assert (
        "split as train.txt, val.txt say; 1 pair on none of them: not used" in load("folder", tmp_path).notes
    )
    for name in ("train.txt", "train_log.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "train_fold1.txt").write_text("00\n")
    (tmp_path / "train_fold2.txt").write_text("01\n")
    with pytest.raises(InputError, match="train_fold1.txt and .*train_fold2.txt both list train images"):
        load("folder", tmp_path)


def test_a_list_of_two_parts_is_no_training_list_and_two_of_one_part_are_refused(tmp_path):
    write_folder(tmp_path, count=6)
    (tmp_path / "train_val.txt").write_text("00\n01\n02\n")
    assert "not used: train_val.txt (none lists images to train on)" in load("folder", tmp_path).notes
    for name in ("train.txt", "splits/train.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("00\n")
    with pytest.raises(InputError, match="/train.txt and .*splits/train.txt both list train images"):
        load("folder", tmp_path)


def test_masks_that_differ_only_in_words_of_all_are_not_dropped(tmp_path):
    for number in range(4):
        write_pair(
            tmp_path / f"images/a_{number}_x.png", tmp_path / f"masks/b_{number}.png", blocks(9, 9, (0, 1))
        )
    Image.new("L", (9, 9)).save(tmp_path / "masks/b-3.png")  # beside b_3.png
    with pytest.raises(InputError, match="images are called a_0_x.png"):
        load("folder", tmp_path)


def test_images_of_a_contest_without_masks_are_left_out_and_said(tmp_path):
    write_folder(tmp_path / "train", count=5)
    (tmp_path / "test/images").mkdir(parents=True)
    Image.fromarray(photo(0)).save(tmp_path / "test/images/x.png")
    source = load("folder", tmp_path)
    assert "test" not in source.splits and "not used: 1 image of test, without any mask" in source.notes


def test_pairs_beside_a_validation_folder_train(tmp_path):
    write_folder(tmp_path, count=4)
    write_folder(tmp_path / "val", count=2)
    source = load("folder", tmp_path)
    assert (len(source.splits["train"]), len(source.splits["val"])) == (4, 2)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("train-org-img/{}.jpg", "train-label-img/{}_lab.png"),
        ("camera/2018_camera_{}.png", "label_new/2018_label_{}.png"),
        ("all/{}_sat.jpg", "all/{}_mask.png"),
        ("all/{}.jpg", "all/{}.png"),
        ("images/images/{}.jpg", "semantic_masks/images/{}.png"),
        ("images/{}_training.png", "1st_manual/{}_manual1.gif"),
    ],
)
def test_more_layouts_of_public_data_sets(tmp_path, image, mask):
    for number in range(6):
        write_pair(
            tmp_path / image.format(number), tmp_path / "m.png", blocks(20, 30, (0, 1, 2), seed=number)
        )
        Image.fromarray(photo(number, (45, 61))).save(tmp_path / image.format(number))
        (tmp_path / mask.format(number)).parent.mkdir(parents=True, exist_ok=True)
        Image.open(tmp_path / "m.png").save(tmp_path / mask.format(number))
    (tmp_path / "m.png").unlink()
    pairs = {pair for part in load("folder", tmp_path).splits.values() for pair in part}
    assert pairs == {(tmp_path / image.format(number), tmp_path / mask.format(number)) for number in range(6)}


def test_another_drawing_of_the_same_masks_is_not_a_mask_without_image(tmp_path):
    write_folder(tmp_path, count=4)
    for number in range(4):
        Image.new("RGB", (61, 45)).save(tmp_path / f"masks/{number:02d}_color.png")
    assert "not used: masks (4)" in load("folder", tmp_path).notes


# --- sequences --------------------------------------------------------------------------------------------
def write_frames(root, count, step, name="frame_{:04d}"):
    """Write frames of a window that moves `step` pixels per frame over a wide photo."""
    wide, mask = photo(5, (60, 80 + step * count)), blocks(60, 80, (0, 1, 2), seed=1)
    for number in range(count):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        window = np.ascontiguousarray(wide[:, number * step : number * step + 80])
        Image.fromarray(window).save(root / "images" / f"{name.format(number)}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name.format(number)}.png")
    return root


def test_folds_of_a_clip_are_blocks_that_score_every_frame_once(tmp_path):
    root, seen = write_frames(tmp_path, 40, 2), []
    for number in range(1, 5):
        source = load("folder", root, fold=(number, 4))
        frames = [int(sample.image.stem[-4:]) for sample in source.splits["val"]]
        assert frames == list(range(frames[0], frames[0] + 10))  # ten in a row
        assert len(source.splits["train"]) == 30 and f"fold {number} of 4, strat" in " ".join(source.notes)
        seen += frames
    assert sorted(seen) == list(range(40))
    (root / "val/images").mkdir(parents=True)
    (root / "val/masks").mkdir()
    for kind in ("images", "masks"):
        (root / kind).rename(root / f"train_{kind}")
        path = root / f"train_{kind}" / "frame_0039.png"
        path.rename(root / f"val/{kind}" / path.name)
    (root / "train").mkdir()
    for kind in ("images", "masks"):
        (root / f"train_{kind}").rename(root / "train" / kind)
    with pytest.raises(InputError, match="--fold has no effect, .* has a validation part: add --resplit"):
        load("folder", root, fold=(1, 4))
    for fraction, warned in ((0.2, False), (0.4, True), (0, False)):  # 0.2 is the default, 0 for scoring
        notes = " ".join(load("folder", root, val_fraction=fraction).notes)
        assert ("warning: --val-fraction has no effect" in notes) == warned


def test_frames_of_a_clip_are_split_in_blocks(tmp_path):
    source = load("folder", write_frames(tmp_path, 40, 2))
    numbers = [int(sample.image.stem[-4:]) for sample in source.splits["val"]]
    assert len(numbers) == 8 and numbers == list(range(numbers[0], numbers[0] + 8))
    assert any(
        "8 of 40 images validate, stratified by blocks of consecutive" in note for note in source.notes
    )


def test_numbered_photos_that_do_not_look_alike_are_no_clip(tmp_path):
    source = load("folder", write_frames(tmp_path, 12, 80))
    assert any("stratified" in note and "blocks" not in note for note in source.notes)


# --- classes of all kinds ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "name,r,g,b\nground,0,0,0\nroof,200,30,30\n",
        "ground;0;0;0\nroof;200;30;30\n",
        "r,g,b,class\n0,0,0,ground\n200,30,30,roof\n",
        "id\tname\tred\tgreen\tblue\n0\tground\t0\t0\t0\n1\troof\t200\t30\t30\n",
        'Name, R, G, B\n"ground", 0, 0, 0\n# comment\n"roof", 200, 30, 30\n',
        "ground 0 0 0\nroof 200 30 30\n",
    ],
)
def test_tables_of_colors_with_and_without_header(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    entries = read_classes(tmp_path / "classes.txt")
    assert [(entry.name, entry.color) for entry in entries] == [
        ("ground", (0, 0, 0)),
        ("roof", (200, 30, 30)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Pixel Value, Class\n0, ground\n7, roof\n",
        "0: ground\n7: roof\n",
        "0 ground\n7 roof\n",
        "ground,0\nroof,7\n",
        "ground = 0\nroof = 7\n",
    ],
)
def test_tables_of_values(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    entries = read_classes(tmp_path / "classes.txt")
    assert [(entry.name, entry.value) for entry in entries] == [("ground", 0), ("roof", 7)]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("class\nbackground\ncat\n", [("background", None, None), ("cat", None, None)]),
        ("1.0,road\n2.0,car\n", [("road", None, 1), ("car", None, 2)]),
        ("name,id,area\ncar,2,7\nroad,0,9\n", [("car", None, 2), ("road", None, 0)]),
        (
            "128 64 128\troad\n0 0 0\tvoid area\n",
            [("road", (128, 64, 128), None), ("void area", (0, 0, 0), None)],
        ),
        ("0 void 0 0 0\n1 dirt 108 64 20\n", [("void", (0, 0, 0), 0), ("dirt", (108, 64, 20), 1)]),
        ("1. sky\n2. road\n", [("sky", None, 1), ("road", None, 2)]),
        ("name,r,g,b\nsky,1,2,3\nroad,4,5,6\n,,,\n", [("sky", (1, 2, 3), None), ("road", (4, 5, 6), None)]),
    ],
)
def test_more_forms_of_class_lists(tmp_path, text, entries):
    (tmp_path / "classes.csv").write_text(text)
    assert [tuple(entry) for entry in read_classes(tmp_path / "classes.csv")] == entries


def test_two_columns_of_values_are_not_guessed_and_a_table_deeper_down_is_found(tmp_path):
    (tmp_path / "classes.csv").write_text("name,id,trainId\nroad,7,0\ncar,26,13\n")
    with pytest.raises(InputError, match="several columns of numbers .id and trainid.: leave the one"):
        read_classes(tmp_path / "classes.csv")
    write_folder(tmp_path / "city", values=(0, 1))
    (tmp_path / "classes.csv").rename(tmp_path / "city/label_class_dict.csv")
    (tmp_path / "city/label_class_dict.csv").write_text("name,r,g,b\nroad,0,0,0\ncar,9,9,9\n")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["road", "car"]
    assert any("the classes are those of" in note for note in source.notes)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_gray_masks_are_read_by_the_gray_colors_that_are_listed(tmp_path, mode):
    write_folder(tmp_path, values=(0, 1))
    drawn = {}
    for path in (tmp_path / "masks").iterdir():
        drawn[path.stem] = np.array(Image.open(path))
        Image.fromarray(drawn[path.stem] * 255).convert(mode).save(path)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,255,255,255\nbackground,0,0,0\n")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["road", "background"]
    for pair in source.splits["train"]:
        assert (read_mask(pair.mask, source.table) == 1 - drawn[pair.mask.stem]).all()


def test_stacks_of_pages_are_refused_and_previews_are_not(tmp_path):
    write_folder(tmp_path, count=3)
    page = Image.fromarray(photo(0, (45, 61)))
    (tmp_path / "images/00.png").unlink()
    page.save(tmp_path / "images/00.tif", save_all=True, append_images=[page.resize((30, 22))])
    load("folder", tmp_path)
    page.save(tmp_path / "images/00.tif", save_all=True, append_images=[page])
    with pytest.raises(InputError, match="00.tif holds several pages"):
        load("folder", tmp_path)


def test_what_is_no_table_is_read_as_lines_and_scores_are_no_class_list(tmp_path):
    (tmp_path / "classes.txt").write_text(f"road,{'x' * 200_000}\ncar,2\n")  # more than csv takes for a cell
    assert [entry.name[:5] for entry in read_classes(tmp_path / "classes.txt")] == ["road,", "car,2"]
    (tmp_path / "classes.txt").unlink()
    write_folder(tmp_path)
    (tmp_path / "outputs/evaluation").mkdir(parents=True)
    (tmp_path / "outputs/evaluation/per_class.csv").write_text("name,pixels\ncat,5\ndog,6\n")
    assert [name for name, _ in load("folder", tmp_path).classes] == ["background", "class 1", "class 2"]


def test_names_with_commas_and_digits_are_names(tmp_path):
    (tmp_path / "classes.txt").write_text("wall, outer\nwall, inner\n3d print\n")
    assert [entry[0] for entry in read_classes(tmp_path / "classes.txt")] == [
        "wall, outer",
        "wall, inner",
        "3d print",
    ]
    (tmp_path / "classes.txt").write_text("name,r,g,b\nground,0,0,0\nroof,300,30,30\n")
    with pytest.raises(InputError, match="roof needs a name, a color of 0..255"):
        read_classes(tmp_path / "classes.txt")


def test_masks_with_one_class_do_not_train_and_the_line_says_where_to_look(tmp_path):
    write_folder(tmp_path, values=(0, 255))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    source = load("folder", tmp_path)
    assert any(
        "% of the pixels are ignored; python check_data.py --data-root" in note for note in source.notes
    )
    with pytest.raises(
        InputError, match="all pixels of the 6 training masks that count are sky.*check_data.py"
    ):
        check_trainable(source)


def test_painted_masks_of_a_registered_data_set_name_the_folder_data_set(tmp_path):
    write_tree("aeroscapes", tmp_path)
    for path in (tmp_path / "SegmentationClass").iterdir():
        colors = np.array([(0, 0, 0), (200, 30, 30)], np.uint8)
        Image.fromarray(colors[np.array(Image.open(path)) % 2]).save(path)
    with pytest.raises(
        InputError, match="painted in colors.*--dataset aeroscapes needs.*give --dataset folder"
    ):
        load("aeroscapes", tmp_path)


# --- masks that a lossy format blurred --------------------------------------------------------------------
def as_jpeg(root, values, quality=75):
    """Store the masks of a folder as JPEG files of these values; return {stem: the class ids they had}."""
    ids = {}
    for path in list((root / "masks").iterdir()):
        ids[path.stem] = np.array(Image.open(path))
        Image.fromarray(np.array(values, np.uint8)[ids[path.stem]]).save(
            path.with_suffix(".jpg"), quality=quality
        )
        path.unlink()
    return ids


@pytest.mark.parametrize("values", [(0, 255), (0, 85, 170)])
def test_jpeg_masks_come_out_as_they_were_drawn(tmp_path, values):
    write_folder(tmp_path, values=range(len(values)), size=(90, 122))
    drawn = as_jpeg(tmp_path, values)
    if len(values) > 2:
        (tmp_path / "classes.txt").write_text("a = 0\nb = 85\nc = 170\n")
    source = load("folder", tmp_path)
    assert any("% of the pixels snapped to 0, " in note for note in source.notes)
    for sample in [*source.splits["train"], *source.splits["val"]]:
        mask, want = read_mask(sample.mask, source.table), drawn[sample.mask.stem]
        assert ((mask == want) | (mask == 255)).all() and (mask == 255).mean() < (
            0.03 if len(values) > 2 else 1e-9
        )


def test_a_rare_value_of_blurred_masks_is_a_mode_and_noise_is_none():
    noise = {value: 30 for value in range(1, 25)} | {value: 30 for value in range(231, 255)}
    pixels = {0: 900_000, 255: 99_000, 128: 900, **noise}
    found = find_modes(np.array(list(pixels)), np.array(list(pixels.values())), False)
    assert sorted(found) == [0, 128, 255]
    table, notes = snap(pixels, False)
    assert table[20] is None and table[5] == 0 and table[250] == 255 and table[128] == 128
    assert "0.07 % of the pixels snapped to 0, 128, 255, 0.07 % lie between them" in notes[0]
    assert snap({0: 900, 1: 900, 2: 900}, False) == ({}, [])  # too near to one another
    assert snap(dict.fromkeys(range(256), 100), False) == ({}, [])  # a photo
