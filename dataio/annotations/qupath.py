"""QuPath: GeoJSON of the objects of an image, in its pixels: a.geojson beside a.tif or a.png.

Annotations are read, cells and tiles only where there is nothing else. The class `Ignore*` is not counted.
"""
from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.geo import (features_of, is_qupath, properties_of, qupath_kind, read_features,
                                    read_geometry)
from dataio.annotations.shapes import Shape
from dataio.layout import MASK_AFFIX, common_name

ANNOTATIONS = {"annotation", "PathAnnotationObject"}  # others are cells and tiles


def find_files(folder):
    """Return the files of a FolderFiles that QuPath wrote."""
    return [path for path, content in folder.json.items() if is_qupath(content)]


def read(files, folder):
    """Return the Annotations of QuPath's files."""
    images, notes = [], []
    for path in files:
        features = features_of(folder.json[path])
        kinds = set(map(qupath_kind, features))
        wanted = kinds & ANNOTATIONS or kinds
        if kinds != wanted:
            notes.append(f"QuPath: {', '.join(sorted(kinds - wanted))} left aside, annotations are read")
        shapes = read_features(features, reader_of(wanted), path)
        names = path.stem, common_name(path, MASK_AFFIX)  # a.png_annotations.geojson
        images.append(AnnotatedImage(names, str(path), path, shapes))
    return Annotations([], images, files, by_area=True, notes=list(dict.fromkeys(notes)))


def reader_of(kinds):
    """Return the function that reads a feature into its Shapes, none of other kinds."""
    def read_feature(feature, where):
        if qupath_kind(feature) not in kinds:
            return []
        label = properties_of(feature).get("classification")
        label = (label.get("name") or ": ".join(label["names"])) if isinstance(label, dict) else label
        label = "ignore" if str(label).lower() == "ignore*" else label or ""
        return read_geometry(feature["geometry"], Shape(label, "", where))

    return read_feature
