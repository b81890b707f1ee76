"""Annotation files of labeling tools: the masks drawn from them are those they were made of."""
import json
import re

import numpy as np
import pytest
from conftest import load
from pycocotools import mask as coco_mask
from labeling_tools import NAMES, TOOLS, png_text

import check_data
import evaluate
import infer_image
import train
from config import InputError
from dataio import annotations
from dataio.readers import read_pair


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", TOOLS)
def test_masks_are_those_that_the_annotations_were_made_of(name, tmp_path):
    truth = TOOLS[name](tmp_path / "data")
    source = load("folder", tmp_path / "data")
    assert [name for name, _ in source.classes][0] == "background"
    ids = np.array([[name for name, _ in source.classes].index(name) for name in NAMES])
    splits = {sample.image: split for split, part in source.splits.items() for sample in part}
    assert splits.keys() == truth.keys()
    if name not in ("labelme", "CVAT") and "Label Studio" not in name:  # whose folders have no parts
        assert all(split == ("val" if "2" in path.stem or "5" in path.stem else "train")
                   for path, split in splits.items())
    for part in source.splits.values():
        for sample in part:
            _, mask = read_pair(sample, source.table)
            assert (mask.numpy() == ids[truth[sample.image]]).mean() > 0.985, sample


def change(path, function):
    """Apply a function to the content of a JSON file."""
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def in_coco(function):
    return lambda root: change(root / "annotations/instances_train2017.json", function)


def in_labelme(function):
    return lambda root: change(root / "shot 0.json", function)


def in_supervisely(function):
    return lambda root: change(root / "train/ann/shot 0.jpg.json", function)


def in_yolo(line):
    return lambda root: (root / "labels/train/shot 0.txt").write_text(f"{line}\n")


def first(key, value):
    """Return a change of the first annotation."""
    return in_coco(lambda content: content["annotations"][0].update({key: value}))


BROKEN = [  # tool, what is broken, what the one line says
    ("COCO", first("segmentation", [[1, 1, 5, 5]]), "train2017.json annotation 0 is a polygon of 2 points"),
    ("COCO", first("segmentation", [[1, 1, float("nan"), 5, 9, 9]]), "has coordinates that are no numbers"),
    ("COCO", first("segmentation", [[1, 1, 5]]), "annotation 0: the points of a polygon are pairs"),
    ("COCO", first("segmentation", [["a", "b"] * 3]), "annotation 0: the points of a polygon are pairs"),
    ("COCO", first("segmentation", dict(size=[3, 3], counts=[9])), "run lengths of 3x3 pixels, its image"),
    ("COCO", first("segmentation", dict(size=[84, 112], counts=[9])), "run lengths of 9 pixels in all"),
    ("COCO", first("segmentation", dict(counts=[9])), "annotation 0 has run lengths that are none"),
    ("COCO", first("segmentation", dict(size=[84, 112], counts="0")), "run lengths of 0 pixels in all"),
    ("COCO", first("segmentation", dict(size=[84, 112], counts="\x01")), "annotation 0 has run lengths that"),
    ("COCO", first("segmentation", [[1, 1, 1e300, 5, 9, 9]]), "annotation 0 lies more than 100000 pixels"),
    ("COCO", first("category_id", 99), "annotation 0 names category 99, which the file does not list"),
    ("COCO", first("image_id", "x"), "annotation 0 names image x, which the file does not list"),
    ("COCO", in_coco(lambda content: content["images"][0].update(file_name="gone.jpg")),
     "image 0 is of the image gone.jpg, which is not below"),
    ("COCO", in_coco(lambda content: content["images"].append(content["images"][0])), "is listed twice"),
    ("COCO", in_coco(lambda content: content["categories"][0].update(name="car")),
     "train2017.json lists two categories of the name car"),
    ("COCO", in_coco(lambda content: content.update(images=5)), "has not the form of COCO annotations"),
    ("COCO", in_coco(lambda content: content.update(categories=[])), "names category"),
    ("COCO", lambda root: (root / "annotations/instances_train2017.json").write_text('{"images": ['),
     "instances_train2017.json is not JSON"),
    ("labelme", in_labelme(lambda content: content["shapes"][0].update(points=[[1, 1], [2, 2]])),
     "shot 0.json shape 1 is a polygon of 2 points"),
    ("labelme", in_labelme(lambda content: content["shapes"][0].update(shape_type="circle", points=[[1, 1]])),
     "shape 1 is a circle of 1 point, it needs two"),
    ("labelme", in_labelme(lambda content: content["shapes"][0].update(
        shape_type="mask", mask="%%%", points=[[1, 1], [2, 2]])), "shape 1 has a bitmap that cannot be read"),
    ("labelme", in_labelme(lambda content: content.update(shapes={"a": 1})), "not the form of labelme"),
    ("labelme", lambda root: (root / "shot 0.jpg").unlink(), "is of the image shot 0.jpg, which"),
    ("Label Studio", lambda root: change(root / "project-1.json", lambda tasks: tasks[0].update(data="x")),
     "has not the form of Label Studio annotations"),
    ("YOLO, Ultralytics", in_yolo("0 0.1 0.1 0.2 0.2"), ""),  # a box: counted, not drawn
    ("YOLO, Ultralytics", in_yolo("0 0.1 0.1 0.2 0.2 0.3"), "shot 0.txt line 1: the points of a polygon are"),
    ("YOLO, Ultralytics", in_yolo("7 0.1 0.1 0.2 0.2 0.3 0.1"), "line 1 has the class 7, which"),
    ("YOLO, Ultralytics", in_yolo("0 0.1 0.1 nan 0.2 0.3 0.1"), "has coordinates that are no numbers"),
    ("YOLO, Ultralytics", lambda root: (root / "data.yaml").write_text("names: [a, a]"),
     "names a class twice"),
    ("YOLO, Ultralytics", lambda root: (root / "data.yaml").write_text("{"), "is not YAML with `names`"),
    ("Supervisely", in_supervisely(lambda content: content["objects"][0].update(classTitle="boat")),
     "object 1 is of the class boat, which"),
    ("Supervisely", in_supervisely(lambda content: content["objects"][-1].update(
        geometryType="bitmap", bitmap=dict(origin=[0, 0], data="AAAA"))), "has a bitmap that cannot be read"),
]


@pytest.mark.parametrize(("tool", "spoil", "says"), BROKEN, ids=[f"{one[0]}: {one[2]}" for one in BROKEN])
def test_broken_annotations_are_one_line_that_names_file_and_entry(tool, spoil, says, tmp_path, run):
    root = tmp_path / "data"
    TOOLS[tool](root)
    spoil(root)
    for command, more in ((train, ["--dataset", "folder"]), (check_data, [])):
        code, out, err = run(command, *more, "--data-root", root, "--out-dir", tmp_path / "out")
        text = err if says else out
        assert says in text and (not says or code == 2 and err.startswith("error: ") and err.count("\n") == 1)
        if not says:
            break


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_those_of_pycocotools(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((generator.integers(1, 60), generator.integers(1, 300))) < generator.random() ** 3
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert (annotations.run_lengths(dict(size=mask.shape, counts=text), "", mask.shape) == mask).all()


@pytest.mark.parametrize("above", ["labels", "images/labels"])
def test_names_of_folders_above_the_root_say_nothing(above, tmp_path):
    root = tmp_path / above / "yolo labels"
    truth = TOOLS["YOLO, Ultralytics"](root)
    (root / "train.txt").write_text("images/train/shot 0.jpg\n")
    source = load("folder", root)
    assert {sample.image for part in source.splits.values() for sample in part} == truth.keys()


def test_what_encloses_nothing_is_counted_and_named(tmp_path):
    TOOLS["COCO"](tmp_path)
    first("segmentation", [])(tmp_path)
    assert "warning: not drawn, because they enclose nothing: 1 x box without a polygon" in "\n".join(
        load("folder", tmp_path).notes)


def test_smaller_shapes_of_coco_lie_over_larger_ones_and_later_ones_of_labelme_over_earlier(tmp_path):
    def mask_of(root):
        source = load("folder", root, val_fraction=0)
        names = [name for name, _ in source.classes]
        (sample,) = [one for one in source.splits["train"] if one.image.stem == "shot 0"]
        return names, read_pair(sample, source.table)[1].numpy()

    small, large = [20, 20, 40, 20, 40, 40, 20, 40], [10, 10, 60, 10, 60, 60, 10, 60]
    for tool, in_file, shape_of, key in (("COCO", in_coco, (-1,), "annotations"),
                                         ("labelme", in_labelme, (-1, 2), "shapes")):
        for order in ((small, large), (large, small)):
            root = tmp_path / f"{tool} {order[0] is small}"
            TOOLS[tool](root)

            def redraw(content, order=order, shape_of=shape_of, key=key):
                one = content[key][0]
                of_image = [entry for entry in content[key] if entry.get("image_id") == one.get("image_id")]
                content[key] = [entry for entry in content[key] if entry not in of_image]
                for ring in order:
                    shape, id = np.reshape(ring, shape_of).tolist(), 1 if ring is small else 2
                    content[key].append({**one, "category_id": id, "label": NAMES[id],
                                         "segmentation": [shape], "points": shape})

            in_file(redraw)(root)
            names, mask = mask_of(root)
            expected = "car" if tool == "COCO" or order[1] is small else "tree"
            assert names[mask[30, 30]] == expected and names[mask[55, 55]] == "tree"
            assert names[mask[5, 5]] == "background"


def test_masks_are_drawn_once_and_again_when_the_annotations_change(tmp_path, monkeypatch):
    root, drawn, original = tmp_path / "data", [], annotations.draw
    monkeypatch.setattr(annotations, "draw", lambda *args: drawn.append(1) or original(*args))
    TOOLS["labelme"](root)
    before = load("folder", root)
    load("folder", root)
    assert len(drawn) == 6
    in_labelme(lambda content: content["shapes"].pop())(root)
    after = load("folder", root)
    assert len(drawn) == 12 and before.splits["train"][0].mask != after.splits["train"][0].mask


@pytest.mark.parametrize("shape", ["circle", "rectangle", "mask"])
def test_shapes_of_labelme(shape, tmp_path):
    TOOLS["labelme"](tmp_path)
    rows, columns = np.mgrid[:84, :112]
    region = {"circle": (rows + 0.5 - 40) ** 2 + (columns + 0.5 - 50) ** 2 < 20**2,
              "rectangle": (abs(rows + 0.5 - 40) < 20) & (abs(columns + 0.5 - 50) < 15),
              "mask": (rows >= 30) & (columns >= 35) & (rows + columns < 100)}[shape]
    points = {"circle": [[50, 40], [50, 60]], "rectangle": [[65, 60], [35, 20]],
              "mask": [[35, 30], [112, 84]]}
    entry = dict(label="car", shape_type=shape, points=points[shape], mask=png_text(region[30:, 35:], False))
    in_labelme(lambda content: content.update(shapes=[entry]))(tmp_path)
    source = load("folder", tmp_path, val_fraction=0)
    sample = next(one for one in source.splits["train"] if one.image.stem == "shot 0")
    assert ((read_pair(sample, source.table)[1].numpy() == 1) == region).mean() > 0.99


def test_classes_in_an_order_of_ones_own(tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path)
    source = load("folder", tmp_path, classes=("tree", "background", "boat", "car"))
    plain = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["tree", "background", "boat", "car"]
    for sample, same in zip(source.splits["train"], plain.splits["train"], strict=True):
        ids = read_pair(sample, source.table)[1].numpy()
        assert (np.array([1, 3, 0])[read_pair(same, plain.table)[1].numpy()] == ids).all()
    with pytest.raises(InputError, match="name the class tree, which is not among"):
        load("folder", tmp_path, classes=("background", "car"))


PAINTED = {"CVAT", "Roboflow, masks"}  # which need not be drawn
QUICK = {"COCO, Roboflow"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in TOOLS])
def test_check_train_evaluate_and_infer_take_the_folder_as_it_is(name, tmp_path, run):
    root, out = tmp_path / "data", tmp_path / "out"
    TOOLS[name](root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, text, err = run(check_data, "--data-root", root, "--out-dir", tmp_path)
    assert code == 0 and "verdict: ready" in text, text + err
    assert name in PAINTED or "annotations: " in text
    flags = ["--device", "cpu", "--out-dir", out]
    training = ["--dataset", "folder", "--data-root", root, "--epochs", 1, "--workers", 0, "--imgsz", 42, 56]
    code, text, err = run(train, *training, "--backbone", "vit_tiny", "--unfreeze", "all", *flags)
    assert code == 0 and "3 classes: background, " in text, err
    model, elsewhere = out / "best_model_iou.pth", tmp_path / "moved"
    code, text, err = run(evaluate, "--model", model, *flags)
    assert code == 0 and "mIoU" in text, err
    scored = re.search(r"protocol: folder val, \d images", text)[0]
    root.rename(elsewhere)
    code, text, err = run(evaluate, "--model", model, "--data-root", elsewhere, *flags)
    assert code == 0 and scored in text, err
    assert "no class list" not in text  # the annotations name the classes
    code, _, err = run(infer_image, "--model", model, "--input", next(elsewhere.rglob("*.jpg")), *flags)
    assert code == 0, err
    assert {path: (elsewhere / path.relative_to(root)).read_bytes() for path in before} == before


def test_check_data_takes_unlabelled_as_train_does(tmp_path, run):
    TOOLS["labelme"](tmp_path / "data")
    flags = ["--data-root", tmp_path / "data", "--out-dir", tmp_path / "out", "--unlabelled", "ignore"]
    code, text, err = run(check_data, *flags)
    command = next(line for line in text.splitlines() if line.startswith("  python train.py "))
    assert code == 0 and command.endswith("--unlabelled ignore"), text + err
    ignored = float(re.search(r"ignored: ([\d.]+) % of the pixels", text)[1])
    source = load("folder", tmp_path / "data", unlabelled="ignore")
    masks = [read_pair(sample, source.table)[1].numpy() for part in source.splits.values() for sample in part]
    assert ignored == pytest.approx(100 * np.mean([mask == 255 for mask in masks]), abs=0.06)
    assert run(check_data, "--dataset", "camvid", "--unlabelled", "ignore")[0] == 2
    code, text, _ = run(check_data, *flags, "--fix", tmp_path / "clean")
    fixed = load("folder", tmp_path / "clean")
    assert code == 0 and [name for name, _ in fixed.classes] == ["car", "tree"]


@pytest.mark.parametrize("classes", [(), ("tree", "car")])
def test_what_has_no_label_is_background_or_not_counted(tmp_path, classes):
    truth = TOOLS["labelme"](tmp_path)

    def label(content):
        content["shapes"].append({**content["shapes"][0], "label": "_background_",
                                  "points": [[0, 0], [9, 0], [9, 9], [0, 9]]})
        content["shapes"].append({**content["shapes"][0], "label": "__ignore__",
                                  "points": [[20, 0], [29, 0], [29, 9], [20, 9]]})

    def mask_of(**options):
        source = load("folder", tmp_path, val_fraction=0, **options)
        sample = next(one for one in source.splits["train"] if one.image.stem == "shot 0")
        return [name for name, _ in source.classes], read_pair(sample, source.table)[1].numpy()

    nothing = truth[tmp_path / "shot 0.jpg"] == 0
    names, mask = mask_of(unlabelled="ignore", classes=classes)
    assert names == list(classes or ("car", "tree")) and ((mask == 255) == nothing).mean() > 0.985
    in_labelme(label)(tmp_path)
    names, mask = mask_of()
    assert names == ["background", "car", "tree"] and (mask[2:8, 2:8] == 0).all()
    assert (mask[2:8, 22:28] == 255).all() and (mask == 0)[nothing].mean() > 0.8
    names, mask = mask_of(unlabelled="ignore")
    assert names == ["background", "car", "tree"] and (mask[2:8, 2:8] == 0).all()
    assert (mask[40:, :] != 0).all() and (mask[2:8, 22:28] == 255).all()
