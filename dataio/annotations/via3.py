"""VGG Image Annotator 3: a project file of images (`file`, `view`), regions (`metadata`) and attributes.

A region is [number of its kind, x, y, ...] in continuous coordinates; one attribute is its class.
"""
from dataio.annotations.files import OBJECT, AnnotatedImage, Annotations, read_shapes
from dataio.annotations.shapes import BadLabel, Shape, as_points, box, ellipse, rectangle
from dataio.annotations.via import class_attribute

KINDS = {1: "point", 2: "rectangle", 3: "circle", 4: "ellipse", 5: "line", 6: "polyline", 7: "polygon",
         8: "extreme rectangle", 9: "extreme circle"}
OF_OPTIONS = (2, 3, 4)  # check boxes, radio buttons, select: types of attributes whose values are options


def find_files(folder):
    """Return the VIA 3 projects of a FolderFiles."""
    return list(folder.json_with("project", "attribute", "file", "view", "metadata"))


def read(files, folder):
    """Return the Annotations of VIA 3 projects."""
    images, notes = [], []
    for path in files:
        with folder.reading(path, "VIA"):
            content = folder.json[path]
            regions = {view: [] for view in content["view"]}
            for entry in content["metadata"].values():
                if entry["xy"]:  # else of the whole file, or of a time in it
                    regions[str(entry["vid"])].append(entry)
            names = {id: str(attribute["aname"]) for id, attribute in content["attribute"].items()}
            attributes = [{names.get(id, id): value for id, value in entry["av"].items()}
                          for entries in regions.values() for entry in entries]
            class_name, lines = class_attribute(attributes)
            notes += [line for line in lines if line not in notes]
            id = next((id for id in names if names[id] == class_name), None)
            read_region = reader_of(id, content["attribute"].get(id, {}))
            for view, entries in regions.items():
                file = content["file"][str(content["view"][view]["fid_list"][0])]
                name = str(file["fname"])
                source = f"{path} image {name}"
                shapes = read_shapes(entries, read_region, f"{source} region", "VIA")
                images.append(AnnotatedImage(name, source, path, shapes))
    return Annotations([], images, files, notes=notes)


def reader_of(id, attribute):
    """Return the function that reads a region whose class is the attribute of this id, None = of none."""
    def read_region(region, where):
        label = OBJECT if id is None else region["av"].get(id, "")
        if attribute.get("type") in OF_OPTIONS:
            if "," in str(label):
                raise BadLabel("of several classes")
            label = attribute["options"].get(str(label), "")
        number, *points = region["xy"]
        kind = KINDS.get(number, str(number))
        shape = Shape(label, kind, where)
        if kind == "polygon":
            return shape._replace(rings=[points])
        if kind == "rectangle":
            return shape._replace(rings=[box(*points)])
        if kind == "extreme rectangle":  # around four points
            points = as_points(points)
            return shape._replace(rings=[rectangle([points.min(0), points.max(0)])])
        if kind in ("circle", "ellipse"):
            x, y, *radii = points
            return shape._replace(rings=[ellipse([x, y], radii * 2 if kind == "circle" else radii)])
        return shape

    return read_region
