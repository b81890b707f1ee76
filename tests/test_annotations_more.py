"""Annotation files of labeling tools: which image, annotation, attribute and size they mean."""
import csv
import json

import numpy as np
import pytest
import rasterio
from affine import Affine
from conftest import load, refused
from labeling_tools import coco, dump, features, kaggle, on_map, pairs_of_runs, tiles, via
from test_annotations import RING, load_mask, studio, via3_region, via_region, write_shapes
from test_importer import save_turned
from trees import save

from dataio.annotations import geo
from dataio.annotations.tools import find_masks
from dataio.annotations.files import FolderFiles
from dataio.annotations.via import class_attribute


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


SIZE = (84, 112)


def blank(*paths, size=SIZE):
    """Save black images."""
    for path in paths:
        save(path, np.zeros((*size, 3), np.uint8))


def box_at(left, top=10):
    """Return (H, W) bool of a box of 20 x 30 pixels."""
    region = np.zeros(SIZE, bool)
    region[top:top + 30, left:left + 20] = True
    return region


# --- Label Studio -----------------------------------------------------------------------------------------
def studio_box(left, label="car", to_name="image", kind="rectanglelabels"):
    """Return the region of box_at(left)."""
    region = studio(kind, label, x=left, y=10, width=20, height=30)
    return {**region, "id": f"{to_name} {left}", "to_name": to_name, "from_name": "tag"}


def task(number, results, id=1, **data):
    """Return a task with an annotation of results, or without any."""
    annotations = [] if results is None else [dict(id=id, result=results)]
    return dict(id=number, data=data, annotations=annotations)


def label_masks(root, label="car"):
    """Return {name of the image: where it has the label, (H, W) bool}."""
    names = [sample.image.stem for sample in find_masks(root).samples]
    return {name: np.isin(mask, [classes.index(label)]) for name in names
            for classes, mask in [load_mask(root, name)]}


@pytest.mark.parametrize("second", [[studio_box(60, to_name="img2")], []])
def test_regions_of_a_task_are_on_the_image_that_they_name(second, tmp_path):
    """One without regions is not used."""
    blank(*(tmp_path / f"{name}.png" for name in "abcd"))
    regions = [studio_box(10, to_name="img1"), *second]
    others = [studio_box(30, to_name="img2")]
    dump(tmp_path / "p.json", [task(1, regions, img1="/data/upload/1/a.png", img2="/data/upload/1/b.png"),
                               task(2, others, img1="/data/upload/1/c.png", img2="/data/upload/1/d.png")])
    masks = label_masks(tmp_path)
    assert masks.keys() == set("abd" if second else "ad")
    assert (masks["a"] == box_at(10)).all() and (masks["d"] == box_at(30)).all()
    assert not second or (masks["b"] == box_at(60)).all()


@pytest.mark.parametrize("url", ["/data/upload/1/b.png", "https://host/files/b"])
def test_an_image_beside_the_labeled_one_is_not_used(url, tmp_path):
    blank(tmp_path / "a.png", tmp_path / "b.png")
    dump(tmp_path / "p.json", [task(1, [studio_box(10)], reference="/data/upload/1/a.png", image=url)])
    masks = label_masks(tmp_path)
    assert masks.keys() == {"b"} and (masks["b"] == box_at(10)).all()


@pytest.mark.parametrize("is_min", [False, True])
def test_a_task_of_two_images_that_says_neither_is_named(is_min, tmp_path):
    blank(*(tmp_path / f"{name}.png" for name in "abc"))
    images, region = dict(img1="/data/upload/1/a.png", img2="/data/upload/1/b.png"), studio_box(10)
    content = [task(5, [region], **images), task(6, [region], image="c.png")]
    if is_min:
        region = {**region["value"], "original_width": 112, "original_height": 84}
        content = [dict(id=5, annotation_id=1, label=[region], **images),
                   dict(id=6, annotation_id=2, label=[region], image="c.png")]
    dump(tmp_path / "p.json", content)
    with refused("p.json task 5", "several images"):
        find_masks(tmp_path)
    sample, = find_masks(tmp_path, skip_bad_labels=True).samples
    assert sample.image.name == "c.png"


def test_one_image_under_two_keys_is_one(tmp_path):
    blank(tmp_path / "a.png")
    dump(tmp_path / "p.json", [task(1, [studio_box(10, to_name="x")], image="a.png", preview="a.png")])
    assert (label_masks(tmp_path)["a"] == box_at(10)).all()


def test_tasks_of_two_servers_may_have_the_same_number(tmp_path):
    blank(tmp_path / "a.png", tmp_path / "b.png")
    dump(tmp_path / "p.json", [task(1, [studio_box(10)], image="a.png"),
                               task(1, [studio_box(60)], 2, image="b.png")])
    masks = label_masks(tmp_path)
    assert (masks["a"] == box_at(10)).all() and (masks["b"] == box_at(60)).all()


# --- Label Studio, masks ----------------------------------------------------------------------------------
def save_brush(root, left, number, annotation, label="car", tool="tag"):
    """Save the picture of box_at(left)."""
    save(root / f"task-{number}-annotation-{annotation}-by-1-{tool}-{label}-0.png",
         box_at(left).astype(np.uint8) * 255)


def brush_results(*to_names):
    """Return results of brush strokes, by a tool of the name of each of the images."""
    return [{**studio("brushlabels", rle=[]), "id": name, "to_name": name, "from_name": f"tag{name[3:]}"}
            for name in to_names]


@pytest.mark.parametrize(("annotations", "left"), [
    (None, 60),
    ([dict(id=7, result=[]), dict(id=9, result=[])], 60),
    ([dict(id=9, result=[]), dict(id=7, result=[])], 10),
    ([dict(id=7, result=[], ground_truth=True), dict(id=9, result=[])], 10),
    ([dict(id=7, result=[]), dict(id=9, result=[], was_cancelled=True)], 10)])
def test_pictures_of_one_annotation_of_a_task_are_drawn(annotations, left, tmp_path):
    name = "a" if annotations else "1"
    blank(tmp_path / f"images/{name}.png")
    for annotation, place in ((7, 10), (9, 60)):
        save_brush(tmp_path / "masks", place, 1, annotation)
    if annotations:
        dump(tmp_path / "p.json", [dict(id=1, data=dict(image="a.png"), annotations=annotations)])
    assert (label_masks(tmp_path)[name] == box_at(left)).all()
    assert sum("task 1" in note for note in find_masks(tmp_path).notes) == 1


def test_pictures_of_a_task_of_two_images(tmp_path):
    blank(*(tmp_path / f"images/{name}.png" for name in "ab"))
    for tool, left in (("tag1", 10), ("tag2", 60)):
        save_brush(tmp_path / "masks", left, 1, 7, tool=tool)
    images = dict(img1="/data/upload/1/a.png", img2="/data/upload/1/b.png")
    dump(tmp_path / "p.json", [task(1, brush_results("img1", "img2"), 7, **images)])
    masks = label_masks(tmp_path)
    assert (masks["a"] == box_at(10)).all() and (masks["b"] == box_at(60)).all()
    dump(tmp_path / "p.json", [task(1, None, **images)])
    with refused("task 1", "several images"):
        find_masks(tmp_path)


def test_an_annotation_without_regions_is_background_and_polygons_are_not_drawn(tmp_path):
    """As in the JSON export alone; an image that has polygons alone is no background."""
    blank(*(tmp_path / f"images/{name}.png" for name in "abcd"))
    content = [task(1, [*brush_results("image"), studio_box(60)], 7, image="a.png"),
               task(2, [], 8, image="b.png"), task(3, [studio_box(60)], 9, image="c.png"),
               task(4, None, image="d.png")]
    dump(tmp_path / "p.json", content)
    save_brush(tmp_path / "masks", 10, 1, 7)
    masks = label_masks(tmp_path)
    assert masks.keys() == {"a", "b"} and (masks["a"] == box_at(10)).all() and not masks["b"].any()
    assert any("2 shapes" in note and "task 1" in note for note in find_masks(tmp_path).notes)
    content[0]["annotations"][0]["result"].pop(0)
    dump(tmp_path / "p.json", content)
    next(tmp_path.glob("masks/*.png")).unlink()
    assert label_masks(tmp_path).keys() == {"a", "b", "c"}


def test_pictures_of_two_servers_with_tasks_of_the_same_number_are_refused(tmp_path):
    blank(*(tmp_path / f"images/{name}.png" for name in "ab"))
    for name, id, left in (("a", 7, 10), ("b", 9, 60)):
        save_brush(tmp_path / "masks", left, 1, id)
        dump(tmp_path / f"{name}.json", [task(1, brush_results("image"), id, image=f"{name}.png")])
    with refused("task-1-annotation-7", "task-1-annotation-9"):
        find_masks(tmp_path)


# --- VIA --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tool", ["VIA 2, JSON", "VIA 3"])
def test_regions_of_via_without_attributes_are_of_one_class(tool, tmp_path):
    """As in the balloons of Mask R-CNN."""
    region = dict(via_region("rect", x=10, y=10, width=20, height=30), region_attributes={})
    if tool == "VIA 3":
        region = dict(via3_region(2, 10, 10, 20, 30), av={})
    write_shapes(tmp_path, tool, [region])
    if tool == "VIA 2, JSON":  # whose other images have classes
        content = json.loads((tmp_path / "via_export_json.json").read_text())
        with refused("region 1"):
            find_masks(tmp_path)
        dump(tmp_path / "via_export_json.json", dict(list(content.items())[:1]))
    names, mask = load_mask(tmp_path)
    assert names == ["background", "object"] and (mask == box_at(10)).all()
    assert any("object" in note for note in find_masks(tmp_path).notes)


@pytest.mark.parametrize(("rows", "named"), [
    ([dict(name=f"obj{number}", category="car") for number in range(3)], "category"),
    ([dict(name=f"obj{number}", kind="car") for number in range(30)], "kind"),
    ([dict(label=f"read {number}", type="") for number in range(30)], None),
    ([dict(label=f"class {number % 20}") for number in range(30)], "label"),
    ([dict(remark={"a": True}, kind=str(number % 3)) for number in range(30)] + [dict(kind="1")], "kind"),
    ([{}], None)])
def test_which_attribute_is_the_class(rows, named):
    attribute, notes = class_attribute(rows)
    assert attribute == named and len(notes) == (named != "label")


# --- polygons on a map ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "key"), [
    ([dict(label="car", source="a"), dict(source="b"), dict(source="b")], "label"),
    ([dict(label=f"class {number % 15}" if number < 30 else None) for number in range(100)], "label"),
    ([dict(name="pool"), *[dict(name="")] * 3, dict(name="pool")], "name"),
    ([dict(name="Town Hall", building="yes"), dict(building="yes"), dict(building="shed")], "building"),
    ([dict(type="multipolygon", building="yes"), dict(building="yes"), dict(building="shed")], "building"),
    ([dict(name="Town Hall"), {}, {}], None),
    ([dict(label=number) for number in range(30)] + [{}] * 30, None)])
def test_the_property_that_names_the_classes(rows, key):
    assert geo.class_property(rows) == key


def test_features_without_the_class_that_few_others_have_are_named(tmp_path):
    (_, path, _, transform), *_ = tiles(tmp_path)
    content = features([("car", on_map(RING, transform))] * 3, "label")
    for feature in content["features"][1:]:
        feature["properties"] = dict(label=None)
    dump(tmp_path / "houses.geojson", content)
    with refused("houses.geojson feature 2", "without a class"):
        find_masks(tmp_path)


def test_state_of_polygons_on_a_map_is_where_the_images_lie(tmp_path):
    def move(path):
        with rasterio.open(path, "r+") as file:
            a, b, c, d, e, f = file.transform[:6]
            file.transform = Affine(a, b, c + 1, d, e, f)

    def state():
        folder = FolderFiles(tmp_path)
        return geo.read(geo.find_files(folder), folder).state

    (_, path, _, transform), *others = tiles(tmp_path)
    dump(tmp_path / "houses.geojson", features([("car", on_map(RING, transform))]))
    before = state()
    move(others[-1][1])  # far from all shapes
    assert state() == before
    move(path)
    moved = state()
    with rasterio.open(path, "r+") as file:
        file.crs = rasterio.crs.CRS.from_epsg(25833)
    assert len({before, moved, state()}) == 3 and str(tmp_path) not in before


# --- run lengths in CSV -----------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["train.csv", "masks.csv"])
def test_sizes_are_those_of_the_images_of_the_split(file, tmp_path):
    """Of an image in train/ and another one of its name in test/."""
    lines = ["ImageId,EncodedPixels"]
    for number in range(3):
        blank(tmp_path / f"train/{number}.png")
        blank(tmp_path / f"test/{number}.png", size=(60, 90))
        lines.append(f"{number}.png,{pairs_of_runs(box_at(60, 40))}")
    (tmp_path / file).write_text("\n".join(lines))
    if file == "train.csv":
        assert (label_masks(tmp_path, "object")["0"] == box_at(60, 40)).all()
    else:
        with refused("0.png", "several files"):
            find_masks(tmp_path)


@pytest.mark.parametrize("gives_size", [False, True])
def test_run_lengths_on_a_photo_that_exif_turns_need_its_size(gives_size, tmp_path):
    for name, orientation in (("a", 6), ("b", 1), ("c", 6)):
        save_turned(tmp_path / f"{name}.jpg", np.zeros((*SIZE, 3), np.uint8), orientation)
    text = pairs_of_runs(box_at(60))
    rows = ["ImageId,EncodedPixels,Height,Width", *(f"{name}.jpg,{text},84,112" for name in "ab"), "c.jpg,,,"]
    (tmp_path / "train.csv").write_text("\n".join(
        row if gives_size else ",".join(row.split(",")[:2]) for row in rows))
    if gives_size:
        assert (label_masks(tmp_path, "object")["a"] == box_at(60)).all()
    else:
        with refused("train.csv line 2", "EXIF"):
            find_masks(tmp_path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_may_end_in_semicolons(mark, tmp_path):
    kaggle(tmp_path / "a")
    via(tmp_path / "b", "csv")
    for path in tmp_path.glob("*/*.csv"):
        label = "class 1" if path.stem == "train" else "car"
        masks = label_masks(path.parent, label)
        rows = list(csv.reader(path.read_text().splitlines()))
        with open(path, "w", newline="") as file:
            file.write(mark)
            csv.writer(file, delimiter=";").writerows(rows)
        after = label_masks(path.parent, label)
        assert after.keys() == masks.keys() and all((after[name] == masks[name]).all() for name in masks)


# --- COCO -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("none", ["none", "", None])
def test_classes_of_coco_that_are_not_used_keep_their_place(none, tmp_path):
    """But for the head of Roboflow's list."""
    coco(tmp_path, head=[dict(id=90, name="all", supercategory=none), dict(id=91, name="bus"),
                         dict(id=92, name="van", supercategory="van")])
    for path in tmp_path.rglob("*.json"):
        content = json.loads(path.read_text())
        for entry in content["categories"][3:]:
            entry["supercategory"] = "all"
        dump(path, content)
    names = [name for name, _ in load("folder", tmp_path).classes]
    assert names == ["background", "bus", "van", "tree", "car"]
