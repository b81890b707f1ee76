"""What annotation files leave doubtful: view and size of images, ranges, kinds, entries that are wrong."""
import base64
import io
import json
import re
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
from affine import Affine
from conftest import load, refused
from labeling_tools import (DEGREES, METERS, NAMES, TOOLS, brush, dump, features, on_map, outlines,
                            pairs_of_runs, png_text, runs, shapes, tiles)
from PIL import Image, ImageOps
from test_annotations import (EDITED, HOLE, RING, as_kind, box_region, edit, edit_first, interior, load_mask,
                              samples_of, studio, write_shapes)
from trees import PLAIN, save, scene

import check_data
import evaluate
import train
from config import InputError
from dataio.annotations.tools import TOOLS as FORMATS, find_masks
from dataio.images import upright
from dataio.readers import read_sample


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def iou(mask, expected):
    """Return the smallest IoU of the classes 0..2 of two masks (H, W)."""
    return min(((mask == id) & (expected == id)).sum() / ((mask == id) | (expected == id)).sum()
               for id in range(3))


# --- views of images that EXIF turns ----------------------------------------------------------------------
INVERSE = {6: 8, 8: 6}  # EXIF orientations that undo each other; the others undo themselves


def save_turned(path, pixels, orientation):
    """Save an image (H, W, 3) as it is stored where EXIF turns it."""
    stored = np.ascontiguousarray(upright(pixels.transpose(2, 0, 1), INVERSE.get(orientation, orientation)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(path, Image.fromarray(stored.transpose(1, 2, 0)), exif=exif, quality=95)
    shown = np.array(ImageOps.exif_transpose(Image.open(path)), int)
    assert abs(shown - pixels).mean() < 8
    return stored.shape[1:]


def write_photos(root, orientations, on_stored=False, given="stored", size=(112, 60), high=True):
    """Write COCO photos turned by EXIF; return {stem: upright mask}.

    on_stored: whether points refer to the image as stored; given: which size the file gives; high: whether
    shapes reach where only one of both views is.
    """
    truth, images, annotations = {}, [], []
    for number, orientation in enumerate(orientations):
        pixels, mask = scene(number, 1, size)
        mask[5:30, 4:40], mask[60 if high else 30:100 if high else 50, 10:25] = 1, 2
        stored = save_turned(root / f"photo_{number}.jpg", pixels, orientation)
        inverse = INVERSE.get(orientation, orientation)
        labeled = np.ascontiguousarray(upright(mask, inverse)) if on_stored else mask
        height, width = stored if given == "stored" else size
        sides = {} if given == "none" else dict(height=height, width=width)
        images.append(dict(id=number, file_name=f"photo_{number}.jpg", **sides))
        annotations += [dict(id=10 * number + id, image_id=number, category_id=id,
                             segmentation=[ring.ravel().tolist() for ring in outlines(labeled, id)])
                        for id in (1, 2)]
        truth[f"photo_{number}"] = mask
    categories = [dict(id=id, name=NAMES[id]) for id in (1, 2)]
    dump(root / "labels.json", dict(images=images, annotations=annotations, categories=categories))
    return truth


def agreement(root, truth):
    """Return the smallest IoU of the masks of a folder."""
    source = load("folder", root, val_fraction=0)
    return min(iou(read_sample(sample, source.table)[1]["mask"].numpy(), truth[stem])
               for stem, sample in samples_of(source).items())


@pytest.mark.parametrize("on_stored", [False, True])
@pytest.mark.parametrize("given", ["stored", "upright", "none"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_points_tell_which_view_of_a_turned_photo_was_labeled(orientation, given, on_stored, tmp_path):
    truth = write_photos(tmp_path, [orientation], on_stored, given)
    assert agreement(tmp_path, truth) > 0.97
    assert not any("EXIF" in doubt for doubt in find_masks(tmp_path).doubts)


@pytest.mark.parametrize("on_stored", [False, True])
def test_a_photo_that_tells_decides_for_those_that_do_not(on_stored, tmp_path):
    truth = write_photos(tmp_path / "told", [6, 3, 1, 2, 8], on_stored)
    assert agreement(tmp_path / "told", truth) > 0.97


@pytest.mark.parametrize(("given", "on_stored", "is_guessed"), [
    ("stored", True, True), ("upright", False, False), ("none", False, True)])
def test_where_both_views_fit_the_size_decides_and_a_guess_is_said(given, on_stored, is_guessed, tmp_path):
    truth = write_photos(tmp_path, [6, 8], on_stored, given, size=(64, 60), high=False)
    assert agreement(tmp_path, truth) > 0.95
    doubts = [doubt for doubt in find_masks(tmp_path).doubts if "EXIF" in doubt]
    assert bool(doubts) == is_guessed and all("photo_0.jpg" in doubt for doubt in doubts)


# --- sizes and ranges -------------------------------------------------------------------------------------
def scaled(points, factor):
    """Return points times a factor."""
    return (np.array(points) * factor).tolist()


@pytest.mark.parametrize("factor", [0.5, 2, 3])
@pytest.mark.parametrize("tool", ["COCO", "labelme"])
def test_annotations_of_a_larger_or_smaller_copy_are_drawn_at_its_size(tool, factor, tmp_path):
    truth = TOOLS[tool](tmp_path)

    def resize(content):
        for image in content.get("images", [content]):
            for key in ("height", "width", "imageHeight", "imageWidth"):
                if key in image:
                    image[key] = round(image[key] * factor)
        for entry in content[EDITED[tool][1]]:
            key = "points" if tool == "labelme" else "segmentation"
            entry[key] = [scaled(ring, factor) for ring in entry[key]]

    edit(tmp_path, tool, resize)
    path = next(path for path in truth if path.stem == "shot 0")
    names, mask = load_mask(tmp_path)
    assert mask.shape == truth[path].shape
    assert iou(np.array([0, *map(NAMES.index, names[1:])])[mask], truth[path]) > 0.9


def stretch(root, factor):
    """Multiply the points of all polygons of COCO files."""
    for path in root.rglob("*.json"):
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["segmentation"] = [scaled(ring, factor) for ring in entry["segmentation"]]
        path.write_text(json.dumps(content))


def test_annotations_of_another_size_are_refused(tmp_path):
    TOOLS["COCO"](tmp_path)
    stretch(tmp_path, 2.5)
    with refused("instances_train2017.json annotation", "another size"):
        find_masks(tmp_path)


def test_shares_and_pixels_are_not_mixed_up(tmp_path):
    TOOLS["YOLO, Ultralytics"](tmp_path / "yolo")
    for path in (tmp_path / "yolo/labels").rglob("*.txt"):
        lines = [line.split() for line in path.read_text().splitlines()]
        path.write_text("\n".join(" ".join([number, *(str(float(cell) * 100) for cell in cells)])
                                  for number, *cells in lines))
    with refused("above 1", "shot 0.txt line 1"):
        find_masks(tmp_path / "yolo")
    TOOLS["COCO"](tmp_path / "coco")
    stretch(tmp_path / "coco", 0.01)
    with refused("instances_train2017.json", "shares"):
        find_masks(tmp_path / "coco")


def test_shapes_across_the_edge_are_counted_and_those_beyond_it_refused(tmp_path):
    TOOLS["labelme"](tmp_path)
    across, beyond = [[90, 10], [130, 10], [130, 40]], [[300, 10], [330, 10], [330, 40]]
    edit(tmp_path, "labelme", lambda content: content["shapes"].append(
        dict(label="car", points=across, shape_type="polygon")))
    doubt, = find_masks(tmp_path).doubts
    assert "shot 0.json shape" in doubt
    edit_first(tmp_path, "labelme", points=beyond)
    with refused("shot 0.json shape 1", "outside"):
        find_masks(tmp_path)


def test_a_size_of_other_proportions_is_refused(tmp_path):
    TOOLS["labelme"](tmp_path)
    edit(tmp_path, "labelme", lambda content: content.update(imageHeight=300, imageWidth=300))
    with refused("shot 0.jpg", "84x112", "300x300"):
        find_masks(tmp_path)


# --- kinds and names --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tool", "values", "named"), [
    ("COCO", dict(segmentation=[]), "box"), ("labelme", dict(shape_type="cuboid"), "cuboid"),
    ("Supervisely", dict(geometryType="cuboid_3d"), "cuboid_3d")])
def test_kinds_that_are_not_known_are_refused_by_name(tool, values, named, tmp_path):
    TOOLS[tool](tmp_path)
    edit_first(tmp_path, tool, **values)
    with refused(EDITED[tool][0], EDITED[tool][2].strip(), named):
        find_masks(tmp_path)


@pytest.mark.parametrize(("segmentation", "is_counted"), [
    ([[20.6, 40.3, 20.6, 40.3, 60.7, 40.3, 60.7, 40.3]], True),  # a box of height 0, as a few of COCO's
    (dict(size=[84, 112], counts=[84 * 112]), False)])
def test_shapes_without_area_draw_nothing(segmentation, is_counted, tmp_path):
    TOOLS["COCO"](tmp_path)
    before = load_mask(tmp_path)[1]
    edit(tmp_path, "COCO", lambda content: content["annotations"].append(
        {**content["annotations"][0], "id": 99, "segmentation": segmentation}))
    assert ["without area" in doubt for doubt in find_masks(tmp_path).doubts] == [True] * is_counted
    assert (load_mask(tmp_path)[1] == before).all()


def test_names_that_differ_in_spelling_alone_are_doubted(tmp_path):
    TOOLS["labelme"](tmp_path)
    edit_first(tmp_path, "labelme", label="CAR ")
    doubt, = find_masks(tmp_path).doubts
    assert "CAR" in doubt and "car" in doubt


def test_a_coco_file_without_categories_is_read_by_their_numbers(tmp_path):
    truth = TOOLS["COCO"](tmp_path)
    for path in tmp_path.rglob("*.json"):
        content = json.loads(path.read_text())
        del content["categories"]
        path.write_text(json.dumps(content))
    names, mask = load_mask(tmp_path)
    assert names == ["background", "category 1", "category 2"]
    assert iou(mask, truth[tmp_path / "train2017/shot 0.jpg"]) > 0.97
    assert any("instances_train2017.json" in note for note in find_masks(tmp_path).notes)


def test_the_format_of_the_documentation_is_read(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs/training.md").read_text()
    text = text.split("### An annotation format")[1]
    module = ModuleType("polygons_csv")
    exec(text.split("```python\n")[1].split("```")[0], vars(module))
    monkeypatch.setitem(FORMATS, "polygons.csv", module)
    pixels, mask = scene(0, 3)
    save(tmp_path / "a.jpg", pixels)
    rows = [f"a.jpg,{NAMES[id]},{' '.join(map(str, ring.ravel()))}" for id, ring in shapes(mask)]
    (tmp_path / "polygons.csv").write_text("\n".join(["image,class,points", *rows]))
    assert iou(load_mask(tmp_path, "a")[1], mask) > 0.97
    (tmp_path / "polygons.csv").write_text("\n".join(["image,class,points", *rows, "a.jpg,car,1 1 x"]))
    with refused("polygons.csv, a.jpg, row 3"):
        find_masks(tmp_path)


# --- equal names, other files -----------------------------------------------------------------------------
def test_names_of_files_tell_equal_images_apart(tmp_path):
    """train2017/0.jpg and val2017/0.jpg, each in the file of its split."""
    truth = {}
    for split in ("train", "val"):
        part = TOOLS["COCO"](tmp_path / "made" / split)
        paths = sorted(part)[:3]
        content = dict(images=[], annotations=[], categories=[dict(id=id, name=NAMES[id]) for id in (1, 2)])
        for number, path in enumerate(paths):
            mask = part[path] if split == "train" else part[path][::-1].copy()
            target = tmp_path / f"data/{split}2017/{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            truth[target] = mask
            content["images"].append(dict(id=number, file_name=target.name))
            content["annotations"] += [
                dict(id=3 * number + id, image_id=number, category_id=id,
                     segmentation=[ring.ravel().tolist() for ring in outlines(mask, id)])
                for id in (1, 2) if (mask == id).any()]
        dump(tmp_path / f"data/annotations/instances_{split}2017.json", content)
    source = load("folder", tmp_path / "data")
    for split, samples in source.splits.items():
        assert {sample.image for sample in samples} == {path for path in truth if split in str(path)}
        for sample in samples:
            mask = read_sample(sample, source.table)[1]["mask"].numpy()
            assert (mask != truth[sample.image]).mean() < 0.02


def write_coco(root, images, folder="annotations", name="labels.json"):
    """Write images {path: name in the file} with a car in each, and a COCO file; return {path: mask}."""
    truth, content = {}, dict(images=[], annotations=[], categories=[dict(id=1, name="car")])
    for number, (path, said) in enumerate(images.items()):
        pixels, mask = scene(number, 2)
        save(root / path, pixels)
        truth[root / path] = mask
        content["images"].append(dict(id=number, file_name=said, height=84, width=112))
        content["annotations"].append(dict(id=number, image_id=number, category_id=1, segmentation=[
            ring.ravel().tolist() for ring in outlines(mask, 1)]))
    dump(root / folder / name, content)
    return truth


def right_masks(root, truth):
    """Return {path of an image: whether its mask is right} of a folder."""
    source = load("folder", root, val_fraction=0)
    samples = [sample for samples in source.splits.values() for sample in samples]
    return {sample.image: (read_sample(sample, source.table)[1]["mask"].numpy() != truth[sample.image])
            .mean() < 0.02 for sample in samples}


@pytest.mark.parametrize(("missing", "others"), [
    ("val/1.png", ["train/1.png", "train/2.png"]),
    ("images/1.jpg", ["images/2.jpg", "thermal/1.png"]),
    ("zoom1.5.png", ["zoom1.png", "zoom2.png"]),
    ("images/a.jpg", ["images/b.jpg", "masks/a.png"]),
])
def test_labels_of_an_image_that_is_missing_go_to_no_other(missing, others, tmp_path):
    paths = {missing: missing, **{path: path for path in others if "thermal" not in path}}
    write_coco(tmp_path, paths)
    for path in others:
        save(tmp_path / path, scene(7)[0])
    (tmp_path / missing).unlink()
    with refused(missing, "image 0"):
        find_masks(tmp_path)


@pytest.mark.parametrize(("tool", "missing", "other"), [
    ("Datumaro", "images/val/shot 2.jpg", "images/train/shot 2.jpg"),
    ("Supervisely", "val/img/shot 2.jpg", "train/img/shot 2.jpg"),
    ("YOLO, Ultralytics", "images/val/shot 2.jpg", "images/train/shot 2.jpg")])
def test_labels_of_a_missing_image_go_to_no_other_part_of_the_data(tool, missing, other, tmp_path):
    TOOLS[tool](tmp_path)
    (tmp_path / missing).rename(tmp_path / other)
    with refused("shot 2"):
        find_masks(tmp_path)


def test_a_class_called_object_is_doubted(tmp_path):
    for seed in range(4):
        pixels, mask = scene(seed, 3)
        save(tmp_path / f"images/{seed}.jpg", pixels)
        save(tmp_path / f"masks/car/{seed}.png", np.uint8(255) * (mask == 1))
        save(tmp_path / f"masks/object/{seed}.png", np.uint8(255) * (mask == 2))
    assert any("masks/object" in doubt for doubt in find_masks(tmp_path).doubts)


@pytest.mark.parametrize(("path", "said"), [
    ("images/a/1.png", "a/1.png"), ("images/1.png", "1.png"), ("images/1.PNG", "IMAGES\\1.png"),
    ("images/1.png", "/home/me/data/1.png"), ("images/1.png", "C:\\photos\\1.png"),
    ("images/1.png", "../images/1.png"),
    ("images/e\u0301 1.png", "\u00e9 1.png"), ("images/1.png", "https://x.org/y/1.png?token=3"),
    ("images/1.webp", "1.jpg")])
@pytest.mark.parametrize("beside", ["overlays", "images_thumbs_preview", "masks_viz"])
def test_pictures_of_the_same_names_are_not_the_images(path, said, beside, tmp_path):
    truth = write_coco(tmp_path, {path: said, "images/other.png": "other.png"})
    for image in list(truth):
        save(tmp_path / beside / image.name, scene(8)[0])
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)


def test_a_file_per_class_of_the_same_images_is_put_together(tmp_path):
    truth = TOOLS["COCO"](tmp_path)
    for path in list(tmp_path.rglob("*.json")):
        content = json.loads(path.read_text())
        for id in (1, 2):
            part = [entry for entry in content["annotations"] if entry["category_id"] == id]
            dump(path.with_stem(f"{path.stem}_{NAMES[id]}"), {**content, "annotations": part})
        path.unlink()
    for name, sample in samples_of(load("folder", tmp_path)).items():
        _, mask = load_mask(tmp_path, name)
        names = [name for name, _ in load("folder", tmp_path).classes]
        assert iou(np.array([NAMES.index(name) for name in names])[mask], truth[sample.image]) > 0.97


def test_a_single_file_called_test_is_trained_on(tmp_path):
    write_coco(tmp_path, {f"images/{number}.png": f"{number}.png" for number in range(6)},
               name="test_run_annotations.json")
    assert set(load("folder", tmp_path).splits) == {"train", "val"}


def test_two_pictures_that_pair_by_name_do_not_hide_the_annotations(tmp_path):
    truth = write_coco(tmp_path, {f"images/{name}.png": f"{name}.png" for name in "abcd"})
    save(tmp_path / "masks/a.png", scene(3)[1])
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)
    assert any("masks/a.png" in doubt for doubt in find_masks(tmp_path).doubts)


def test_outlines_a_little_over_the_edges_are_cut_off(tmp_path):
    truth = write_coco(tmp_path, {f"images/{name}.png": f"{name}.png" for name in "abcd"})
    path = tmp_path / "annotations/labels.json"
    content = json.loads(path.read_text())
    for entry, mask in zip(content["annotations"], truth.values(), strict=True):
        mask[:] = 0
        mask[60:] = 1
        entry["segmentation"] = [[-4, 60, 116, 60, 116, 88, -4, 88]]
    path.write_text(json.dumps(content))
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)
    assert any("4 shapes" in doubt for doubt in find_masks(tmp_path).doubts)


def test_a_small_copy_of_a_huge_image_is_labeled_without_its_memory(tmp_path):
    """The file gives 42000x56000: a mask of that size would take 2 GB."""
    truth = write_coco(tmp_path, {"images/a.png": "a.png", "images/b.png": "b.png"})
    path = tmp_path / "annotations/labels.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image.update(height=42000, width=56000)
    for entry in content["annotations"]:
        entry["segmentation"] = [scaled(ring, 500) for ring in entry["segmentation"]]
    path.write_text(json.dumps(content))
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
def test_other_encodings_of_json_are_read_or_named(encoding, tmp_path):
    truth = write_coco(tmp_path, {"images/a.png": "a.png", "images/\u00e9.png": "\u00e9.png"})
    path = tmp_path / "annotations/labels.json"
    content = json.loads(path.read_text())
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    if encoding == "cp1252":
        with refused("labels.json", "not valid JSON"):
            find_masks(tmp_path)
    else:
        assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)


def test_files_of_other_tasks_of_coco_are_left_aside(tmp_path):
    truth = TOOLS["COCO"](tmp_path)
    for split in ("train", "val"):
        content = json.loads((tmp_path / f"annotations/instances_{split}2017.json").read_text())
        captions = [dict(id=1, image_id=content["images"][0]["id"], caption="a car")]
        panoptic = [dict(image_id=image["id"], file_name="x.png", segments_info=[])
                    for image in content["images"]]
        dump(tmp_path / f"annotations/captions_{split}2017.json", content | dict(annotations=captions))
        dump(tmp_path / f"annotations/panoptic_{split}2017.json", content | dict(annotations=panoptic))
    content = find_masks(tmp_path)
    assert {sample.image for sample in content.samples} == truth.keys()
    assert any("panoptic_train2017.json" in note for note in content.notes)


def test_a_mask_is_not_taken_for_the_image_of_its_name(tmp_path):
    TOOLS["COCO"](tmp_path)
    path = tmp_path / "train2017/shot 0.jpg"
    target = tmp_path / "panoptic_train2017/shot 0.png"
    target.parent.mkdir()
    Image.open(path).save(target)
    path.unlink()
    with refused("shot 0.jpg", "image 0"):
        find_masks(tmp_path)


def test_the_names_of_files_split_images_of_a_single_folder(tmp_path):
    """As LVIS does: its validation file lists images that lie in train2017."""
    TOOLS["COCO"](tmp_path)
    for path in (tmp_path / "val2017").iterdir():
        path.rename(tmp_path / "train2017" / path.name)
    splits = load("folder", tmp_path).splits
    assert {sample.image.stem for sample in splits["val"]} == {"shot 2", "shot 5"}


# --- many entries that are wrong --------------------------------------------------------------------------
def spoil(root):
    """Spoil a COCO folder of six images in many ways: return the stems of the images that can be used."""
    def change(content):
        entries = {}
        for entry in content["annotations"]:
            entries.setdefault(entry["image_id"], []).append(entry)
        first, second, third, _ = entries.values()
        first[0]["segmentation"].append([3, 3])  # beside good rings
        second[0]["segmentation"] = dict(size=[84, 112], counts=[5])
        third[-1]["segmentation"], = third[-1]["segmentation"]  # flat
        content["annotations"].append({**second[0], "segmentation": [[1, 1, 9, 9]], "id": 90})
        content["images"].append(dict(id=77, file_name="gone.jpg", height=84, width=112))
        content["annotations"].append({**first[0], "image_id": 88, "id": 91})

    edit(root, "COCO", change)
    return {"shot 0", "shot 2", "shot 3", "shot 4", "shot 5"}


def test_one_report_of_all_that_is_wrong_and_a_training_on_the_rest(tmp_path, run):
    root = tmp_path / "data"
    truth = TOOLS["COCO"](root)
    good = spoil(root)
    with pytest.raises(InputError) as error:
        load("folder", root)
    text = str(error.value)
    assert all(name in text for name in ("gone.jpg", "annotation 90", "annotation 91", "skip-bad-labels"))
    assert "annotation 0," not in text  # its other rings are good
    source = load("folder", root, skip_bad_labels=True)
    assert samples_of(source).keys() == good
    assert any("gone.jpg" in note for note in source.notes)
    for stem, sample in samples_of(source).items():
        path = next(path for path in truth if path.stem == stem)
        assert iou(np.array([0, *(NAMES.index(name) for name, _ in source.classes[1:])])[
            read_sample(sample, source.table)[1]["mask"].numpy()], truth[path]) > 0.9
    flags = ["--data-root", root, "--out-dir", tmp_path / "out"]
    assert run(check_data, *flags)[0] == 1
    code, text, err = run(check_data, *flags, "--fix", tmp_path / "clean")
    assert code == 0 and "gone.jpg" in text, text + err
    clean = load("folder", tmp_path / "clean")
    assert [name for name, _ in clean.classes] == [name for name, _ in source.classes]
    for stem, sample in samples_of(clean).items():
        masks = [read_sample(pair, data.table)[1]["mask"]
                 for pair, data in ((sample, clean), (samples_of(source)[stem], source))]
        assert (masks[0] == masks[1]).all()


def test_training_and_scoring_leave_out_what_is_wrong(tmp_path, run):
    root, out = tmp_path / "data", tmp_path / "out"
    TOOLS["COCO"](root)
    spoil(root)
    flags = ["--device", "cpu", "--out-dir", out]
    training = ["--dataset", "folder", "--data-root", root, "--epochs", 1, "--workers", 0, "--imgsz", 42, 56,
                "--backbone", "vit_tiny", "--head", "bn", *flags]
    code, _, err = run(train, *training)
    assert code == 2 and "gone.jpg" in err
    code, text, err = run(train, *training, "--skip-bad-labels")
    assert code == 0 and "gone.jpg" in text, err
    assert run(evaluate, "--model", out / "best_model_iou.pth", *flags)[0] == 0
    code, _, err = run(train, *training[2:], "--dataset", "voc", "--skip-bad-labels")
    assert code == 2 and "--skip-bad-labels" in err


def test_masks_without_partner_or_damaged_are_left_out(tmp_path):
    for seed in range(6):
        pixels, mask = scene(seed, 3)
        save(tmp_path / f"images/{seed}.jpg", pixels)
        save(tmp_path / f"masks/{seed}.png", mask)
    (tmp_path / "masks/0.png").unlink()
    (tmp_path / "images/1.jpg").unlink()
    (tmp_path / "masks/2.png").write_bytes((tmp_path / "masks/2.png").read_bytes()[:99])
    with refused("0.jpg"):
        load("folder", tmp_path)
    source = load("folder", tmp_path, skip_bad_labels=True)
    assert samples_of(source).keys() == {"3", "4", "5"}
    assert all(any(name in note for note in source.notes) for name in ("0.jpg", "1.png", "2.png"))


@pytest.mark.parametrize("labels", ["masks", "labelme"])
def test_names_on_lists_whose_labels_cannot_be_used_are_left_out_as_these_are(tmp_path, run, labels):
    root = tmp_path / "data"
    if labels == "masks":
        PLAIN(root)
        (root / "masks/0.png").unlink()
    else:
        TOOLS["labelme"](root)
        edit_first(root, "labelme", points="x")
    names = sorted(path.name for path in root.rglob("*.jpg"))
    for split, listed in (("train", [*names[:4], "gone.jpg"]), ("val", names[4:6])):
        (root / f"{split}.txt").write_text("\n".join(listed))
    with pytest.raises(InputError, match=names[0].removesuffix(".jpg")):
        load("folder", root)
    source = load("folder", root, skip_bad_labels=True)
    assert [len(source.splits[split]) for split in ("train", "val")] == [3, 2]
    assert any(names[0] in note and "gone.jpg" in note for note in source.notes)
    flags = ["--data-root", root, "--out-dir", tmp_path]
    code, text, err = run(check_data, *flags, "--fix", tmp_path / "clean")
    assert code == 0 and re.search(rf"^problem: .*\n +{names[0]} of train.txt\n +gone.jpg", text, re.M), err
    assert len(samples_of(load("folder", tmp_path / "clean"))) == 5


# --- masks that would be wrong in silence -----------------------------------------------------------------
def test_masks_are_drawn_anew_of_a_photo_that_is_turned_another_way(tmp_path):
    """The pixels as stored are the same, and so are the labels on them."""
    write_photos(tmp_path, [6], on_stored=True)
    before = load_mask(tmp_path, "photo_0")[1]
    path, exif = tmp_path / "photo_0.jpg", Image.Exif()
    exif[0x0112] = 8
    with Image.open(path) as image:
        image.save(path, exif=exif)
    after = load_mask(tmp_path, "photo_0")[1]
    assert (after == before[::-1, ::-1]).all() and (after != before).any()


def test_masks_are_drawn_anew_of_a_tile_that_is_moved(tmp_path):
    """By ten pixels to the right: its polygons lie ten pixels further left in it."""
    (_, path, _, transform), *_ = tiles(tmp_path)
    dump(tmp_path / "labels.geojson", features([("car", on_map(RING, transform))]))
    before = load_mask(tmp_path, path.stem)[1]
    with rasterio.open(path, "r+") as file:
        file.transform = file.transform * Affine.translation(10, 0)
    after = load_mask(tmp_path, path.stem)[1]
    assert (after[:, :-10] == before[:, 10:]).all() and after.any()


@pytest.mark.parametrize("on_stored", [False, True])
@pytest.mark.parametrize("given", ["stored", "upright", "none"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_run_lengths_tell_which_view_of_a_turned_photo_was_labeled(orientation, given, on_stored, tmp_path):
    """By their own size, whatever the file says."""
    truth = write_photos(tmp_path, [orientation], on_stored, given)
    content = json.loads((tmp_path / "labels.json").read_text())
    mask = truth["photo_0"]
    if on_stored:
        mask = np.ascontiguousarray(upright(mask, INVERSE.get(orientation, orientation)))
    for entry in content["annotations"]:
        entry["segmentation"] = dict(size=mask.shape, counts=runs(mask == entry["category_id"]))
    dump(tmp_path / "labels.json", content)
    assert agreement(tmp_path, truth) == 1


@pytest.mark.parametrize("factor", [0.5, 2, 3])
@pytest.mark.parametrize("bitmap", [False, True])
def test_holes_and_bitmaps_of_a_larger_or_smaller_copy(bitmap, factor, tmp_path):
    TOOLS["Supervisely"](tmp_path)
    squares = [scaled([[left, top], [right, top], [right, bottom], [left, bottom]], factor)
               for left, top, right, bottom in ((10, 10, 70, 70), (30, 30, 50, 50))]
    entries = [dict(classTitle="car", geometryType="polygon",
                    points=dict(exterior=squares[0], interior=squares[1:]))]
    expected = np.zeros((84, 112), int)
    expected[10:70, 10:70], expected[30:50, 30:50] = 1, 0
    if bitmap:
        data = png_text(np.ones((int(20 * factor), int(10 * factor)), bool), True)
        entries.append(dict(classTitle="tree", geometryType="bitmap", bitmap=dict(
            origin=scaled([90, 40], factor), data=data)))
        expected[40:60, 90:100] = 2
    size = dict(height=round(84 * factor), width=round(112 * factor))
    edit(tmp_path, "Supervisely", lambda content: content.update(objects=entries, size=size))
    mask = load_mask(tmp_path)[1]
    assert not ((mask != expected) & interior(expected)).any()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P, 0", "P, 1", "P, transparent"])
@pytest.mark.parametrize("tool", ["labelme", "Supervisely"])
def test_bitmaps_in_files_show_a_shape_where_they_are_neither_black_nor_transparent(tool, kind, tmp_path):
    TOOLS[tool](tmp_path)
    region, file = box_region(55, 35, 50, 30), io.BytesIO()
    as_kind(region, kind).save(file, "PNG")
    if tool == "labelme":
        text = base64.b64encode(file.getvalue()).decode()
        change = dict(shapes=[dict(label="car", shape_type="mask", points=[[0, 0], [111, 83]], mask=text)])
    else:
        text = base64.b64encode(zlib.compress(file.getvalue())).decode()
        change = dict(objects=[dict(classTitle="car", geometryType="bitmap",
                                    bitmap=dict(origin=[0, 0], data=text))])
    edit(tmp_path, tool, lambda content: content.update(change))
    names, mask = load_mask(tmp_path)
    assert (mask == region * names.index("car")).all()


@pytest.mark.parametrize("points", [[[30, 20], [80, 50]], [[80, 50], [30, 20]], [[80, 20], [30, 50]],
                                    [[29.6, 20.4], [79.6, 50.4]]])
def test_a_mask_of_labelme_lies_at_its_upper_left_corner(points, tmp_path):
    TOOLS["labelme"](tmp_path)
    entry = dict(label="car", shape_type="mask", points=points, mask=png_text(np.ones((30, 50), bool), False))
    edit(tmp_path, "labelme", lambda content: content.update(shapes=[entry]))
    names, mask = load_mask(tmp_path)
    assert (mask == box_region(55, 35, 50, 30) * names.index("car")).all()


def test_a_brush_of_label_studio_is_its_alpha_whatever_its_color(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (84, 112, 4))
    colors[..., 3] = 255 * box_region(55, 35, 50, 30)
    entry = studio("brushlabels", format="rle", rle=brush(colors))
    write_shapes(tmp_path, "Label Studio", [entry])
    names, mask = load_mask(tmp_path)
    assert (mask == box_region(55, 35, 50, 30) * names.index("car")).all()


def test_masks_of_images_that_are_moved_are_theirs(tmp_path):
    write_coco(tmp_path, {"images/a.png": "a.png", "images/b.png": "b.png"})
    before = [load_mask(tmp_path, name)[1] for name in "ab"]
    (tmp_path / "images").rename(tmp_path / "photos")
    assert all((load_mask(tmp_path, name)[1] == mask).all() for name, mask in zip("ab", before, strict=True))


def test_polygons_on_an_image_with_a_place_and_no_reference_system(tmp_path):
    """As with a world file: coordinates are those of the image."""
    (_, path, _, transform), *others = tiles(tmp_path)
    with rasterio.open(path) as file:
        pixels = file.read()
    for _, other, *_ in others:
        other.unlink()
    dump(path.with_suffix(".geojson"), features([("car", on_map(RING, transform, METERS))]))
    before = load_mask(tmp_path, path.stem)[1]
    with rasterio.open(path, "w", driver="GTiff", height=84, width=112, count=len(pixels), dtype=pixels.dtype,
                       transform=transform) as file:
        file.write(pixels)
    assert (load_mask(tmp_path, path.stem)[1] == before).all() and before.any()


def test_polygons_of_an_image_and_of_a_file_over_all_are_both_drawn(tmp_path):
    (_, path, _, transform), *_ = tiles(tmp_path)
    squares = {name: np.array([(left, 10), (left + 30, 10), (left + 30, 60), (left, 60)], float)
               for name, left in (("car", 10), ("tree", 60))}
    for name, file in (("car", path.with_suffix(".geojson")), ("tree", tmp_path / "labels.geojson")):
        dump(file, features([(name, on_map(squares[name], transform))]))
    names, mask = load_mask(tmp_path, path.stem)
    expected = np.zeros((84, 112), int)
    expected[10:60, 10:40], expected[10:60, 60:90] = names.index("car"), names.index("tree")
    assert not ((mask != expected) & interior(expected)).any()


def test_holes_of_polygons_in_pixels(tmp_path):
    save(tmp_path / "plain.jpg", np.zeros((84, 112, 3), np.uint8))
    content = features([("car", [])])
    content["features"][0]["geometry"]["coordinates"] = [
        [*ring.tolist(), ring[0].tolist()] for ring in (RING, HOLE)]
    dump(tmp_path / "plain.geojson", content)
    mask = load_mask(tmp_path, "plain")[1]
    assert mask[20, 30] == 1 and mask[40, 48] == 0


def test_shares_beside_run_lengths_are_refused(tmp_path):
    TOOLS["COCO"](tmp_path)
    stretch(tmp_path, 0.01)
    edit_first(tmp_path, "COCO", segmentation=dict(size=[84, 112], counts=runs(np.eye(84, 112, dtype=bool))))
    with refused("instances_train2017.json", "shares"):
        find_masks(tmp_path)


@pytest.mark.parametrize(("paths", "others"), [
    (["1.png", "a/1.png", "b/a/1.png"], []), (["1.png"], ["images/1.png"]), (["a/1.png"], ["b/a/1.png"])])
def test_a_name_with_its_folders_is_that_file_where_it_is_there(paths, others, tmp_path):
    truth = write_coco(tmp_path, {path: path for path in paths}, folder=".")
    for path in others:
        save(tmp_path / path, scene(8)[0])
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)


def test_masks_of_classes_are_of_the_image_with_the_longest_name(tmp_path):
    """1_2_car.png is of 1_2.jpg, and not the class 2_car of 1.jpg."""
    truth = {}
    for seed, name in enumerate(("1", "1_2", "1_3", "4")):
        pixels, mask = scene(seed, 3)
        save(tmp_path / f"images/{name}.jpg", pixels)
        truth[name] = mask
        for id in (1, 2):
            save(tmp_path / f"masks/{name}_{NAMES[id]}.png", np.uint8(255) * (mask == id))
    for name, expected in truth.items():
        names, mask = load_mask(tmp_path, name)
        assert names == list(NAMES) and (mask == expected).all()


def test_equal_names_in_two_projects_are_those_of_their_own_file(tmp_path):
    truth = write_coco(tmp_path / "a", {"images/1.png": "1.png", "images/2.png": "2.png"})
    truth |= write_coco(tmp_path / "b", {"images/2.png": "2.png", "images/1.png": "1.png"})
    assert right_masks(tmp_path, truth) == dict.fromkeys(truth, True)
    first, second = (load_data_mask(tmp_path, tmp_path / f"{project}/images/1.png") for project in "ab")
    assert (first != second).any()


def load_data_mask(root, image):
    """Return the mask (H, W) of an image by its path."""
    source = load("folder", root, val_fraction=0)
    sample, = (sample for samples in source.splits.values() for sample in samples if sample.image == image)
    return read_sample(sample, source.table)[1]["mask"].numpy()


def test_the_innermost_folder_is_the_class(tmp_path):
    pixels, truth = scene(0, 3)
    for name in "ab":
        save(tmp_path / f"images/{name}.jpg", pixels)
        for id in (1, 2):
            save(tmp_path / f"masks/summer/{NAMES[id]}/{name}.png", np.uint8(255) * (truth == id))
    names, mask = load_mask(tmp_path, "a")
    assert names == list(NAMES) and (mask == truth).all()


def test_masks_of_objects_are_of_the_image_of_the_innermost_folder(tmp_path):
    """Of the image 2 of the group 1, and not of the image 1 of that group."""
    truth = {}
    for group in "12":
        for name in "12":
            path = tmp_path / group / name / f"images/{name}.png"
            pixels, truth[path] = scene(int(group + name), 2)
            save(path, pixels)
            for part, rows in (("0ac3", slice(0, 40)), ("77f0", slice(40, 84))):
                region = np.zeros((84, 112), np.uint8)
                region[rows] = 255 * truth[path][rows]
                save(path.parents[1] / f"masks/{part}{group}{name}.png", region)
    assert all((load_data_mask(tmp_path, path) == mask).all() for path, mask in truth.items())


def test_a_mask_of_a_class_that_may_be_of_two_images_is_refused(tmp_path):
    for path in ("a/1", "b/1", "2", "3", "4"):
        save(tmp_path / f"images/{path}.jpg", scene(0)[0])
    for label in ("car", "tree"):
        for name in "1234":
            save(tmp_path / f"masks/{label}/{name}.png", np.uint8(255) * box_region(55, 35, 50, 30))
    with pytest.raises(InputError, match="masks/car/1.png"):
        find_masks(tmp_path)
    samples = find_masks(tmp_path, skip_bad_labels=True).samples
    assert {sample.image.stem for sample in samples} == {"2", "3", "4"}


def test_one_file_over_tiles_of_two_reference_systems(tmp_path):
    (_, path, _, transform), (_, other, *_), *_ = tiles(tmp_path)
    square = np.array([(20.2, 10.2), (70.2, 10.2), (70.2, 60.2), (20.2, 60.2)])
    lon, lat = on_map(square, transform)[0]
    degrees = Affine.translation(lon + 1, lat + 1) * Affine.scale(1e-4, -1e-4)
    with rasterio.open(other, "w", driver="GTiff", height=84, width=112, count=3, dtype="uint8", crs=DEGREES,
                       transform=degrees) as file:
        file.write(np.zeros((3, 84, 112), np.uint8))
    ring = (square * (1e-4, -1e-4) + (lon + 1, lat + 1)).tolist()
    dump(tmp_path / "labels.geojson", features([("car", on_map(square, transform)),
                                                ("car", [*ring, ring[0]])]))
    expected = np.zeros((84, 112), int)
    expected[10:60, 20:70] = 1
    for image in (path, other):
        assert not ((load_mask(tmp_path, image.stem)[1] != expected) & interior(expected)).any()


def test_photos_that_tell_of_both_views_decide_for_no_other(tmp_path):
    truth = {}
    for folder, on_stored, given, size, high in (("a", False, "none", (112, 60), True),
                                                 ("b", True, "none", (112, 60), True),
                                                 ("c", False, "none", (64, 60), False)):
        found = write_photos(tmp_path / folder, [6], on_stored, given, size, high)
        truth[tmp_path / folder / "photo_0.jpg"] = found["photo_0"]
    assert all(iou(load_data_mask(tmp_path, path), mask) > 0.95 for path, mask in truth.items())
    assert any("1 image turned by EXIF" in doubt for doubt in find_masks(tmp_path).doubts)


@pytest.mark.parametrize(("orientation", "size"), [(3, (112, 60)), (2, (60, 112)), (6, (84, 84))])
def test_photos_that_are_turned_to_the_same_size_are_taken_as_upright(orientation, size, tmp_path):
    truth = write_photos(tmp_path, [orientation], size=size, high=size[0] > 60)
    assert agreement(tmp_path, truth) > 0.97
    assert any("EXIF" in doubt for doubt in find_masks(tmp_path).doubts)


@pytest.mark.parametrize("name", ["shot", "my_shot", "my_1"])
def test_run_lengths_in_any_order_of_names_with_underscores(name, tmp_path):
    generator, truth, lines = np.random.default_rng(0), {}, ["ImageId_ClassId,EncodedPixels"]
    for seed in range(3):
        pixels, truth[f"{name}_{seed}"] = scene(seed, 3)
        save(tmp_path / f"images/{name}_{seed}.jpg", pixels)
        for id in (1, 2):
            pairs = np.array(pairs_of_runs(truth[f"{name}_{seed}"] == id).split()).reshape(-1, 2)
            text = " ".join(generator.permutation(pairs).ravel())
            lines.append(f"{name}_{seed}_{id},{text}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    for stem, expected in truth.items():
        names, mask = load_mask(tmp_path, stem)
        assert names == ["background", "class 1", "class 2"] and (mask == expected).all()


@pytest.mark.parametrize("move", [(-60, 0), (0, -60), (130, 0), (0, 100)])
def test_a_shape_beyond_any_edge_is_refused(move, tmp_path):
    TOOLS["labelme"](tmp_path)
    square = np.array([(10, 10), (50, 10), (50, 50), (10, 50)]) + move
    edit_first(tmp_path, "labelme", points=square.tolist())
    with refused("shot 0.json shape 1", "outside"):
        find_masks(tmp_path)


def test_run_lengths_of_the_sides_in_the_other_order_are_refused(tmp_path):
    TOOLS["COCO"](tmp_path)
    pixels = np.eye(112, 84, dtype=bool)
    edit_first(tmp_path, "COCO", segmentation=dict(size=[112, 84], counts=runs(pixels)))
    with refused("annotation 0", "another size"):
        find_masks(tmp_path)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("thin", ["polygon with a hole", "run lengths"])
def test_the_shape_of_fewer_pixels_lies_above(thin, order, tmp_path):
    """A frame of 464 pixels over a square of 900, though its outline encloses more."""
    square, outer, inner = (np.array([(left, left), (end, left), (end, end), (left, end)])
                            for left, end in ((4, 34), (10, 70), (12, 68)))
    expected = np.zeros((84, 112), int)
    expected[4:34, 4:34] = 1
    frame = np.zeros((84, 112), bool)
    frame[10:70, 10:70], frame[12:68, 12:68] = True, False
    expected[frame] = 2
    save(tmp_path / "a.png", scene(0)[0])
    if thin == "run lengths":
        masks = [expected == 1, frame]
        masks[0][4:34, 4:34] = True
        dump(tmp_path / "labels.json", dict(
            images=[dict(id=1, file_name="a.png", height=84, width=112)],
            categories=[dict(id=id, name=NAMES[id]) for id in (1, 2)],
            annotations=[dict(id=id, image_id=1, category_id=id + 1, segmentation=dict(
                size=[84, 112], counts=runs(masks[id]))) for id in order]))
    else:
        content = features([(NAMES[id + 1], []) for id in order])
        for feature, id in zip(content["features"], order, strict=True):
            feature["geometry"]["coordinates"] = [[*ring.tolist(), ring[0].tolist()] for ring in
                                                  ([square], [outer, inner])[id]]
        dump(tmp_path / "a.geojson", content)
    names, mask = load_mask(tmp_path, "a")
    assert (np.array([NAMES.index(name) for name in names])[mask] == expected).all()


@pytest.mark.parametrize("change", ["other file", "other size", "same file", "own file"])
def test_two_versions_of_the_labels_of_an_image_are_refused(change, tmp_path):
    """The same classes again, other classes on a copy of another size, two entries of one file, or files that
    are called like their image.
    """
    write_coco(tmp_path, {"images/a.png": "a.png", "images/b.png": "b.png"})
    path = tmp_path / "annotations/labels.json"
    content = json.loads(path.read_text())
    image, (entry, *_) = content["images"][0], content["annotations"]
    tree = {**entry, "category_id": 2, "id": 7}
    content["categories"].append(dict(id=2, name="tree"))
    if change == "other file":
        dump(path.with_name("labels_2.json"), content)
    elif change == "own file":
        content["images"] = [image]
        for name, shape in (("a_old", entry), ("a_new", tree)):
            dump(path.with_name(f"{name}.json"), {**content, "annotations": [shape]})
        path.unlink()
    elif change == "other size":
        dump(path.with_name("labels_2.json"), {**content, "annotations": [tree], "images": [
            {**image, "height": 168, "width": 224}]})
    else:
        content["images"].append({**image, "id": 5})
        content["annotations"].append({**tree, "image_id": 5})
        dump(path, content)
    with pytest.raises(InputError, match="annotated twice"):
        find_masks(tmp_path)


def test_all_outlines_and_holes_of_a_shape_are_drawn(tmp_path):
    """Of two outlines both; of two holes both, and what of them lies outside of the outline is no shape."""
    def square(left, top, right, bottom):
        return [[left, top], [right, top], [right, bottom], [left, bottom]]

    TOOLS["COCO"](tmp_path / "coco")
    rings = [np.ravel(square(left, 10, left + 20, 50)).tolist() for left in (10, 60)]
    edit(tmp_path / "coco", "COCO", lambda content: content.update(annotations=[
        {**content["annotations"][0], "segmentation": rings}]))
    names, mask = load_mask(tmp_path / "coco")
    expected = box_region(20, 30, 20, 40) | box_region(70, 30, 20, 40)
    assert ((mask > 0) == expected).all()
    TOOLS["Supervisely"](tmp_path / "super")
    points = dict(exterior=square(10, 10, 60, 60), interior=[square(20, 20, 30, 30), square(50, 40, 80, 50)])
    edit(tmp_path / "super", "Supervisely", lambda content: content.update(objects=[
        dict(classTitle="car", geometryType="polygon", points=points)]))
    expected = box_region(35, 35, 50, 50) & ~box_region(25, 25, 10, 10) & ~box_region(65, 45, 30, 10)
    assert ((load_mask(tmp_path / "super")[1] > 0) == expected).all()


def test_a_size_of_slightly_other_proportions_is_refused(tmp_path):
    TOOLS["labelme"](tmp_path)
    edit(tmp_path, "labelme", lambda content: content.update(imageHeight=84, imageWidth=110))
    with refused("shot 0.jpg", "84x112", "84x110"):
        find_masks(tmp_path)


def test_names_of_several_words_and_empty_lines_of_a_list_keep_the_numbers(tmp_path):
    truth = TOOLS["YOLO, Ultralytics"](tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("traffic light\n\ntree\n")
    for path in tmp_path.rglob("labels/*/*.txt"):
        path.write_text("".join(line.replace("1 ", "2 ", line.startswith("1 "))
                                for line in path.read_text().splitlines(True)))
    path = next(path for path in truth if path.stem == "shot 0")
    names, mask = load_mask(tmp_path)
    assert names == ["background", "traffic light", "tree"] and iou(mask, truth[path]) > 0.97


def test_masks_in_colors_that_differ_in_blue_alone_are_no_gray_values(tmp_path):
    colors = np.array([(0, 0, 0), (1, 1, 200), (2, 2, 90)], np.uint8)
    for seed in range(3):
        pixels, mask = scene(seed, 3)
        save(tmp_path / f"images/{seed}.jpg", pixels)
        save(tmp_path / f"masks/{seed}.png", colors[mask])
    with refused("painted in colors"):
        load("folder", tmp_path)
