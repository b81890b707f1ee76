"""GeoJSON and GeoPackage files of polygons on a map.

A file that is called like an image (a.geojson, a.tif.geojson, a_annotations.geojson) belongs to it, another
one to every GeoTIFF that its polygons touch. Coordinates are those of the file's reference system,
transformed to that of each image and to its pixels; a pixel is inside where its center is. Beside an image
without georeference they are pixels. Smaller shapes lie over larger ones.
"""
import sqlite3
from functools import partial
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from rasterio import warp
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import Affine

from config import InputError, count_of
from dataio.annotations.files import (OBJECT, AnnotatedImage, Annotations, class_properties, read_shapes,
                                      split_in)
from dataio.annotations.shapes import BadLabel, Bitmap, Shape, area_of
from dataio.images import BandFile
from dataio.layout import MASK_AFFIX, common_name
from utils import grouped, in_parallel

LABEL_KEYS = ("label", "class", "type", "name", "category", "class_name", "classname", "kind")
SURE_KEYS = ("label", "class", "category", "class_name", "classname")  # though few features have them
MOST_FILES = 20  # whose names may be classes
OUTSIDE = "whose shapes lie on no image: is it of another place, or its reference system wrong?"
DEGREES, LARGEST = CRS.from_epsg(4326), (180.1, 90.1)  # of GeoJSON that says nothing else (RFC 7946)
KINDS = {"Point": "point", "MultiPoint": "points", "LineString": "line", "MultiLineString": "lines"}
FEATURE_TABLES = """
    SELECT c.table_name, g.column_name, s.organization, s.organization_coordsys_id, s.definition
    FROM gpkg_contents c JOIN gpkg_geometry_columns g USING (table_name)
    LEFT JOIN gpkg_spatial_ref_sys s ON g.srs_id = s.srs_id WHERE c.data_type = 'features' ORDER BY 1
"""


class Layer(NamedTuple):
    """The features of a file, or of a table in it. features: of GeoJSON, whose geometry may be bytes of a
    GeoPackage; crs: their reference system, None = that of the images.

    shapes: those of the features that are polygons, in their coordinates, labeled None where nothing names
    the classes; rest: points, lines, and what cannot be read.
    """

    path: object
    name: str
    features: list
    crs: CRS | None
    shapes: list = ()
    rest: list = ()


class Place(NamedTuple):
    """Where an image lies: transform of pixels to coordinates, None without; crs, or None; size (H, W)."""

    transform: Affine | None
    crs: CRS | None
    size: tuple | None


def find_files(folder):
    """Return the files of a FolderFiles with polygons on a map: GeoJSON, GeoPackage; shapefiles alone too."""
    files = [path for path, content in folder.json.items()
             if features_of(content) is not None and not is_qupath(content)]
    files += folder.with_ending(".gpkg")
    return files or folder.with_ending(".shp")


def read(files, folder):
    """Return the Annotations of files. Raises InputError for shapefiles alone."""
    if files[0].suffix.lower() == ".shp":
        raise InputError(f"{files[0]} is a shapefile, which is not read: convert it with ogr2ogr -f GPKG "
                         f"{files[0].stem}.gpkg {files[0].name}")
    layers = []
    for path in files:
        with folder.reading(path, "GeoJSON or GeoPackage"):
            is_json = path.suffix.lower() != ".gpkg"
            layers += [open_geojson(path, folder.json[path])] if is_json else open_geopackage(path)
    key = class_property([properties_of(feature) for layer in layers for feature in layer.features])
    layers = [read_layer(layer, key) for layer in layers]
    notes = [] if key is None else [f"the property `{key}` of the features is their class"]
    places = dict(zip(folder.images, in_parallel(place_of, folder.images, "reading images"), strict=True))
    images, over, lost, doubts = {}, [], [], []  # lost: the shapes that lie on no image
    for layer in layers:
        own = folder.find_images((layer.path.stem, common_name(layer.path, MASK_AFFIX)), layer.path)
        if len(own) > 1:
            folder.problems["file of several images of its name: rename them"].append(str(layer.path))
        elif own:
            lost += place_beside(named(layer, OBJECT), own[0], places[own[0]], images, folder, doubts)
        else:
            over.append(layer)
    if key is None:
        over = named_by_file(over, doubts)
    lost += place_on_map(over, places, images, folder, doubts)
    any_image = next(iter(images), None)
    for layer in over:
        for shape in layer.rest:
            if shape.problem or any_image:
                add_shapes(images, None if shape.problem else any_image, layer.path, [shape])
    if lost:
        doubts.append(f"{count_of(len(lost), 'shape')} cover the center of no pixel, as {lost[0]}: outside "
                      "of the images, or too small")
    state = "\n".join(f"{path.relative_to(folder.root)} {places[path].transform!r} {places[path].crs}"
                      for path in sorted(filter(None, images)))  # the masks depend on where images lie
    return Annotations([], list(images.values()), files, by_area=True, notes=notes,
                       doubts=list(dict.fromkeys(doubts)), state=state)


def add_shapes(images, name, path, shapes):
    """Add the shapes of a file to those of an image in {name: AnnotatedImage}; None: shapes of no image."""
    images.setdefault(name, AnnotatedImage(name, str(name), path, [])).shapes.extend(shapes)


# --- files ------------------------------------------------------------------------------------------------
def features_of(content):
    """Return the features of the content of a JSON file, None where it is no GeoJSON."""
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        content = content.get("features")
        return content if isinstance(content, list) else None
    features = [content] if kind == "Feature" else content
    is_list = isinstance(features, list) and features and all(
        isinstance(entry, dict) and entry.get("type") == "Feature" for entry in features)
    return features if is_list else None


def is_qupath(content):
    """Return whether the content of a JSON file is GeoJSON of QuPath, which qupath.py reads."""
    return any(map(qupath_kind, features_of(content) or []))


def qupath_kind(feature):
    """Return what QuPath calls a feature, "" for those of other programs."""
    properties = properties_of(feature)
    id = str(feature.get("id")) if isinstance(feature, dict) else ""
    kind = properties.get("objectType") or (id if id.startswith("Path") else "")
    return str(kind or ("annotation" if "classification" in properties else ""))


def open_geojson(path, content):
    """Return the Layer of a GeoJSON file, without shapes. Raises InputError."""
    is_said = isinstance(content, dict) and content.get("crs")
    crs = crs_of(path, content["crs"]["properties"]["name"]) if is_said else DEGREES
    return Layer(path, path.stem, features_of(content), crs)


def open_geopackage(path):
    """Return the [Layer] of the tables of a GeoPackage, without shapes. Raises InputError."""
    try:
        import shapely.wkb  # noqa: F401 - of which decode_blob has need
    except ImportError:
        raise InputError(f"{path} is a GeoPackage, which needs shapely: pip install shapely, or convert it "
                         f"with ogr2ogr -f GeoJSON {path.stem}.geojson {path.name}") from None
    layers = []
    try:
        base = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        base.row_factory = sqlite3.Row
        for table, column, organization, number, definition in base.execute(FEATURE_TABLES).fetchall():
            quoted = str(table).replace('"', '""')
            rows = map(dict, base.execute(f'SELECT * FROM "{quoted}"'))
            features = [dict(geometry=row.pop(column), properties=row) for row in rows]
            is_defined = number not in (None, 0, -1)
            name = f"EPSG:{number}" if str(organization).upper() == "EPSG" else definition
            layers.append(Layer(path, str(table), features, crs_of(path, name) if is_defined else None))
        base.close()
    except sqlite3.Error as error:
        raise InputError(f"{path} is not a readable GeoPackage ({error}): close it elsewhere, or export it "
                         "again") from None
    return layers


def crs_of(path, name):
    """Return the CRS of a name or definition. Raises InputError."""
    try:
        return CRS.from_user_input(name)
    except CRSError:
        raise InputError(f"{path} has the reference system {name}, which is not known: export it in EPSG:4326"
                         ) from None


# --- features ---------------------------------------------------------------------------------------------
def read_layer(layer, key):
    """Return a Layer with the Shapes of its features; key: the property that is their class, or None."""
    def read_feature(feature, where):
        label = key and label_of((feature.get("properties") or {}).get(key))
        return read_geometry(feature["geometry"], Shape(label, "", where))

    name = f"{layer.path} {layer.name}" if layer.path.suffix.lower() == ".gpkg" else layer.path
    found = read_features(layer.features, read_feature, name)
    rest = [shape._replace(label=shape.label or OBJECT) for shape in found if not shape.rings]
    shapes = [shape for shape in found if shape.rings]
    if layer.crs is DEGREES and any((abs(shape.rings[0]).max(0) > LARGEST).any() for shape in shapes):
        layer = layer._replace(crs=None)
    return layer._replace(shapes=shapes, rest=rest)


def read_features(features, read_feature, where):
    """Return the Shapes of features, of each those that read_feature(feature, where) returns."""
    shapes = []
    for found in read_shapes(features, read_feature, f"{where} feature", "GeoJSON"):
        shapes += found if isinstance(found, list) else [found]  # a Shape with a problem
    return shapes


def properties_of(feature):
    """Return the properties of a feature, {} where it has none."""
    properties = feature.get("properties") if isinstance(feature, dict) else None
    return properties if isinstance(properties, dict) else {}


def class_property(rows):
    """Return the property that names the class of a feature, None without; rows: all properties.

    A `label` that few features have leaves the others without a class, which is a problem, but no reason to
    call all of them alike; so does a `name` that is repeated, where there is no text that most have.
    """
    names = [{key: value for key, value in row.items() if is_name(value)} for row in rows]
    values = class_properties(names)
    common = [key for key in values if 2 * len(values[key]) > len(rows)]
    known = [key for name in LABEL_KEYS for key in values if key.lower() == name]
    sure = [key for key in known if key in common or key.lower() in SURE_KEYS]
    texts = [key for key in common if all(isinstance(value, str) for value in values[key])
             and len(set(values[key])) > 1]
    repeated = [key for key in known if len(set(values[key])) < len(values[key])]
    return next(iter(sure or (texts if len(texts) == 1 else repeated)), None)


def is_name(value):
    """Return whether the value of a property may name a class."""
    return isinstance(value, str) and bool(value.strip()) or type(value) is int


def label_of(value):
    """Return the class that the value of a property names, "" for none."""
    return "" if not is_name(value) else f"class {value}" if isinstance(value, int) else value


def read_geometry(geometry, shape):
    """Return the [Shape] of a geometry of GeoJSON, one for each polygon. Raises BadLabel."""
    if geometry is None:
        raise BadLabel("without a geometry")
    geometry = decode_blob(geometry) if isinstance(geometry, (bytes, str)) else geometry
    kind, polygons = geometry["type"], geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        return [shape._replace(kind=KINDS.get(kind, kind))]
    shapes = []
    for number, rings in enumerate(polygons if kind == "MultiPolygon" else [polygons], 1):
        outer, *holes = map(read_ring, rings)
        where = f"{shape.where} polygon {number}" if kind == "MultiPolygon" else shape.where
        holes = [ring for ring in holes if len(ring) > 2]
        if len(outer) > 2 and area_of(outer) > 0:
            shapes.append(shape._replace(kind="polygon", where=where, rings=[outer], holes=holes))
    if not shapes:
        raise BadLabel("without area (fewer than three points, or all on a line)")
    return shapes


def decode_blob(blob):
    """Return the geometry, as of GeoJSON, of a GeoPackage: WKB behind a head whose flags tell its length.
    Raises BadLabel.
    """
    from shapely import wkb
    try:
        if blob[:2] != b"GP":
            raise ValueError("not of a GeoPackage")
        return wkb.loads(blob[8 + (0, 32, 48, 48, 64)[blob[3] >> 1 & 7]:]).__geo_interface__
    except Exception as error:  # those of shapely are not all of one class
        raise BadLabel(f"with a geometry that cannot be read ({error})") from None


def read_ring(positions):
    """Return the positions of a ring, of two or three numbers each, as (n, 2). Raises BadLabel."""
    try:
        points = np.array([position[:2] for position in positions], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, KeyError):
        points = np.array([[np.nan, np.nan]])
    if not np.isfinite(points).all():
        raise BadLabel("with coordinates that are not pairs of numbers")
    return points


def named_by_file(layers, doubts):
    """Return layers over several images with their names as the classes: not those of many, or of splits."""
    names = sorted({layer.name for layer in layers if layer.shapes})
    use_names = len(names) <= MOST_FILES and not any(map(split_in, names))
    called = f"they are called as their files, {', '.join(names)}" if use_names else \
        f"the only one is called {OBJECT}"
    doubts += [f"no property of all files names the classes: {called}"] * bool(names)
    return [named(layer, layer.name if use_names else OBJECT) for layer in layers]


def named(layer, label):
    """Return a Layer whose shapes have a label where no property names it."""
    return layer._replace(shapes=[shape._replace(label=label) if shape.label is None else shape
                                  for shape in layer.shapes])


# --- images -----------------------------------------------------------------------------------------------
def place_of(path):
    """Return the Place of an image file."""
    try:
        with BandFile(path) as file:
            source = file.source
            has_place = source.crs or not source.transform.is_identity
            return Place(source.transform if has_place else None, source.crs, source.shape)
    except InputError:  # such as a JPEG
        return Place(None, None, None)


def place_beside(layer, image, place, images, folder, doubts):
    """Add the shapes of a file to the image that it is called like; return where those beyond it are."""
    if layer.rest or not layer.shapes:
        add_shapes(images, image, layer.path, layer.rest)
    if place.transform is not None:
        return place_on_map([layer], {image: place}, images, folder, doubts)
    rings = [ring for shape in layer.shapes for ring in shape.rings]
    if rings and (np.ptp(np.concatenate(rings), axis=0) < 2).all():
        folder.problems["file in degrees beside an image without georeference: save it as a GeoTIFF"].append(
            str(layer.path))
    elif rings:
        add_shapes(images, image, layer.path, layer.shapes)
    return []


def place_on_map(layers, places, images, folder, doubts):
    """Add the images that lie within what the shapes of files cover together, with the pixels of these, to
    {image: AnnotatedImage}; return where the shapes are that lie on none. places: {image: Place}.
    """
    paths = {shape.where: layer.path for layer in layers for shape in layer.shapes}
    found, on_map = set(), [image for image, place in places.items() if place.transform is not None]
    for alike in grouped(on_map, lambda image: str(places[image].crs)).values():
        shapes = [shape for layer in layers for shape in projected(layer, places[alike[0]], doubts)]
        if not shapes:
            continue
        boxes = np.array([[*shape.rings[0].min(0), *shape.rings[0].max(0)] for shape in shapes])  # (N, 4)
        extent = np.concatenate([boxes.min(0)[:2], boxes.max(0)[2:]])
        for image in alike:
            box = box_of(places[image])
            if overlaps(extent[None], box).any():
                touching = [shapes[index] for index in np.flatnonzero(overlaps(boxes, box))]
                kept = cut_all(touching, places[image])
                found |= {shape.where for shape in kept}
                add_shapes(images, image, paths[kept[0].where] if kept else layers[0].path, kept)
    for layer in layers:
        if layer.shapes and not found & {shape.where for shape in layer.shapes}:
            folder.problems[f"file {OUTSIDE}"].append(str(layer.path))
    return [where for where in paths if where not in found]


def projected(layer, place, doubts):
    """Return the shapes of a Layer in the coordinates of a Place. Raises InputError."""
    if layer.crs == place.crs or not layer.shapes:
        return layer.shapes
    if layer.crs is None or place.crs is None:
        which = "images" if layer.crs else "files"
        doubts.append(f"{which} say no reference system: coordinates are taken as they are, as in "
                      f"{layer.path.name}")
        return layer.shapes
    rings = [ring for shape in layer.shapes for ring in (*shape.rings, *shape.holes)]
    try:
        moved = np.stack(warp.transform(layer.crs, place.crs, *np.concatenate(rings).T), 1)
    except Exception as error:  # of GDAL's many classes
        raise InputError(f"{layer.path} has coordinates that {place.crs}, the reference system of images, "
                         f"does not have ({error}): is its own one wrong?") from None
    moved = iter(np.split(moved, np.cumsum([len(ring) for ring in rings])[:-1]))
    return [shape._replace(rings=[next(moved) for _ in shape.rings],
                           holes=[next(moved) for _ in shape.holes]) for shape in layer.shapes]


def box_of(place):
    """Return the (4,) left, bottom, right, top of a Place in coordinates."""
    height, width = place.size
    corners = apply(place.transform, np.array([(0, 0), (width, 0), (0, height), (width, height)]))
    return np.concatenate([corners.min(0), corners.max(0)])


def apply(transform, points):
    """Return points (n, 2) moved by an Affine."""
    a, b, c, d, e, f = transform[:6]
    return points @ np.array([(a, d), (b, e)]) + (c, f)


def overlaps(boxes, box):
    """Return (N,) bool: which boxes (N, 4) share a point with a box (4,)."""
    return (boxes[:, :2] <= box[2:]).all(1) & (boxes[:, 2:] >= box[:2]).all(1)


def cut_all(shapes, place):
    """Return Shapes as pixels of the image of a Place, without those that cover the center of none."""
    kept, inverse = [], ~place.transform
    for shape in shapes:
        rings = [apply(inverse, ring) for ring in (*shape.rings, *shape.holes)]
        left, top = np.floor(rings[0].min(0)).clip(0, place.size[::-1]).astype(int).tolist()
        right, bottom = np.ceil(rings[0].max(0)).clip(0, place.size[::-1]).astype(int).tolist()
        bitmap = partial(draw_polygon, rings, (left, top, right, bottom))
        if right > left and bottom > top and bitmap().pixels.any():
            kept.append(shape._replace(rings=(), holes=(), bitmap=bitmap))
    return kept


def draw_polygon(rings, box):
    """Return the Bitmap of the pixels in a box whose centers are in a polygon: an outline, then holes."""
    left, top, right, bottom = box
    geometry = dict(type="Polygon", coordinates=[[*ring.tolist(), ring[0].tolist()] for ring in rings])
    pixels = rasterize([geometry], out_shape=(bottom - top, right - left), dtype=np.uint8,
                       transform=Affine.translation(left, top))
    return Bitmap(pixels > 0, left, top)
