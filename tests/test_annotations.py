"""Annotation files of labeling tools: the masks drawn from them are those they were made of."""
import json
import math
import random
import re
import time
from contextlib import suppress
from itertools import pairwise
import sqlite3
import sys

import cv2
import numpy as np
import pytest
from conftest import load, refused
from PIL import Image
from pycocotools import mask as coco_mask
from labeling_tools import (DEGREES, METERS, NAMES, TOOLS, brush, class_masks, dump, features, kaggle, on_map,
pairs_of_runs, png_text, scenes, tiles)
from rasterio import warp
from rasterio.crs import CRS
from trees import save

import check_data
import evaluate
import infer_image
import train
from config import InputError
from dataio.annotations.tools import find_masks
from dataio.annotations.shapes import decode_runs, paste, polygons, polygons_bitmap
from dataio.annotations.via import class_attribute
from dataio.layout import NoMasks, find_pairs
from dataio.readers import read_sample

EXACT = ("run lengths", "masks")  # tools whose files hold pixels, not outlines

WITHOUT_SPLITS = {"labelme", "Label Studio, masks", "Label Studio, masks without JSON",
                  "Label Studio, JSON-MIN", "CVAT, painted masks", "VIA 2, project", "VIA 2, JSON",
                  "VIA 2, CSV", "VIA 3", "ISAT"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def samples_of(source):
    """Return {stem of the image: Sample} of a DataSource."""
    return {sample.image.stem: sample for samples in source.splits.values() for sample in samples}


def load_mask(root, name="shot 0", **options):
    """Return (class names, mask (H, W)) of an image of a folder."""
    source = load("folder", root, val_fraction=0, **options)
    mask = read_sample(samples_of(source)[name], source.table)[1]["mask"].numpy()
    return [name for name, _ in source.classes], mask


def interior(mask):
    """Return (H, W) bool: the pixels of (H, W) that equal all eight around them."""
    mask, square = mask.astype(np.uint8), np.ones((3, 3))
    return cv2.erode(mask, square) == cv2.dilate(mask, square)


@pytest.mark.parametrize("tool", TOOLS)
def test_masks_are_those_that_the_annotations_were_made_of(tool, tmp_path):
    truth = TOOLS[tool](tmp_path / "data")
    source = load("folder", tmp_path / "data")
    names = [name for name, _ in source.classes]
    assert names[0] == "background" and source.annotated == (tool not in PAINTED)
    ids = np.array([names.index(name) for name in NAMES])
    assert {sample.image for sample in samples_of(source).values()} == truth.keys()
    if tool not in WITHOUT_SPLITS:
        assert {stem.split("_")[0] for stem in samples_of(source) if "2" in stem or "5" in stem} == {
            sample.image.stem.split("_")[0] for sample in source.splits["val"]}
    for sample in samples_of(source).values():
        expected = ids[truth[sample.image]]
        differs = read_sample(sample, source.table)[1]["mask"].numpy() != expected
        if not any(word in tool for word in EXACT):
            assert differs.mean() < 0.015, sample
            differs &= interior(expected)  # which pixels an outline cuts in half belong to it differs
        assert not differs.any(), sample


# --- shapes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_pycocotools(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((generator.integers(1, 60), generator.integers(1, 300))) < generator.random() ** 3
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert (decode_runs(dict(size=mask.shape, counts=text)).pixels == mask).all()


def test_outlines_of_one_shape_that_overlap_are_filled():
    """COCO has an object in several polygons; where two lie over each other is no hole of it."""
    def square(start, end):
        return np.array([[start, start], [end, start], [end, end], [start, end]], float)

    expected = np.zeros((40, 50), bool)
    expected[5:20, 5:20] = expected[15:30, 15:30] = True
    expected[17:25, 17:25] = False
    overlapping = square(5, 20), square(15, 30)
    assert (polygons(overlapping, [square(17, 25), square(19, 23)], size=(40, 50)) == expected).all()


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_drawn_in_a_box_as_they_are_in_the_whole_image(seed):
    generator = np.random.default_rng(seed)
    size = (40, 50)
    centers = generator.uniform(-20, 70, (3, 1, 2))
    rings = [*(center + generator.uniform(-15, 15, (generator.integers(3, 8), 2)) for center in centers)]
    holes = rings[2:] if seed % 2 else []
    mask = np.zeros(size, bool)
    paste(polygons_bitmap(rings[:2], holes, size), mask, True)
    assert (mask == polygons(rings[:2], holes, size=size)).all()


EDITED = {  # tool: (the file that tests edit, its list of shapes, what errors call the first)
    "COCO": ("instances_train2017.json", "annotations", "annotation 0 "),
    "labelme": ("shot 0.json", "shapes", "shape 1 "),
    "Supervisely": ("shot 0.jpg.json", "objects", "object 1 "),
    "Label Studio, masks": ("project-1.json", None, None),
}


def edit(root, tool, change):
    """Apply change(content) to the EDITED file of a tool."""
    path = next(root.rglob(EDITED[tool][0]))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_first(root, tool, **values):
    """Change values of the first shape of a tool's EDITED file."""
    edit(root, tool, lambda content: content[EDITED[tool][1]][0].update(values))


ROWS, COLUMNS = np.mgrid[:84, :112] + 0.5
LABELME_SHAPES = {  # type: (points, region)
    "circle": ([[50, 40], [50, 60]], (ROWS - 40) ** 2 + (COLUMNS - 50) ** 2 < 20**2),
    "rectangle": ([[65, 60], [35, 20]], (abs(ROWS - 40) < 20) & (abs(COLUMNS - 50) < 15)),
    "rectangle of four corners": ([[65, 60], [35, 60], [35, 20], [65, 20]],
                                  (abs(ROWS - 40) < 20) & (abs(COLUMNS - 50) < 15)),
    "mask": ([[35, 30], [112, 84]], (ROWS > 30) & (COLUMNS > 35) & (ROWS + COLUMNS < 101)),
}


@pytest.mark.parametrize("shape", LABELME_SHAPES)
def test_shapes_of_labelme(shape, tmp_path):
    points, region = LABELME_SHAPES[shape]
    TOOLS["labelme"](tmp_path)
    entry = dict(label="car", shape_type=shape.split()[0], points=points,
                 mask=png_text(region[30:, 35:], False))
    edit(tmp_path, "labelme", lambda content: content.update(shapes=[entry]))
    _, mask = load_mask(tmp_path)
    assert not (((mask == 1) != region) & interior(region)).any()


def test_holes_bitmaps_beyond_the_edges_and_tags_of_supervisely(tmp_path):
    square, hole = [[-9, 10], [70, 10], [70, 70], [-9, 70]], [[30, 30], [50, 30], [50, 50], [30, 50]]
    bitmap = dict(origin=[-4, 80], data=png_text(np.ones((20, 10), bool), True))
    entries = [dict(classTitle="car", geometryType="polygon", points=dict(exterior=square, interior=[hole])),
               dict(classTitle="tree", geometryType="bitmap", bitmap=bitmap)]
    TOOLS["Supervisely"](tmp_path)
    edit(tmp_path, "Supervisely", lambda content: content.update(objects=entries, tags=[dict(name="Test")]))
    expected = np.zeros((84, 112), int)
    expected[10:70, :70], expected[30:50, 30:50], expected[80:, :6] = 1, 0, 2
    assert (load_mask(tmp_path)[1] == expected).all()
    assert [sample.image.stem for sample in load("folder", tmp_path).splits["test"]] == ["shot 0"]


def box_region(x, y, width, height, degrees=0):
    """Return (H, W) bool of a box around (x, y), turned clockwise."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    across, along = COLUMNS - x, ROWS - y
    return (abs(across * cos + along * sin) < width / 2) & (abs(along * cos - across * sin) < height / 2)


def ellipse_region(x, y, radius_x, radius_y, degrees=0):
    """Return (H, W) bool of an ellipse around (x, y), turned clockwise."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    across, along = COLUMNS - x, ROWS - y
    return ((across * cos + along * sin) / radius_x) ** 2 + ((along * cos - across * sin) / radius_y) ** 2 < 1


def write_shapes(root, tool, entries):
    """Write a tool's tree in which the image `shot 0` has these entries as its only shapes."""
    TOOLS[tool](root)
    name, change = SHAPES_OF[tool]
    path = next(root.rglob(name))
    text = path.read_text()
    if path.suffix == ".json":
        content = json.loads(text)
        change(content, entries)
        text = json.dumps(content)
    else:
        text = change(text, entries)
    path.write_text(text)


SHAPES_OF = {  # tool: (a file, change(its content, entries), which makes these the shapes of `shot 0`)
    "CVAT for images": ("annotations.xml", lambda text, entries: re.sub(
        '(name="shot 0.jpg"[^>]*>).*?(</image>)', rf"\1{''.join(entries)}\2", text)),
    "Label Studio": ("project-3*.json", lambda tasks, entries:
                     tasks[0]["annotations"][0].update(result=entries)),
    "VIA 2, JSON": ("via_export_json.json", lambda content, entries:
                    next(iter(content.values())).update(regions=entries)),
    "SuperAnnotate": ("shot 0.jpg___objects.json", lambda content, entries:
                      content.update(instances=entries)),
    "SuperAnnotate, pixel masks": ("shot 0.jpg___pixel.json", lambda content, entries:
                                   content.update(instances=entries)),
    "ISAT": ("shot 0.json", lambda content, entries: content.update(objects=entries)),
    "Datumaro": ("train.json", lambda content, entries: content["items"][0].update(annotations=entries)),
    "VIA 3": ("via_project_4May2024.json", lambda content, entries:
              content.update(metadata=dict(enumerate(entries)))),
}
CVAT_BOX = '<box label="car" occluded="0" xtl="30" ytl="20" xbr="80" ybr="50" z_order="{}" {}></box>'
SPECKLED = np.random.default_rng(0).random((84, 112)) < 0.5 * (ROWS > 40)


def studio(type="rectanglelabels", label="car", size=(112, 84), **value):
    """Return a result of Label Studio; x, y, width, height, ... in pixels."""
    sides = dict(x=112, y=84, width=112, height=84, radiusX=112, radiusY=84)
    value = {key: number * 100 / sides[key] if key in sides else number for key, number in value.items()}
    value["labels" if type == "labels" else type] = [label]
    return dict(id="a", type=type, value=value, original_width=size[0], original_height=size[1])


def via_region(name, label="car", **shape):
    """Return a region of VIA 2."""
    return dict(shape_attributes=dict(name=name, **shape), region_attributes=dict(kind=label))


def via3_region(*xy, label="0"):
    """Return a region of VIA 3."""
    return dict(vid="1", flg=0, z=[], xy=xy, av={"2": label})


SHAPES = [  # (tool, entries, region, which pixels of it are trees and not cars)
    ("CVAT for images", [CVAT_BOX.format(0, "")], box_region(55, 35, 50, 30), None),
    ("CVAT for images", [CVAT_BOX.format(0, 'rotation="30.00"')], box_region(55, 35, 50, 30, 30), None),
    ("CVAT for images", ['<ellipse label="car" cx="50" cy="40" rx="30" ry="15" rotation="340.00"></ellipse>'],
     ellipse_region(50, 40, 30, 15, -20), None),
    ("CVAT for images", [  # the lower one later in the file; shapes in skeletons are none of the image
        CVAT_BOX.format(2, ""),
        '<polygon label="tree" z_order="1" points="10,10;60,10;60,60;10,60"></polygon>',
        '<skeleton label="car" z_order="3"><polygon label="1" points="0,0;9,0;9,9"></polygon></skeleton>'],
     box_region(55, 35, 50, 30) | box_region(35, 35, 50, 50),
     box_region(35, 35, 50, 50) & ~box_region(55, 35, 50, 30)),
    ("CVAT for images", [  # beyond the upper edge and the right one
        '<mask label="car" rle="0, 30" left="102" top="-1" width="15" height="2"></mask>',
        '<mask label="car" rle="15, 5, 2, 3" left="102" top="70" width="5" height="5"></mask>'],
     box_region(107, 0, 10, 2) | box_region(104.5, 73.5, 5, 1) | box_region(105.5, 74.5, 3, 1), None),
    ("Label Studio", [studio(x=30, y=20, width=50, height=30)], box_region(55, 35, 50, 30), None),
    ("Label Studio", [studio(x=60, y=20, width=40, height=20, rotation=90)],
     box_region(50, 40, 20, 40), None),
    ("Label Studio", [studio("ellipselabels", x=50, y=40, radiusX=30, radiusY=15, rotation=30)],
     ellipse_region(50, 40, 30, 15, 30), None),
    ("Label Studio", [studio("brushlabels", format="rle", rle=brush(SPECKLED))], SPECKLED, None),
    ("Label Studio", [  # an outline and its label as two results, and a line between regions
        dict(id="a", type="polygon", value=dict(points=[[25, 25], [75, 25], [75, 75], [25, 75]])),
        dict(id="a", type="labels", value=dict(labels=["car"]), original_width=112, original_height=84),
        dict(type="relation", from_id="a", to_id="a", direction="right")], box_region(56, 42, 56, 42), None),
    ("VIA 2, JSON", [via_region("rect", x=30, y=20, width=50, height=30)], box_region(55, 35, 50, 30), None),
    ("VIA 2, JSON", [via_region("circle", cx=50, cy=40, r=20.5)], ellipse_region(50, 40, 20.5, 20.5), None),
    ("VIA 2, JSON", [via_region("ellipse", {"car": True, "tree": False}, cx=50, cy=40, rx=30, ry=15,
                                theta=0.7)], ellipse_region(50, 40, 30, 15, np.degrees(0.7)), None),
    ("VIA 2, JSON", [  # a later region lies over an earlier one
        via_region("rect", x=30, y=20, width=50, height=30),
        via_region("polygon", "tree", all_points_x=[10, 60, 60, 10, 10], all_points_y=[10, 10, 60, 60, 10]),
        via_region("polyline", all_points_x=[10, 60, 60], all_points_y=[10, 10, 60])],
     box_region(55, 35, 50, 30) | box_region(35, 35, 50, 50), box_region(35, 35, 50, 50)),
    ("VIA 3", [via3_region(2, 30, 20, 50, 30)], box_region(55, 35, 50, 30), None),
    ("VIA 3", [via3_region(3, 50, 40, 20)], ellipse_region(50, 40, 20, 20), None),
    ("VIA 3", [via3_region(4, 50, 40, 30, 15)], ellipse_region(50, 40, 30, 15), None),
    ("VIA 3", [via3_region(8, 50, 20, 30, 33, 80, 45, 60, 50)], box_region(55, 35, 50, 30), None),
    ("VIA 3", [via3_region(7, 10, 10, 60, 10, 60, 60, 10, 60), via3_region(6, 1, 1, 9, 9)],
     box_region(35, 35, 50, 50), None),
    ("SuperAnnotate", [dict(type="polygon", classId=881, points=[10, 10, 60, 10, 60, 60, 10, 60],
                            exclude=[[20, 20, 30, 20, 30, 50, 20, 50], [40, 20, 50, 20, 50, 50, 40, 50]])],
     box_region(35, 35, 50, 50) & ~box_region(25, 35, 10, 30) & ~box_region(45, 35, 10, 30), None),
    ("SuperAnnotate", [dict(type="bbox", className="car", points=dict(x1=30, x2=80, y1=20, y2=50)),
                       dict(type="template", classId=881, points=[dict(x=1, y=1)])],
     box_region(55, 35, 50, 30), None),
    ("SuperAnnotate", [dict(type="rbbox", classId=881, points=dict(
        x1=50, y1=10, x2=80, y2=40, x3=60, y3=60, x4=30, y4=30))],
     box_region(55, 35, 1800**0.5, 800**0.5, 45), None),
    ("SuperAnnotate", [dict(type="ellipse", classId=881, cx=50, cy=40, rx=30, ry=15, angle=30)],
     ellipse_region(50, 40, 30, 15, 30), None),
    ("ISAT", [dict(category="car", layer=2.0, segmentation=[[30, 20], [80, 20], [80, 50], [30, 50]]),
              dict(category="tree", layer=1, segmentation=[[10, 10], [60, 10], [60, 60], [10, 60]])],
     box_region(55, 35, 50, 30) | box_region(35, 35, 50, 50),
     box_region(35, 35, 50, 50) & ~box_region(55, 35, 50, 30)),
    ("Datumaro", [dict(type="bbox", label_id=1, bbox=[30, 20, 50, 30], attributes=dict(rotation=30))],
     box_region(55, 35, 50, 30, 30), None),
    ("Datumaro", [dict(type="ellipse", label_id=1, points=[20, 25, 80, 55]),
                  dict(type="polyline", label_id=1, points=[1, 1, 2, 2])],
     ellipse_region(50, 40, 30, 15), None),
    ("Datumaro", [dict(type="polygon", label_id=1, z_order=1, points=[30, 20, 80, 20, 80, 50, 30, 50]),
                  dict(type="bbox", label_id=0, z_order=0, bbox=[10, 10, 50, 50])],
     box_region(55, 35, 50, 30) | box_region(35, 35, 50, 50),
     box_region(35, 35, 50, 50) & ~box_region(55, 35, 50, 30)),
]


@pytest.mark.parametrize(("tool", "entries", "region", "trees"), SHAPES)
def test_single_shapes(tool, entries, region, trees, tmp_path):
    write_shapes(tmp_path, tool, entries)
    names, mask = load_mask(tmp_path)
    expected = region * names.index("car")
    if trees is not None:
        expected[trees] = names.index("tree")
    assert not ((mask != expected) & interior(expected)).any() and (mask == expected).mean() > 0.95


@pytest.mark.parametrize(("tool", "values", "count"), [
    ("labelme", dict(shape_type="line"), "1 x line"), ("labelme", dict(shape_type="point"), "1 x point"),
    ("Supervisely", dict(geometryType="line"), "1 x line")])
def test_what_encloses_nothing_is_counted(tool, values, count, tmp_path):
    TOOLS[tool](tmp_path)
    assert not find_masks(tmp_path).doubts
    edit_first(tmp_path, tool, **values)
    doubt, = find_masks(tmp_path).doubts
    assert count in doubt


@pytest.mark.parametrize("labels", [("car", "tree"), ("tree", "car")])
@pytest.mark.parametrize("tool", ["COCO", "labelme"])
def test_smaller_shapes_of_coco_lie_over_larger_ones_and_later_ones_of_labelme_over_earlier(
        tool, labels, tmp_path):
    rings = {"car": [[20, 20], [40, 20], [40, 40], [20, 40]],
             "tree": [[10, 10], [60, 10], [60, 60], [10, 60]]}

    def redraw(content):
        shapes = content[EDITED[tool][1]]
        first = shapes[0]
        shapes[:] = [entry for entry in shapes if entry.get("image_id") != first.get("image_id")]
        for label in labels:
            points = rings[label]
            shapes.append({**first, "label": label, "category_id": NAMES.index(label), "points": points,
                           "segmentation": [np.ravel(points).tolist()]})

    TOOLS[tool](tmp_path)
    edit(tmp_path, tool, redraw)
    names, mask = load_mask(tmp_path)
    assert names[mask[30, 30]] == ("car" if tool == "COCO" else labels[1])
    assert names[mask[55, 55]] == "tree" and names[mask[5, 5]] == "background"


# --- what is wrong ----------------------------------------------------------------------------------------
BROKEN_SHAPES = [
    *(("COCO", dict(segmentation=[points])) for points in (
        [1, 1, 5, 5], [1, 1, float("nan"), 5, 9, 9], [1, 1, 5], ["a", "b"] * 3, [1, 1, 1e300, 5, 9, 9])),
    *(("COCO", dict(segmentation=dict(size=[84, 112], counts=counts)))
      for counts in ([9], [9409, -1], "0", "\x01", 7)),
    ("COCO", dict(segmentation=dict(size=[3, 3], counts=[9]))),
    ("COCO", dict(segmentation=dict(counts=[9]))),
    ("COCO", dict(category_id=99)),
    ("COCO", dict(image_id="x")),
    ("labelme", dict(points=[[1, 1], [2, 2]])),
    ("labelme", dict(shape_type="circle", points=[[1, 1]])),
    ("labelme", dict(shape_type="mask", mask="%%%", points=[[1, 1], [2, 2]])),
    ("Supervisely", dict(geometryType="bitmap", bitmap=dict(origin=[0, 0], data="AAAA"))),
]


@pytest.mark.parametrize(("tool", "values"), BROKEN_SHAPES)
def test_broken_shapes_are_named_with_their_file(tool, values, tmp_path):
    TOOLS[tool](tmp_path)
    edit_first(tmp_path, tool, **values)
    file, _, entry = EDITED[tool]
    with refused(f"{file} {entry}".rstrip()):
        find_masks(tmp_path)


CVAT_MASK = '<mask label="car" rle="{}" left="{}" top="0" width="2" height="2"></mask>'


@pytest.mark.parametrize(("tool", "entry"), [
    *(("CVAT for images", CVAT_MASK.format(*values)) for values in (
        ("1, 2", 0), ("1, 4, -1", 0), ("1, x", 0), ("4", "1e9"), ("4", 10**30), (f"{2**63 - 1}, 5", 0))),
    ("CVAT for images", CVAT_BOX.format("front", "")),
    ("CVAT for images", CVAT_BOX.format(0, 'rotation="nan"')),
    ("CVAT for images", '<polygon label="car" points="1,2;3,4;5"></polygon>'),
    ("CVAT for images", '<polygon points="1,2;3,4;5,9"></polygon>'),
    ("CVAT for images", '<cuboid label="car" xtl1="1" ytl1="2"></cuboid>'),
    *(("Label Studio", {**studio(x=30, y=20, width=50, height=30), **values}) for values in (
        dict(original_width=None), dict(image_rotation=90), dict(item_index=1),
        dict(value=dict(points=[[1, 2]], labels=[])), dict(value=dict(sequence=[], labels=["car"])),
        dict(value=dict(points=[[1, 2]], labels=["car", "b"])))),
    *(("Label Studio", studio("brushlabels", rle=rle)) for rle in (
        brush(SPECKLED)[:-9], brush(SPECKLED[1:]), [], [300], "x", brush(SPECKLED)[:9] + [255] * 9)),
    ("VIA 2, JSON", via_region("polygon", all_points_x=[1, 9, 9], all_points_y=[1, 1])),
    ("VIA 2, JSON", via_region("circle", cx=50, cy="x", r=20)),
    ("VIA 2, JSON", via_region("ellipse", cx=50, cy=40, rx=30, ry=15, theta=float("nan"))),
    ("VIA 2, JSON", via_region("rect", {"car": True, "tree": True}, x=30, y=20, width=50, height=30)),
    ("VIA 2, JSON", via_region("rect", "", x=30, y=20, width=50, height=30)),
    ("VIA 3", via3_region(2, 30, 20, 50)), ("VIA 3", via3_region(4, 50, 40, 30, "x")),
    ("VIA 3", via3_region(2, 30, 20, 50, 30, label="9")),
    ("VIA 3", via3_region(2, 30, 20, 50, 30, label="0,1")),
    ("ISAT", dict(category="car", layer="top", segmentation=[[1, 1], [20, 1], [20, 20]])),
    ("ISAT", dict(category="car", layer=1, segmentation=[[1, 1], [20, 1], [20]])),
    ("ISAT", dict(category="", layer=1, segmentation=[[1, 1], [20, 1], [20, 20]])),
    ("Datumaro", dict(type="polygon", label_id=-1, points=[1, 1, 20, 1, 20, 20])),
    ("Datumaro", dict(type="cuboid_3d", label_id=1, position=[1, 2, 3])),
    ("Datumaro", dict(type="mask", label_id=1, rle=dict(size=[84, 112], counts="0"))),
    ("Datumaro", dict(type="mask", label_id=1, rle=dict(size=[112, 84], counts=[0, 112 * 84]))),
    ("SuperAnnotate", dict(type="polygon", classId=-1, points=[1, 1, 20, 1, 20, 20])),
    ("SuperAnnotate", dict(type="cuboid", classId=881, points=dict(f1=dict(x=1, y=1)))),
    ("SuperAnnotate", dict(type="polygon", classId=881, points=[1, 1, 20, 1, 20])),
    ("SuperAnnotate", dict(type="polygon", classId=881, points=[1, 1, 20, 1, 20, 20], exclude=[["x"]])),
])
def test_broken_entries_are_named_with_their_image(tool, entry, tmp_path):
    write_shapes(tmp_path, tool, [entry])
    with refused(SHAPES_OF[tool][0].split("*")[0], " 1"):
        find_masks(tmp_path)


@pytest.mark.parametrize(("url", "file"), [
    ("/data/upload/3/4f0a1b2c-a_b.jpg", "4f0a1b2c-a_b.jpg"), ("/data/upload/3/4f0a1b2c-a_b.jpg", "a_b.jpg"),
    ("/data/upload/3/4f0a1b2c-a_b.jpg", "a b.jpg"), ("/data/local-files/?d=dir/a%20%C3%A9.jpg", "a é.jpg"),
    ("s3://bucket/dir/a b.jpg", "a b.jpg"), ("https://host:80/dir/a%20b.jpg?X-Amz-Date=1&d=2", "a b.jpg"),
    ("gs://bucket/a.jpg", "a.jpg"), ("dir\\a.jpg", "a.jpg")])
def test_names_of_images_in_label_studio(url, file, tmp_path):
    TOOLS["Label Studio"](tmp_path)
    image = next(tmp_path.rglob("shot 0.jpg"))
    image.rename(image.with_name(file))
    path = next(tmp_path.glob("*.json"))
    tasks = json.loads(path.read_text())
    tasks[0]["data"] = dict(id=7, text="shot 1", image=url)
    path.write_text(json.dumps(tasks))
    assert file in {sample.image.name for sample in find_masks(tmp_path).samples}


@pytest.mark.parametrize(("tool", "truths", "taken"), [
    ("Label Studio", (False, False), "tree"), ("Label Studio", (True, False), "car"),
    ("Label Studio, JSON-MIN", (False, False), "tree")])
def test_of_several_annotations_the_ground_truth_or_the_last_is_taken(tool, truths, taken, tmp_path):
    TOOLS[tool](tmp_path)
    path = next(tmp_path.glob("*.json"))
    tasks, regions = json.loads(path.read_text()), [
        studio("polygonlabels", label, points=[[25, 25], [75, 25], [75, 75]]) for label in ("car", "tree")]
    if tool == "Label Studio":
        done = tasks[0]["annotations"][0]
        tasks[0]["annotations"] = [{**done, "result": [region], "ground_truth": truth}
                                   for region, truth in zip(regions, truths, strict=True)]
        tasks[1]["annotations"] = []
    else:
        first = {**tasks[0], "label": [{**regions[0]["value"], "original_width": 112, "original_height": 84}]}
        tasks[0] = {**first, "label": [{**regions[1]["value"], "original_width": 112, "original_height": 84}]}
        tasks.insert(0, first)
    path.write_text(json.dumps(tasks))
    content = find_masks(tmp_path)
    assert sum("task 11" in note for note in content.notes) == 1
    assert len(content.samples) == (5 if tool == "Label Studio" else 6)  # one is not annotated
    names, mask = load_mask(tmp_path)
    assert names[mask[30, 80]] == taken


@pytest.mark.parametrize(("attributes", "named"), [
    ([dict(Name="x", kind="car"), dict(Name="", kind="tree")], "Name"),  # by its name
    ([dict(a="car", b="x"), dict(a="tree")], "a"),  # all regions have it
])
def test_which_attribute_of_via_is_the_class_is_said(attributes, named, tmp_path):
    regions = [{**via_region("rect", x=30 * index, y=20, width=20, height=30), "region_attributes": values}
               for index, values in enumerate(attributes)]
    assert class_attribute(attributes)[0] == named
    write_shapes(tmp_path, "VIA 2, JSON", regions)
    path = tmp_path / "via_export_json.json"
    content = dict(list(json.loads(path.read_text()).items())[:1])
    path.write_text(json.dumps(content))
    if named == "Name":  # which one region lacks
        with refused("region 2"):
            find_masks(tmp_path)
    else:
        assert any(" a, " in note for note in find_masks(tmp_path).notes)


def test_bombs_of_entities_and_broken_xml_are_refused(tmp_path):
    TOOLS["CVAT for images"](tmp_path)
    path = tmp_path / "annotations.xml"
    text, names = path.read_text(), "abcdefghijk"
    entities = [f'<!ENTITY {name} "{10 * f"&{inner};"}">' for inner, name in pairwise(names)]
    bomb = f'<!DOCTYPE annotations [<!ENTITY a "ha">{"".join(entities)}]>'
    for broken in (text.replace("<annotations>", f"{bomb}<annotations>").replace('"car"', '"&k;"'),
                   text.replace("</image>", "", 1)):
        path.write_text(broken)
        with refused("annotations.xml"):
            find_masks(tmp_path)


@pytest.mark.parametrize(("tool", "change", "named"), [
    ("COCO", lambda content: content["images"][0].update(file_name="gone.jpg"), "gone.jpg"),
    ("COCO", lambda content: content["images"].append(content["images"][0]), "train2017.json image 0"),
    ("COCO", lambda content: content["images"].append({**content["images"][0], "id": 9}),
     "train2017.json image 9"),
    ("COCO", lambda content: content["categories"][0].update(name="car"), "train2017.json"),
    ("COCO", lambda content: content.update(images=5), "train2017.json"),
    ("labelme", lambda content: content.update(shapes={"a": 1}), "shot 0.json"),
    ("labelme", lambda content: content.update(imagePath="shot 1.jpg"), "shot 0.json"),
    ("Supervisely", lambda content: content["objects"][0].update(classTitle="boat"), "shot 0.jpg.json"),
])
def test_broken_json_files_are_named(tool, change, named, tmp_path):
    TOOLS[tool](tmp_path)
    edit(tmp_path, tool, change)
    with refused(named):
        find_masks(tmp_path)


@pytest.mark.parametrize(("tool", "file", "text", "named"), [
    ("COCO", "annotations/instances_train2017.json", '{"images": [', "train2017.json"),
    ("labelme", "shot 0.jpg", None, "shot 0.jpg"),
    ("Label Studio, masks without JSON", "images/12.jpg", None, "task-12-annotation"),
    ("SuperAnnotate, pixel masks", "train/shot 0.jpg___save.png", None, "shot 0.jpg___pixel.json class car"),
    ("SuperAnnotate, pixel masks", "train/shot 0.jpg___save.png", "x", "shot 0.jpg___pixel.json class car"),
    ("SuperAnnotate, pixel masks", "classes/classes.json", '[{"id": 881}]', "classes.json"),
    *(("VIA 2, CSV", "via_export_csv.csv", f"#filename,region_shape_attributes,region_attributes\n{row}\n",
       "via_export_csv.csv") for row in ("shot 0.jpg", "shot 0.jpg,x,{}", f"shot 0.jpg,{'[' * 99999},{{}}",
                                         f"shot 0.jpg,{'[' * 200000},{{}}", "shot 0.jpg,[1],{}")),
    ("ISAT", "isat.yaml", "[", "isat.yaml"),
    ("ISAT", "isat.yaml", "labels: []", "isat.yaml"),
    ("YOLO, Ultralytics", "labels/train/shot 0.txt", "0 0.1 0.1 0.2 0.2 0.3", "shot 0.txt line 1"),
    ("YOLO, Ultralytics", "labels/train/shot 0.txt", "0 0.1 0.1 0.2 0.2\n", "shot 0.txt line 1"),
    ("YOLO, Ultralytics", "labels/train/shot 0.txt", "\n7 0.1 0.1 0.2 0.2 0.3 0.1", "shot 0.txt line 2"),
    ("YOLO, Ultralytics", "labels/train/shot 0.txt", "0 0.1 0.1 nan 0.2 0.3 0.1", "shot 0.txt line 1"),
    ("YOLO, Ultralytics", "labels/shot 1.txt", "", "labels/shot 1.txt"),
    ("YOLO, Ultralytics", "data.yaml", "names: [a, a]", "data.yaml"),
    ("YOLO, Ultralytics", "data.yaml", "{", "data.yaml"),
    ("YOLO, Ultralytics", "data.yaml", "names: {a: b}", "data.yaml"),
])
def test_missing_and_broken_files_are_named(tool, file, text, named, tmp_path):
    TOOLS[tool](tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with refused(named):
        find_masks(tmp_path)


DARWIN = dict(version="2.0", item=dict(name="shot 0.jpg", slots=[dict(type="image")]), annotations=[])
DARWIN_1 = dict(dataset="d", image=dict(original_filename="shot 0.jpg"), annotations=[])


@pytest.mark.parametrize(("file", "content", "advice"), [
    ("annotations.xml", '<annotations><meta></meta><track id="0" label="car"></track></annotations>',
     "CVAT for images"),
    ("shot 0.xml", "<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>", "COCO"),
    ("_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\nshot 0.jpg,9,9,car,1,1,2,2\n",
     "COCO Segmentation"),
    ("_annotations.createml.json", [dict(image="shot 0.jpg", annotations=[dict(
        label="car", coordinates=dict(x=1, y=1, width=2, height=2))])], "COCO Segmentation"),
    ("export.ndjson", 2 * '{"data_row":{"id":"a"},"media_attributes":{"height":9},"projects":{}}\n', "PNG"),
    ("shot 0.json", DARWIN, "darwin-py"), ("shot 0.json", DARWIN_1, "darwin-py"),
    ("labels.json", [dict(label_hash="a", data_units={"b": dict(labels={})})], "COCO"),
    ("panoptic_val2017.json", dict(images=[], categories=[], annotations=[dict(
        image_id=1, file_name="a.png", segments_info=[])]), "instances_"),
])
def test_what_is_not_read_is_refused_with_what_to_export(file, content, advice, tmp_path):
    list(scenes(tmp_path, "{name}.jpg"))
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(file, "not read", advice):
        find_masks(tmp_path)


HOSTILE = [None, True, -3, 0, 1, 3, 10**4, 10**5, 10**12, 10**400, math.nan, math.inf, -1e308, 1e308, 0.5, "",
           "é", "../x", "a" * 300, "\0", "nan", "-1", "1e400", "9" * 400, "0.5 0.5", "<", "&a;", "\n", [], {},
           [[]], [[1]], [None], {"size": [1, 1]}, [[[[1, "x"]]]]]
HOSTILE_TEXTS = [value if isinstance(value, str) else json.dumps(value) for value in HOSTILE]
FIELDS = {".xml": r'(?<==")[^"]*(?=")|(?<=>)[^<\n]+(?=<)', ".csv": r'"(?:[^"]|"")*"|[^",\n]+'}  # else words


def entries_of(content):
    """Return (container, key) of all values in a JSON content."""
    pairs = list(content.items() if isinstance(content, dict) else enumerate(content))
    entries = [(content, key) for key, _ in pairs]
    for _, value in pairs:
        if isinstance(value, (dict, list)):
            entries += entries_of(value)
    return entries


def hostile_json(text, rng):
    """Return a JSON text with a value replaced, or left out."""
    contents = [json.loads(text)]
    container, key = rng.choice(entries_of(contents))
    if rng.random() < 0.1 and container is not contents:
        del container[key]
    else:
        container[key] = rng.choice(HOSTILE)
    return json.dumps(contents[0])


def hostile_text(text, ending, rng):
    """Return the text of a file with a value replaced, left out, or with all after a place missing."""
    if rng.random() < 0.03:
        return text[:rng.randrange(len(text))]
    if ending in (".json", ".geojson"):
        return hostile_json(text, rng)
    field = rng.choice(list(re.finditer(FIELDS.get(ending, r"[^ \n]+"), text)))
    value = "" if rng.random() < 0.1 else rng.choice(HOSTILE_TEXTS)
    if ending == ".csv" and field[0].startswith('"{'):  # JSON in a cell
        value = hostile_json(field[0][1:-1].replace('""', '"'), rng) if rng.random() < 0.8 else value
        value = '"' + value.replace('"', '""') + '"'
    return text[:field.start()] + value + text[field.end():]


@pytest.mark.parametrize("count", [6, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize("tool", TOOLS)
def test_any_value_replaced_gives_masks_or_a_message(tool, count, tmp_path):
    TOOLS[tool](tmp_path)
    rng = random.Random(0)
    texts = {path: path.read_text() for path in sorted(tmp_path.rglob("*"))
             if path.suffix in (".json", ".geojson", ".xml", ".csv", ".txt", ".yaml")}
    for _ in range(count if texts else 0):
        path, text = rng.choice(list(texts.items()))
        changed = hostile_text(text, path.suffix, rng)
        path.write_text(changed)
        start = time.monotonic()
        with suppress(InputError):
            for sample in find_masks(tmp_path, skip_bad_labels=rng.random() < 0.5).samples:
                with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
                    assert image.size == mask.size, changed
        assert time.monotonic() - start < 60, changed
        path.write_text(text)


# --- folders and the cache --------------------------------------------------------------------------------
@pytest.mark.parametrize("above", ["labels", "images/labels"])
def test_names_of_folders_above_the_root_say_nothing(above, tmp_path):
    root = tmp_path / above / "yolo labels"
    truth = TOOLS["YOLO, Ultralytics"](root)
    (root / "train.txt").write_text("images/train/shot 0.jpg\n")
    assert {sample.image for sample in samples_of(load("folder", root)).values()} == truth.keys()


@pytest.mark.parametrize(("tool", "change"), [
    ("labelme", lambda content: content["shapes"].pop()),
    ("Label Studio, masks",  # images swapped
     lambda tasks: (tasks[0].update(id=12), tasks[1].update(id=11)))])
def test_masks_are_drawn_once_and_again_when_the_annotations_change(tool, change, tmp_path):
    TOOLS[tool](tmp_path)
    before = samples_of(load("folder", tmp_path))
    times = [sample.mask.stat().st_mtime_ns for sample in before.values()]
    masks = [sample.mask.read_bytes() for sample in before.values()]
    again = samples_of(load("folder", tmp_path))
    assert again == before and times == [sample.mask.stat().st_mtime_ns for sample in again.values()]
    edit(tmp_path, tool, change)
    after = samples_of(load("folder", tmp_path))
    assert masks != [after[stem].mask.read_bytes() for stem in before]


# --- classes ----------------------------------------------------------------------------------------------
def test_classes_in_an_order_of_ones_own(tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path)
    names, mask = load_mask(tmp_path, classes=("tree", "background", "boat", "car"))
    assert names == ["tree", "background", "boat", "car"]
    assert (np.array([1, 3, 0])[load_mask(tmp_path)[1]] == mask).all()
    with refused("tree"):
        load("folder", tmp_path, classes=("background", "car"))


@pytest.mark.parametrize("classes", [(), ("tree", "car")])
def test_what_has_no_label_is_background_or_not_counted(tmp_path, classes):
    truth = TOOLS["labelme"](tmp_path)

    def label(content):
        for name, left in (("_background_", 0), ("__ignore__", 20)):
            square = [[left, 0], [left + 9, 0], [left + 9, 9], [left, 9]]
            content["shapes"].append({**content["shapes"][0], "label": name, "points": square})

    nothing = truth[tmp_path / "shot 0.jpg"] == 0
    names, mask = load_mask(tmp_path, unlabelled="ignore", classes=classes)
    assert names == list(classes or ("car", "tree")) and ((mask == 255) == nothing).mean() > 0.985
    edit(tmp_path, "labelme", label)
    names, mask = load_mask(tmp_path)
    assert names == ["background", "car", "tree"] and (mask[2:8, 2:8] == 0).all()
    assert (mask[2:8, 22:28] == 255).all() and (mask == 0)[nothing].mean() > 0.8
    names, mask = load_mask(tmp_path, unlabelled="ignore")
    assert names == ["background", "car", "tree"] and (mask[2:8, 2:8] == 0).all()
    assert (mask[40:, :] != 0).all() and (mask[2:8, 22:28] == 255).all()


# --- commands ---------------------------------------------------------------------------------------------
PAINTED = {"CVAT, painted masks", "Roboflow, masks"}  # which need not be drawn
QUICK = {"COCO, Roboflow"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in TOOLS])
def test_check_train_evaluate_and_infer_take_the_folder_as_it_is(name, tmp_path, run):
    root, out = tmp_path / "data", tmp_path / "out"
    truth = TOOLS[name](root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, text, err = run(check_data, "--data-root", root, "--out-dir", tmp_path)
    assert code == 0, text + err
    flags = ["--device", "cpu", "--out-dir", out]
    training = ["--dataset", "folder", "--data-root", root, "--epochs", 1, "--workers", 0, "--imgsz", 42, 56]
    code, text, err = run(train, *training, "--backbone", "vit_tiny", "--head", "bn", *flags)
    assert code == 0 and all(name in text for name in NAMES), err
    model, elsewhere = out / "best_model_iou.pth", tmp_path / "moved"
    root.rename(elsewhere)
    assert run(evaluate, "--model", model, "--data-root", elsewhere, *flags)[0] == 0
    scored = json.loads((out / "evaluation/metrics.json").read_text())["protocol"]
    trained = json.loads((out / "config.json").read_text())
    assert scored["data_fingerprint"] == trained["data_fingerprint"]
    code, _, err = run(infer_image, "--model", model, "--input",
                       elsewhere / next(iter(truth)).relative_to(root), *flags)
    assert code == 0, err
    assert {path: (elsewhere / path.relative_to(root)).read_bytes() for path in before} == before


def test_check_data_takes_unlabelled_as_train_does(tmp_path, run):
    TOOLS["labelme"](tmp_path / "data")
    flags = ["--data-root", tmp_path / "data", "--out-dir", tmp_path / "out", "--unlabelled", "ignore"]
    code, text, err = run(check_data, *flags)
    command = next(line for line in text.splitlines() if line.startswith("  python train.py "))
    assert code == 0 and command.endswith("--unlabelled ignore"), text + err
    source = load("folder", tmp_path / "data", unlabelled="ignore")
    masks = [read_sample(sample, source.table)[1]["mask"].numpy() for sample in samples_of(source).values()]
    assert f"{100 * np.mean([mask == 255 for mask in masks]):.1f} %" in text
    assert run(check_data, "--dataset", "camvid", "--unlabelled", "ignore")[0] == 2
    assert run(check_data, *flags, "--fix", tmp_path / "clean")[0] == 0
    assert [name for name, _ in load("folder", tmp_path / "clean").classes] == ["car", "tree"]


# --- a black and white mask for each class or object ------------------------------------------------------
MASK_TREES = {  # of the images of a split: (image, mask)
    "masks/car/1.png": ("images/{name}.png", "masks/{label}/{name}.png"),
    "masks/car/train/1.png": ("images/{split}/{name}.jpg", "masks/{label}/{split}/{name}.png"),
    "train/masks/car/1.png": ("{split}/images/{name}.jpg", "{split}/masks/{label}/{name}.png"),
    "car_masks/1.png": ("images/{name}.jpg", "{label}_masks/{name}.png"),
    "car/1.png": ("images/{name}.jpg", "{label}/{name}.png"),
    "masks/1_car.png": ("images/{name}.jpg", "masks/{name}_{label}.png"),
    "masks/train/1_car_mask.png": ("images/{split}/{name}.jpg", "masks/{split}/{name}_{label}_mask.png"),
    "1_car.png beside 1.jpg": ("{name}.jpg", "{name}_{label}.png"),
    "masks/1/car.png": ("images/{name}.jpg", "masks/{name}/{label}.png"),
    "1/masks/car.png": ("train/{name}/images/{name}.png", "train/{name}/masks/{label}.png"),
}


@pytest.mark.parametrize("tree", MASK_TREES)
def test_a_mask_of_each_class_in_every_layout(tree, tmp_path):
    truth = class_masks(tmp_path, *MASK_TREES[tree])
    with pytest.raises(NoMasks):
        find_pairs(tmp_path)
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == list(NAMES)
    samples = samples_of(source)
    assert {sample.image for sample in samples.values()} == truth.keys()
    for sample in samples.values():
        assert (read_sample(sample, source.table)[1]["mask"].numpy() == truth[sample.image]).all()


def test_a_mask_of_each_object_of_an_image(tmp_path):
    """Data Science Bowl 2018: a class, called object, and names without a meaning."""
    truth = class_masks(tmp_path, "stage1_train/{name}/images/{name}.png",
                        "stage1_train/{name}/masks/{name}{label}.png")
    save(tmp_path / "stage1_test/x/images/x.png", np.zeros((84, 112, 3), np.uint8))
    names, mask = load_mask(tmp_path)
    expected = truth[tmp_path / "stage1_train/shot 0/images/shot 0.png"] > 0
    assert names == ["background", "object"] and (mask == expected).all()
    assert len(find_masks(tmp_path).samples) == len(truth)


def test_masks_of_classes_that_no_image_shares_are_not_one_class(tmp_path):
    """Each image has the mask of one class, so that images and masks pair by name."""
    truth = class_masks(tmp_path, *MASK_TREES["masks/car/1.png"])
    for path in tmp_path.glob("masks/*/*.png"):
        if (path.parent.name == "car") != (path.stem in ("shot 0", "shot 1", "shot 2")):
            path.unlink()
    assert find_pairs(tmp_path).samples
    names, mask = load_mask(tmp_path, "shot 4")
    assert names == list(NAMES) and (mask == 2 * (truth[tmp_path / "images/shot 4.png"] == 2)).all()


def test_of_masks_of_classes_that_overlap_the_smaller_lies_above(tmp_path):
    class_masks(tmp_path, *MASK_TREES["masks/car/1.png"])
    for label, size in (("car", 20), ("tree", 40)):
        pixels = np.zeros((84, 112), np.uint8)
        save(tmp_path / f"masks/{label}/shot 1.png", pixels)  # empty
        pixels[10:10 + size, 10:10 + size] = 1
        save(tmp_path / f"masks/{label}/shot 0.png", pixels)
    _, mask = load_mask(tmp_path)
    assert (mask[10:30, 10:30] == 1).all() and (mask[30:50, 10:50] == 2).all()
    assert not load_mask(tmp_path, "shot 1")[1].any()
    assert any("25 %" in note for note in find_masks(tmp_path).notes)


def test_classes_that_cover_the_same_pixels_are_a_doubt(tmp_path):
    class_masks(tmp_path, *MASK_TREES["masks/car/1.png"])
    assert not find_masks(tmp_path).doubts
    for path in (tmp_path / "masks/car").iterdir():
        path.write_bytes((tmp_path / "masks/tree" / path.name).read_bytes())
    assert len(find_masks(tmp_path).doubts) == 1


def test_masks_of_classes_of_equal_names_in_two_splits(tmp_path):
    truth = class_masks(tmp_path, "{split}_images/{name}.jpg", "{split}_masks/{label}/{name}.png")
    for path in [*tmp_path.glob("val_*/shot 2.jpg"), *tmp_path.glob("val_*/*/shot 2.png")]:
        path.rename(path.with_stem("shot 0"))
    source = load("folder", tmp_path)
    for split, name in (("train", "shot 0"), ("val", "shot 2")):
        sample, = (sample for sample in source.splits[split] if sample.image.stem == "shot 0")
        mask = read_sample(sample, source.table)[1]["mask"].numpy()
        assert (mask == truth[tmp_path / f"{split}_images/{name}.jpg"]).all()


@pytest.mark.parametrize(("image", "mask"), [
    ("images/{name}.jpg", "masks/{name}.png"), ("images/{name}.jpg", "masks/drawn/{name}.png"),
    ("images/{label}/{name}.jpg", "masks/{label}/{name}.png")])
def test_other_masks_are_not_taken_for_masks_of_classes(image, mask, tmp_path):
    class_masks(tmp_path, image.format(name="{name}", label="car"), mask.format(name="{name}", label="car"))
    assert not find_masks(tmp_path).entries


@pytest.mark.parametrize(("content", "named"), [
    (None, "masks/car/shot 9.png"), (b"x", "masks/car/shot 1.png"),
    (np.arange(84 * 112, dtype=np.uint8).reshape(84, 112), "masks/car/shot 1.png"),
    (np.eye(50, dtype=np.uint8), "images/shot 1.png")])
def test_broken_masks_of_classes_are_named(content, named, tmp_path):
    class_masks(tmp_path, *MASK_TREES["masks/car/1.png"])
    path = tmp_path / "masks/car/shot 1.png"
    if content is None:
        path.rename(path.with_stem("shot 9"))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with refused(named):
        find_masks(tmp_path)


# --- run lengths in CSV -----------------------------------------------------------------------------------
HEADS = {  # titles of the columns: (a row, the classes, with which ids in the masks)
    "ImageId,EncodedPixels,ClassId": ("{file},{runs},{id}", ["class 1", "class 2"]),
    "ImageId_ClassId,EncodedPixels": ("{file}_{id},{runs}", ["class 1", "class 2"]),
    "Image_Label,EncodedPixels": ("{file}_{label},{runs}", ["car", "tree"]),
    "image_id,class_id,rle": ("{name},{label},{runs}", ["car", "tree"]),
    "id,rle_mask": ("{name},{runs}", ["object"]),
    " ImageId, EncodedPixels": ("{name}, {runs}", ["object"]),
    "img,rle_mask": ("{file},{runs}", ["object"]),
    "ImageId,EncodedPixels,Height,Width,ClassId": (
        "{name},{runs},{height},{width},{label}", ["car", "tree"]),
}


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("titles", HEADS)
def test_run_lengths_under_every_head(titles, by_columns, tmp_path):
    row, classes = HEADS[titles]
    truth = kaggle(tmp_path, titles, row, by_columns=by_columns)
    (tmp_path / "sample_submission.csv").write_text(f"{titles}\nx.jpg,1 1\n")
    source = load("folder", tmp_path)
    assert [name for name, _ in source.classes] == ["background", *classes]
    assert len(samples_of(source)) == len(truth)
    for sample in samples_of(source).values():
        expected = np.minimum(truth[sample.image], len(classes))
        assert (read_sample(sample, source.table)[1]["mask"].numpy() == expected).all()
    assert not find_masks(tmp_path).doubts


def test_run_lengths_of_square_images_are_taken_by_columns_and_that_is_a_doubt(tmp_path):
    mask = np.zeros((60, 60), bool)
    mask[10:20, 5:55] = True
    lines = ["ImageId,EncodedPixels"]
    for number in range(3):
        save(tmp_path / f"{number}.png", np.zeros((60, 60, 3), np.uint8))
        lines.append(f"{number}.png,{pairs_of_runs(mask)}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    assert (load_mask(tmp_path, "0")[1] == mask).all() and len(find_masks(tmp_path).doubts) == 1


def test_runs_of_smaller_shapes_lie_above_and_an_empty_cell_is_background(tmp_path):
    kaggle(tmp_path)
    small, large = np.zeros((2, 84, 112), bool)
    small[20:30, 20:30] = large[10:50, 10:60] = True
    lines = ["ImageId,EncodedPixels,ClassId", f"shot 0.jpg,{pairs_of_runs(small)},1",
             f"shot 0.jpg,{pairs_of_runs(large)},2", "shot 1.jpg,,1", "shot 3.jpg,-1,"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    _, mask = load_mask(tmp_path)
    assert (mask == 2 * large - 1 * small).all() and not load_mask(tmp_path, "shot 1")[1].any()
    assert {sample.image.stem for sample in find_masks(tmp_path).samples} == {"shot 0", "shot 1", "shot 3"}


@pytest.mark.parametrize("text", [
    "1 3 9", "0 5", "9408 2", "1 3 2 4", "5 0", "5 -1", "a b", "1.5 2", "99999999999999999999 1",
    "9223372036854775807 9223372036854775807", "1_0 1"])
def test_broken_run_lengths_are_named_with_their_line(text, tmp_path):
    kaggle(tmp_path, "Id,EncodedPixels", "{file},{runs}")
    path = tmp_path / "train.csv"
    path.write_text(path.read_text() + f"shot 0.jpg,{text}\n")
    with refused("train.csv line 14"):
        find_masks(tmp_path)


@pytest.mark.parametrize(("line", "named"), [
    ("gone.jpg,1 1,1", "gone.jpg"), ("shot 0.jpg", "train.csv line 14"),
    ("shot 0.jpg,1 1,", "train.csv line 14")])
def test_broken_rows_of_run_lengths_are_named(line, named, tmp_path):
    kaggle(tmp_path)
    path = tmp_path / "train.csv"
    path.write_text(path.read_text() + line)
    with refused(named):
        find_masks(tmp_path)


@pytest.mark.parametrize("text", [
    "ImageId,Label\na.jpg,cat\n", "id,annotation\n1,a cat\n", "", "\x00", "id,mask\na,a.png\n"])
def test_other_csv_files_are_no_run_lengths(text, tmp_path):
    kaggle(tmp_path)
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(NoMasks):
        find_masks(tmp_path)


# --- polygons on a map ------------------------------------------------------------------------------------
RING = np.array([(10.2, 8.1), (90.3, 15.2), (70.7, 75.6), (20.4, 60.9)])
HOLE = np.array([(40.3, 30.2), (60.1, 30.4), (55.5, 50.3), (38.2, 45.1)])


@pytest.fixture
def tile(tmp_path):
    """A folder with GeoTIFFs and the (path, transform) of the first."""
    (_, path, _, transform), *_ = tiles(tmp_path)
    return tmp_path, path, transform


def inside(polygon, transform, crs, size=(84, 112)):
    """Return (H, W) bool: whose pixel centers are in a polygon of shapely, in a reference system."""
    shapely = pytest.importorskip("shapely")
    rows, columns = np.mgrid[:size[0], :size[1]] + 0.5
    a, b, c, d, e, f = transform[:6]
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    x, y = map(np.array, warp.transform(METERS, crs, x.ravel(), y.ravel()))
    return shapely.contains_xy(polygon, x, y).reshape(size)


@pytest.mark.parametrize("code", [4326, 32633, 3035, 2180])  # of the last, the first axis is north
def test_polygons_on_a_map_cover_the_pixels_whose_centers_are_inside(code, tile):
    """Of a turned image and other reference systems, with a hole, each polygon by itself, beyond the edge."""
    shapely = pytest.importorskip("shapely")
    root, path, transform = tile
    crs = CRS.from_epsg(code)
    polygons = [[on_map(ring + move, transform, crs) for ring in (RING, HOLE)] for move in (0, (60, 30))]
    content = features([("car", [])])
    content["crs"] = dict(type="name", properties=dict(name=f"urn:ogc:def:crs:EPSG::{code}"))
    if code == 4326:
        content.pop("crs")
    content["features"][0]["geometry"] = dict(type="MultiPolygon", coordinates=polygons)
    dump(path.with_suffix(".geojson"), content)
    expected = np.any([inside(shapely.Polygon(outer, [hole]), transform, crs) for outer, hole in polygons], 0)
    _, mask = load_mask(root)
    assert (mask == expected).all() and 3000 < expected.sum() < 8000


def test_one_file_is_cut_to_all_tiles_that_it_touches(tmp_path):
    """A tile between the others is background, one beyond them is not used."""
    shapely = pytest.importorskip("shapely")
    found = list(tiles(tmp_path))
    far = np.array([(-20.0, 20.0), (440.0, 190.0), (440.0, 230.0), (-20.0, 60.0)])  # over the first three
    polygons = [("car", on_map(far, found[0][3])), ("tree", on_map(RING, found[4][3]))]
    dump(tmp_path / "labels.geojson", features(polygons))
    samples = {sample.image for sample in find_masks(tmp_path).samples}
    assert samples == {path for _, path, _, _ in found[:5]}
    for _, path, _, transform in found[:5]:
        names, mask = load_mask(tmp_path, path.stem)
        expected = np.zeros((84, 112), int)
        for id, (_, positions) in enumerate(polygons, 1):
            expected[inside(shapely.Polygon(positions), transform, DEGREES)] = id
        assert (mask == expected).all() and names == list(NAMES)
        assert expected.any() == (path.stem != "shot 3")


@pytest.mark.parametrize(("properties", "names"), [
    ([dict(id=1, Type="car"), dict(id=2, Type="tree")], ["car", "tree"]),
    ([dict(surface="car", area=2.5), dict(surface="tree", area=3.5)], ["car", "tree"]),
    ([dict(label=1, note="x"), dict(label=2, note="y")], ["class 1", "class 2"]),
    ([dict(area=1.5), dict(area=2.5)], ["object"]), ([None, None], ["object"])])
def test_the_property_that_names_the_classes(properties, names, tile):
    root, path, transform = tile
    content = features([("x", on_map(ring, transform)) for ring in (RING, HOLE)])
    for feature, values in zip(content["features"], properties, strict=True):
        feature["properties"] = values
    dump(path.with_suffix(".geojson"), content)
    found, mask = load_mask(root)
    assert found == ["background", *names]
    assert mask[40, 50] == len(names) and mask[20, 30] == 1  # the smaller lies above


def test_files_without_such_a_property_are_the_classes_themselves(tile):
    root, path, transform = tile
    for name, ring in (("houses", RING), ("pools", HOLE)):
        dump(root / f"{name}.geojson", features([(1.5, on_map(ring, transform))]))
    names, mask = load_mask(root)
    assert names == ["background", "houses", "pools"] and mask[40, 50] == 2 and mask[20, 30] == 1


def test_coordinates_without_a_reference_system(tile):
    """Numbers beyond 180 are no degrees; beside an image that lies nowhere they are pixels."""
    root, path, transform = tile
    dump(path.with_suffix(".geojson"), features([("car", on_map(RING, transform, METERS))]))
    save(root / "plain.png", np.zeros((84, 112, 3), np.uint8))
    dump(root / "plain.geojson", features([("car", [*RING.tolist(), RING[0].tolist()])]))
    assert len(find_masks(root).doubts) == 1
    first, second = load_mask(root)[1], load_mask(root, "plain")[1]
    assert (first != second).mean() < 0.015 and first.sum() > 2000


def test_coordinates_beside_an_image_without_georeference(tmp_path):
    """They are pixels; QGIS counts its rows as negative numbers, and degrees have no place in it."""
    save(tmp_path / "plain.jpg", np.zeros((84, 112, 3), np.uint8))
    dump(tmp_path / "plain.geojson", features([("car", [*RING.tolist(), RING[0].tolist()])]))
    assert load_mask(tmp_path, "plain")[1].sum() > 2000
    for ring, reason in ((RING * (1, -1), "y runs upward"), (RING / 1e5 + (13.5, 52.3), "degrees")):
        dump(tmp_path / "plain.geojson", features([("car", [*ring.tolist(), ring[0].tolist()])]))
        with refused("plain.geojson", reason):
            find_masks(tmp_path)


def test_annotations_of_qupath(tmp_path):
    """Holes, classes that are derived or not counted, and cells, which are left aside."""
    TOOLS["QuPath"](tmp_path)
    kinds = [("annotation", dict(name="Tumor: Positive")), ("annotation", "Ignore*"), ("cell", "x")]
    entries = []
    for number, (kind, label) in enumerate(kinds):
        square = 5 + 20 * number + np.array([(0, 0), (16, 0), (16, 16), (0, 16), (0, 0)])
        hole = 5 + 20 * number + np.array([(4, 4), (8, 4), (8, 8), (4, 8), (4, 4)])
        entries.append(dict(type="Feature", id="1-2", properties=dict(objectType=kind, classification=label),
                            geometry=dict(type="Polygon", coordinates=[square.tolist(), hole.tolist()])))
    (tmp_path / "train/shot 0.geojson").unlink()
    dump(tmp_path / "train/geojsons/shot 0.png_Annotations.json", entries)
    names, mask = load_mask(tmp_path)
    expected = np.zeros((84, 112), int)
    expected[5:21, 5:21], expected[25:41, 25:41] = names.index("Tumor: Positive"), 255
    expected[9:13, 9:13] = expected[29:33, 29:33] = 0
    assert (mask == expected).all() and "x" not in names
    dump(tmp_path / "train/geojsons/shot 0.png_Annotations.json", entries[2:])
    assert "x" in load_mask(tmp_path)[0]  # nothing but cells


def test_one_property_is_the_class_in_all_files_with_the_same_ones(tmp_path):
    """Though in the first of them another one alone looks like it."""
    for number, (_, path, _, transform) in enumerate(tiles(tmp_path)):
        content = features([("x", on_map(ring, transform)) for ring in (RING, HOLE)], "quality")
        for feature, kind in zip(content["features"], ("car", "tree"), strict=True):
            feature["properties"]["sort"] = kind if number else None
        dump(path.with_suffix(".geojson"), content)
    with refused("shot 0.geojson feature 1"):
        find_masks(tmp_path)
    (tmp_path / "train/shot 0.geojson").unlink()
    assert load_mask(tmp_path, "shot 1")[0] == list(NAMES)


BROKEN_FEATURES = [
    dict(geometry=None), dict(geometry=dict(type="Polygon")), dict(geometry=5), dict(geometry="a line"),
    dict(properties=dict(label="")), dict(properties=7), dict(geometry=dict(type="Polygon", coordinates=[])),
    dict(geometry=dict(type="Polygon", coordinates=[[[1, "a"]] * 4])),
    dict(geometry=dict(type="Polygon", coordinates=[[[1, float("nan")]] * 4])),
    dict(geometry=dict(type="CurvePolygon", coordinates=[])),
]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("values", BROKEN_FEATURES)
def test_broken_features_are_named(values, beside, tile):
    root, path, transform = tile
    content = features([("car", on_map(RING, transform))] * 3, "label")
    if values.get("geometry") == "a line":
        values = dict(geometry=dict(type="Polygon", coordinates=[on_map(RING[:2], transform)]))
    content["features"][0].update(values)
    file = path.with_suffix(".geojson") if beside else root / "all.geojson"
    dump(file, content)
    with refused(f"{file.name} feature 1"):
        find_masks(root)


@pytest.mark.parametrize(("change", "named"), [
    (lambda content: content.update(crs=dict(properties=dict(name="EPSG:1"))), "a.geojson"),
    (lambda content: content.update(crs=dict(properties=dict(name="EPSG:3857"))), "a.geojson"),
    (lambda content: content.update(crs="x"), "a.geojson"),
    (lambda content: content["features"].clear(), "no shape"),
    (lambda content: content["features"].append(7), "a.geojson feature 2")])
def test_broken_files_on_a_map_are_named(change, named, tile):
    root, _, transform = tile
    content = features([("car", on_map(RING, transform))])
    change(content)
    dump(root / "a.geojson", content)
    with refused(named):
        find_masks(root)


@pytest.mark.parametrize(("name", "content", "advice"), [
    ("a.shp", b"", "ogr2ogr"), ("a.gpkg", b"", "a.gpkg"), ("a.gpkg", b"x" * 5000, "a.gpkg")])
def test_files_that_are_no_geopackage_are_named(name, content, advice, tile):
    root, *_ = tile
    (root / name).write_bytes(content)
    with refused(name, advice):
        find_masks(root)


@pytest.mark.parametrize("blob", ["NULL", "x'00'", "x'4750000100000000'", "'text'", "7"])
def test_broken_geometries_of_a_geopackage_are_named(blob, tmp_path):
    TOOLS["GeoPackage"](tmp_path)
    base = sqlite3.connect(tmp_path / "labels.gpkg")
    base.execute(f'UPDATE "my labels" SET geom = {blob} WHERE fid = 2')
    base.commit()
    base.close()
    with refused("labels.gpkg my labels feature 2"):
        find_masks(tmp_path)


def test_without_shapely_a_geopackage_is_named(tmp_path, monkeypatch):
    TOOLS["GeoPackage"](tmp_path)
    monkeypatch.setitem(sys.modules, "shapely", None)
    with refused("labels.gpkg", "pip install shapely"):
        find_masks(tmp_path)


# --- YOLO: which files belong together, and what they mean -------------------------------------------------
def test_a_label_file_that_cannot_be_read_does_not_make_its_image_background(tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path)
    path = tmp_path / "labels/train/shot 0.txt"
    path.write_text(path.read_text(), encoding="utf-16")
    with refused("labels/train/shot 0.txt", "UTF-8"):
        find_masks(tmp_path)
    assert "shot 0" not in {sample.image.stem for sample in find_masks(tmp_path, True).samples}


@pytest.mark.parametrize(("image", "labels", "is_used"), [
    ("images/test/new.jpg", "", False), ("images/train/new.jpg", "", True), ("new.jpg", "", False),
    ("img/train/new.jpg", "images>img", True), ("train/new.jpg", "beside", True)])
def test_images_without_a_label_file_are_background_beside_labeled_ones(image, labels, is_used, tmp_path):
    TOOLS["YOLO, beside the images" if labels == "beside" else "YOLO, Ultralytics"](tmp_path)
    if labels == "images>img":
        (tmp_path / "images").rename(tmp_path / "img")
    save(tmp_path / image, np.zeros((84, 112, 3), np.uint8))
    found = {sample.image.stem for sample in find_masks(tmp_path).samples}
    assert len(found - {"new"}) == 6 and ("new" in found) == is_used
    assert not is_used or not load_mask(tmp_path, "new")[1].any()


def test_each_label_file_takes_the_nearest_list_of_classes(tmp_path):
    truth = {}
    for part, names in (("a", ["car", "tree"]), ("b", ["tree", "boat", "car"])):
        truth |= TOOLS["YOLO, Roboflow"](tmp_path / part)
        (tmp_path / part / "data.yaml").write_text(json.dumps(dict(names=names)))
        for path in (tmp_path / part).rglob("*.txt"):
            lines = path.read_text().splitlines()
            path.write_text("\n".join(f"{names.index(NAMES[1:][int(line[0])])}{line[1:]}" for line in lines))
    (tmp_path / "data.yaml").write_text("names: [x, y, z]")
    (tmp_path / "a/clone").mkdir()
    (tmp_path / "a/clone/coco.yaml").write_text("names: [x, y, z]")
    source = load("folder", tmp_path, val_fraction=0)
    assert [name for name, _ in source.classes] == ["background", "car", "tree", "boat"]
    for samples in source.splits.values():
        for sample in samples:
            mask = read_sample(sample, source.table)[1]["mask"].numpy()
            assert (mask != truth[sample.image]).mean() < 0.015, sample


@pytest.mark.parametrize(("text", "names"), [
    ("names: [yes, no]", ["yes", "no"]), ("names: [1, 1.0]", ["1", "1.0"]),
    ("names: [{0: car}, {1: tree}]", ["car", "tree"]), ("names:\n- 1: car\n- 0: tree", ["tree", "car"]),
    ("names: {'0': car, 1: tree}", ["car", "tree"]), ("names: {0: car, 1: tree, 2: }", ["car", "tree"])])
@pytest.mark.parametrize("file", ["data.yaml", "coco8-seg.yaml", "labels/my.yml"])
def test_names_of_classes_are_text(file, text, names, tmp_path):
    truth = TOOLS["YOLO, Ultralytics"](tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "args.yaml").write_text("epochs: 3\nhead: {names: 7}\n")
    (tmp_path / file).write_text(text)
    found, mask = load_mask(tmp_path)
    mask = np.array([0, *(1 + names.index(name) for name in found[1:])])[mask]
    assert set(found[1:]) == set(names)
    assert (mask != truth[tmp_path / "images/train/shot 0.jpg"]).mean() < 0.015


def test_folders_of_yolo_in_capitals(tmp_path):
    truth = TOOLS["YOLO, Ultralytics"](tmp_path)
    for name in ("images", "labels"):
        (tmp_path / name).rename(tmp_path / name.capitalize())
    assert len(find_masks(tmp_path).samples) == len(truth)


def test_classes_of_yolo_as_fractions(tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path)
    before, path = load_mask(tmp_path)[1], tmp_path / "labels/train/shot 0.txt"
    path.write_text(re.sub("^([01]) ", r"\1.0 ", path.read_text(), flags=re.MULTILINE))
    assert (load_mask(tmp_path)[1] == before).all() and before.any()


@pytest.mark.parametrize(("file", "content", "named"), [
    ("data.yaml", b"names: [car, tree]\nkpt_shape: [3, 2]", ["data.yaml", "kpt_shape"]),
    ("data.yaml", "names: [Bäume, x]".encode("cp1252"), ["data.yaml", "UTF-8"]),
    ("labels/train/shot 0.txt", b"0 .1 .1 .4 .1 .4 .4 .93", ["shot 0.txt line 1", "confidence"]),
    ("labels/train/shot 0.txt", b"0.5 .1 .1 .4 .1 .4 .4", ["shot 0.txt line 1", "class"]),
    ("labels/train/shot 0.txt", b"nan .1 .1 .4 .1 .4 .4", ["shot 0.txt line 1", "class"])])
def test_what_yolo_files_cannot_mean_is_said(file, content, named, tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path)
    (tmp_path / file).write_bytes(content)
    with refused(*named):
        find_masks(tmp_path)


# --- masks of classes: layouts, names, pictures ------------------------------------------------------------
def check_class_masks(root, truth, names=NAMES):
    """Assert that the masks of a folder with these class names are those of {image: mask}."""
    source = load("folder", root, val_fraction=0)
    assert [name for name, _ in source.classes] == list(names)
    assert {sample.image for sample in samples_of(source).values()} == truth.keys()
    for sample in samples_of(source).values():
        mask = read_sample(sample, source.table)[1]["mask"].numpy()
        assert (mask == np.minimum(truth[sample.image], len(names) - 1)).all(), sample


@pytest.mark.parametrize(("image", "mask"), [
    ("images/s{split}/{name}.jpg", "masks/{label}/s{split}/{name}.png"),
    ("images/s{split}/{name}.jpg", "masks/s{split}/{label}/{name}.png"),
    ("images/{name}.jpg", "masks/{label}/{name}_mask.png"), ("images/{name}.jpg", "{label}/gt_{name}.png"),
    ("images/{name}.jpg", "masks/{name}/{name}_{label}.png"),
    ("images/{name}.jpg", "masks/{name}/{label}_gt.png")])
def test_further_layouts_of_masks_of_classes(image, mask, tmp_path):
    check_class_masks(tmp_path, class_masks(tmp_path, image, mask))


def test_a_mask_of_one_scene_is_none_of_another(tmp_path):
    class_masks(tmp_path, "images/s{split}/{name}.jpg", "masks/{label}/S{split}/{name}.png")
    (tmp_path / "images/strain/shot 0.jpg").rename(tmp_path / "images/sval/shot 0.jpg")
    with refused("masks/car/Strain/shot 0.png", "masks/tree/Strain/shot 0.png"):
        find_masks(tmp_path)
    source = load("folder", tmp_path, skip_bad_labels=True)
    assert [name for name, _ in source.classes] == list(NAMES) and "shot 0" not in samples_of(source)


@pytest.mark.parametrize("names", [("Car", "class2"), ("class1", "class2"), ("1", "2")])
@pytest.mark.parametrize("are_shared", [True, False])
def test_names_of_folders_of_classes(names, are_shared, tmp_path):
    truth = class_masks(tmp_path, *MASK_TREES["masks/car/1.png"])
    for old, name in zip(NAMES[1:], names, strict=True):
        (tmp_path / "masks" / old).rename(tmp_path / "masks" / name)
    if not are_shared:
        for number, path in enumerate(sorted(truth)):
            (tmp_path / "masks" / names[number % 2] / path.name).unlink()
            truth[path] *= truth[path] == 2 - number % 2
    if names == ("1", "2") and not are_shared:  # as parts of a data set are called
        check_class_masks(tmp_path, truth, ["background", "foreground"])
    else:
        check_class_masks(tmp_path, truth, ["background", *names])


def test_a_class_of_a_single_image_among_masks_of_each_image(tmp_path):
    truth = class_masks(tmp_path, *MASK_TREES["masks/1/car.png"])
    path = tmp_path / "images/shot 0.jpg"
    truth[path][:9, :9] = 3
    for id, name in enumerate((*NAMES[1:], "zebra"), 1):
        save(tmp_path / f"masks/shot 0/{name}.png", np.uint8(truth[path] == id) * 255)
    check_class_masks(tmp_path, truth, [*NAMES, "zebra"])


@pytest.mark.parametrize("name", ["mask_{}", "mask{}", "obj{}", "Object {}", "{}", "instance-{}"])
def test_numbered_masks_of_each_image_are_objects(name, tmp_path):
    truth = class_masks(tmp_path, *MASK_TREES["masks/1/car.png"])
    for path in tmp_path.glob("masks/*/*.png"):
        path.rename(path.with_stem(name.format(NAMES.index(path.stem))))
    check_class_masks(tmp_path, truth, ["background", "object"])


def as_kind(region, kind):
    """Return (H, W) bool as a PIL image in which something else than its values tells the region."""
    values = Image.fromarray(np.uint8(255) * region)
    if kind in ("RGBA", "LA"):
        noise = np.random.default_rng(0).integers(1, 255, (*region.shape, 3), np.uint8)
        noise[region] = 255
        image = Image.fromarray(noise).convert(kind)
        image.putalpha(values)
        return image
    image = Image.fromarray(np.uint8(region == (kind == "P, 1")))
    if kind == "P, transparent":
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.info["transparency"] = 1
    else:
        image.putpalette([0, 0, 0, 255, 0, 0] if kind == "P, 1" else [255, 255, 255, 0, 0, 0])
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P, 0", "P, 1", "P, transparent"])
@pytest.mark.parametrize("tool", ["masks/car/", "Label Studio, masks"])
def test_pictures_show_a_class_where_they_are_neither_black_nor_transparent(tool, kind, tmp_path):
    truth = TOOLS[tool](tmp_path)
    for path in tmp_path.glob("masks/**/*.png"):
        as_kind(np.array(Image.open(path)) > 0, kind).save(path)
    check_class_masks(tmp_path, truth)


def test_pictures_that_fit_two_layouts_are_refused(tmp_path):
    """Class 1 of image 2, or object 2 of image 1?"""
    for name in ("1", "2"):
        save(tmp_path / f"images/{name}.jpg", np.zeros((84, 112, 3), np.uint8))
        for folder in ("1", "2"):
            save(tmp_path / f"masks/{folder}/{name}.png", np.eye(84, 112, dtype=np.uint8))
    with refused("masks/1/2.png", "images/1.jpg", "images/2.jpg"):
        find_masks(tmp_path)
    for folder, name in (("1", "car"), ("2", "tree")):
        (tmp_path / "masks" / folder).rename(tmp_path / "masks" / name)
    assert len(find_masks(tmp_path).samples) == 2
