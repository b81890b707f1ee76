"""VGG Image Annotator 2 (and 1): its project, or its annotations exported as JSON or CSV.

Regions carry attributes of the user's own, one of which is the class; without any, all are of one class.
Coordinates are continuous, a box is x, y, width and height; an ellipse turns clockwise by theta, in radians.
"""
import json
import math

from config import InputError
from dataio.annotations.files import (OBJECT, AnnotatedImage, Annotations, class_properties, read_csv,
                                      read_shapes)
from dataio.annotations.shapes import BadLabel, Shape, box, ellipse

CLASS_NAMES = ("label", "class", "type", "category", "name")  # of the attribute that is the class
PROJECT = "_via_img_metadata"  # the key of the images in a project
COLUMNS = ("filename", "region_shape_attributes", "region_attributes")  # of a CSV export


def find_files(folder):
    """Return the VIA files of a FolderFiles: JSON, else CSV."""
    files = [path for path, content in folder.json.items() if isinstance(content, dict)
             and (PROJECT in content or any(map(is_image, content.values())))]
    return files or list(filter(has_regions, folder.with_ending(".csv")))


def is_image(entry):
    """Return whether a value of an exported JSON file is an image with its regions."""
    return isinstance(entry, dict) and entry.keys() >= {"filename", "regions"}


def has_regions(path):
    """Return whether a CSV file has the columns of an export."""
    try:
        _, titles = next(read_csv(path), (1, []))
    except (OSError, ValueError, InputError):
        return False
    return {title.removeprefix("#") for title in titles} >= set(COLUMNS)


def read(files, folder):
    """Return the Annotations of VIA files."""
    found = []  # (file, name of the image, regions)
    for path in files:
        with folder.reading(path, "VIA"):
            if path.suffix.lower() == ".csv":
                entries = csv_images(path)
            else:
                entries = [(str(entry["filename"]), entry["regions"])
                           for entry in folder.json[path].get(PROJECT, folder.json[path]).values()]
            for name, regions in entries:
                regions = regions.values() if isinstance(regions, dict) else regions
                found.append((path, name, list(regions)))
    attributes = [region.get("region_attributes") for *_, regions in found for region in regions
                  if isinstance(region, dict)]
    attribute, notes = class_attribute(attributes)

    def read_region(region, where):
        label = OBJECT if attribute is None else ticked(region["region_attributes"].get(attribute))
        return shape_of(region["shape_attributes"], label, where)

    images = [AnnotatedImage(name, f"{path} image {name}", path,
                             read_shapes(regions, read_region, f"{path} image {name} region", "VIA"))
              for path, name, regions in found]
    return Annotations([], images, files, notes=notes)


def csv_images(path):
    """Return [(name of the image, [region])] of a CSV export, in which every region is a row.

    Raises InputError, ValueError and KeyError.
    """
    (_, titles), *rows = read_csv(path)
    titles, images = [title.removeprefix("#") for title in titles], {}  # older versions begin with a #
    for _, cells in rows:
        row = dict(zip(titles, cells, strict=False))
        name, shape, attributes = (row[column] for column in COLUMNS)
        region = dict(shape_attributes=json.loads(shape), region_attributes=json.loads(attributes))
        images.setdefault(name, []).extend([region] * bool(region["shape_attributes"]))  # {} without a region
    return list(images.items())


def class_attribute(attributes):
    """Return which key of the attributes of all regions, [{name: value}], is the class, None = none is, and
    notes on it: one of CLASS_NAMES, else the one that most regions have.
    """
    rows = [{name: str(value) for name, value in row.items() if value not in ("", None, {})}
            for row in attributes if isinstance(row, dict)]
    values = class_properties(rows)
    names = sorted(values, key=lambda name: -len(values[name]))
    named = [name for known in CLASS_NAMES for name in names if name.lower() == known]
    best = next(iter(named or names), None)
    others = ", ".join(sorted({name for row in rows for name in row} - {best}))
    if best is None and attributes:
        reason = f" (its attributes are {others})" if others else ""
        return None, [f"no attribute is the class of a region{reason}: the only one is called {OBJECT}"]
    return best, [f"the class of a region is its attribute {best}, not {others}"] if others else []


def ticked(value):
    """Return the value of an attribute; of check boxes, {option: true}, the one that is ticked."""
    if not isinstance(value, dict):
        return value
    options = [option for option, is_ticked in value.items() if is_ticked]
    if len(options) > 1:
        raise BadLabel("of several classes")
    return options[0] if options else ""


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
