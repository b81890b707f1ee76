"""VGG Image Annotator 2 (and 1): its project, or its annotations exported as JSON or CSV.

Regions carry attributes of the user's own, one of which is the class; without any, all are of one class.
Coordinates are continuous, a box is x, y, width and height; an ellipse turns clockwise by theta, in radians.
"""
import csv
import json
import math

from config import InputError
from dataio.annotations.csv_runs import csv_reader
from dataio.annotations.files import AnnotatedImage, Annotations, read_shapes
from dataio.annotations.shapes import BadLabel, Shape, box, ellipse

CLASS_NAMES = ("label", "class", "type", "category", "name")  # of the attribute that is the class
OBJECT = "object"  # the class where no attribute is one
OWN_NAMES, OWN_SHARE = 20, 0.9  # values above which an attribute that mostly differs (this share) is no class
PROJECT = "_via_img_metadata"  # the key of the images in a project
COLUMNS = {"filename", "region_shape_attributes", "region_attributes"}  # of a CSV export


def find_files(folder):
    """Return the VIA files of a FolderFiles: JSON, else CSV."""
    files = [path for path, content in folder.json.items() if isinstance(content, dict)
             and (PROJECT in content or any(map(is_image, content.values())))]
    return files or list(filter(has_regions, folder.with_ending(".csv")))


def is_image(entry):
    """Return whether a value of an exported JSON file is an image with its regions."""
    return isinstance(entry, dict) and entry.keys() >= {"filename", "regions"}


def csv_rows(path):
    """Yield the rows of a CSV file, lists of text, without the # before those of older versions."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv_reader(file):
            if row:
                yield [row[0].removeprefix("#"), *row[1:]]


def has_regions(path):
    """Return whether a CSV file has the columns of an export."""
    try:
        return set(next(csv_rows(path), ())) >= COLUMNS
    except (OSError, ValueError, csv.Error):
        return False


def read(files, folder):
    """Return the Annotations of VIA files."""
    found = []  # (file, name of the image, regions)
    for path in files:
        with folder.reading(path, "VIA"):
            if path.suffix.lower() == ".csv":
                found += [(path, name, regions) for name, regions in read_csv(path).items()]
                continue
            content = folder.json[path]
            for entry in content.get(PROJECT, content).values():
                regions = entry["regions"]
                regions = list(regions.values()) if isinstance(regions, dict) else list(regions)
                found.append((path, str(entry["filename"]), regions))
    attributes = [region.get("region_attributes") for *_, regions in found for region in regions
                  if isinstance(region, dict)]
    attribute, notes = class_attribute(attributes)

    def read_region(region, where):
        label = OBJECT if attribute is None else chosen(region["region_attributes"].get(attribute))
        return shape_of(region["shape_attributes"], label, where)

    images = [AnnotatedImage(name, f"{path} image {name}", path,
                             read_shapes(regions, read_region, f"{path} image {name} region", "VIA"))
              for path, name, regions in found]
    return Annotations([], images, files, notes=notes)


def read_csv(path):
    """Return {name of the image: [region]} of a CSV export, in which every region is a row.

    Raises InputError and ValueError.
    """
    try:
        heads, *rows = csv_rows(path)
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file ({error}): export it again") from None
    images = {}
    for row in rows:
        entry = dict(zip(heads, row, strict=False))
        regions = images.setdefault(entry["filename"], [])
        region = {key: json.loads(entry[key]) for key in ("region_shape_attributes", "region_attributes")}
        if region["region_shape_attributes"]:  # {} of an image without regions
            regions.append(dict(shape_attributes=region["region_shape_attributes"],
                                region_attributes=region["region_attributes"]))
    return images


def class_attribute(attributes):
    """Return which key of the attributes of all regions, [{name: value}], is the class, None = none is, and
    notes on it. One that has a value of its own in nearly each of many regions, as a remark, is no class.
    """
    values = {}  # as text
    for name, value in (item for row in attributes if isinstance(row, dict) for item in row.items()):
        if value not in ("", None, {}):
            values.setdefault(name, []).append(str(value))
    names = sorted((name for name, texts in values.items()
                    if len(texts) <= OWN_NAMES or len(set(texts)) <= OWN_SHARE * len(texts)),
                   key=lambda name: -len(values[name]))
    named = [name for known in CLASS_NAMES for name in names if name.lower() == known]
    best = next(iter(named or names), None)
    others = ", ".join(sorted(values.keys() - {best}))
    if best is None and attributes:
        return None, ["no attribute of the regions names classes" + (f" ({others})" if others else "")
                      + f": the only one is called {OBJECT}"]
    return best, [f"the class of a region is its attribute {best}, not {others}"] if others else []


def chosen(value):
    """Return the value of an attribute as text; of check boxes {option: true}, the one that is ticked."""
    if not isinstance(value, dict):
        return value
    ticked = [option for option, is_ticked in value.items() if is_ticked]
    if len(ticked) > 1:
        raise BadLabel("of several classes")
    return ticked[0] if ticked else ""


def shape_of(values, label, where):
    """Return the Shape of the `shape_attributes` of a region. Raises BadLabel."""
    kind = str(values["name"])
    shape = Shape(label, kind, where)
    if kind == "polygon":
        if len(values["all_points_x"]) != len(values["all_points_y"]):
            raise BadLabel("with more x than y, or fewer")
        return shape._replace(rings=[list(zip(values["all_points_x"], values["all_points_y"], strict=True))])
    if kind == "rect":
        return shape._replace(rings=[box(values["x"], values["y"], values["width"], values["height"])])
    if kind in ("circle", "ellipse"):
        radii = [values["r"]] * 2 if kind == "circle" else [values["rx"], values["ry"]]
        degrees = math.degrees(values.get("theta") or 0)
        return shape._replace(rings=[ellipse([values["cx"], values["cy"]], radii, degrees)])
    return shape
