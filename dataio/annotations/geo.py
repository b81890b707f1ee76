"""GeoJSON and GeoPackage files of polygons on a map, and the GeoJSON of QuPath, in pixels of an image.

A file that is called like an image (a.geojson, a.tif.geojson, a_annotations.geojson) belongs to it, another
one to every GeoTIFF that its polygons touch. Coordinates are those of the file's reference system,
transformed to that of each image and to its pixels; a pixel is inside where its center is. Beside an image
without georeference they are pixels. Smaller shapes lie over larger ones.
"""
import sqlite3
from collections import Counter
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
from dataio.annotations.files import AnnotatedImage, Annotations, read_shapes, split_in
from dataio.annotations.shapes import BadLabel, Bitmap, Shape, area_of
from dataio.images import BandFile
from dataio.layout import MASK_AFFIX, common_name
from utils import grouped, in_parallel

LABEL_KEYS = ("label", "class", "type", "name", "category", "class_name", "classname", "kind")
SURE_KEYS = ("label", "class", "category", "class_name", "classname")  # though few features have them
OWN_NAMES = 20  # features (or files) above which names that are mostly different are no classes
OUTSIDE = "whose shapes lie on no image: is it of another place, or its reference system wrong?"
OBJECT = "object"  # the class where nothing names one
DEGREES, LARGEST = CRS.from_epsg(4326), (180.1, 90.1)  # of GeoJSON that says nothing else (RFC 7946)
KINDS = {"Point": "point", "MultiPoint": "points", "LineString": "line", "MultiLineString": "lines"}
FEATURE_TABLES = """
    SELECT c.table_name, g.column_name, s.organization, s.organization_coordsys_id, s.definition
    FROM gpkg_contents c JOIN gpkg_geometry_columns g USING (table_name)
    LEFT JOIN gpkg_spatial_ref_sys s ON g.srs_id = s.srs_id WHERE c.data_type = 'features' ORDER BY 1
"""
QUPATH, QUPATH_OBJECTS = "QuPath", ("annotation", "PathAnnotationObject")  # others are cells and tiles


class Layer(NamedTuple):
    """The features of a file, or of a table in it. features: of GeoJSON, whose geometry may be bytes of a
    GeoPackage; crs: their reference system, None = that of the images; in_pixels: whether they are QuPath's.

    shapes: the Shapes of the features, in their coordinates, labeled None where nothing names the classes.
    """

    path: object
    name: str
    features: list
    crs: CRS | None
    in_pixels: bool = False
    shapes: list = ()


class Place(NamedTuple):
    """Where an image lies: transform of pixels to coordinates, None without; crs, or None; size (H, W)."""

    transform: Affine | None
    crs: CRS | None
    size: tuple | None


def find_files(folder):
    """Return the files of a FolderFiles with polygons on a map: GeoJSON, GeoPackage; shapefiles alone too."""
    files = [path for path, content in folder.json.items() if features_of(content) is not None]
    files += folder.with_ending(".gpkg")
    return files or folder.with_ending(".shp")


def read(files, folder):
    """Return the Annotations of files. Raises InputError for shapefiles alone."""
    if files[0].suffix.lower() == ".shp":
        raise InputError(f"{files[0]} is a shapefile, which is not read: convert it with ogr2ogr -f GPKG "
                         f"{files[0].stem}.gpkg {files[0].name}")
    layers, notes = [], Counter()  # {line: files}
    for path in files:
        with folder.reading(path, "GeoJSON or GeoPackage"):
            layers += open_geopackage(path) if path.suffix.lower() == ".gpkg" else \
                [open_geojson(path, folder.json[path])]
    layers = with_shapes(layers, notes)
    places = dict(zip(folder.images, in_parallel(place_of, folder.images, "reading images"), strict=True))
    beside, over = {}, []
    for layer in layers:
        own = folder.find_images((layer.path.stem, common_name(layer.path, MASK_AFFIX)), layer.path)
        if len(own) > 1:
            folder.problems["file of several images of its name: rename them"].append(str(layer.path))
        elif own:
            beside.setdefault(own[0], []).append(layer)
        elif layer.in_pixels:
            folder.problems["file in pixels without an image of its name"].append(str(layer.path))
        else:
            over.append(layer)
    doubts = Counter()
    images = [read_beside(image, places[image], found, folder, doubts) for image, found in beside.items()]
    over = [layer for layer in named(over, notes) if layer.shapes]
    images += read_over(over, places, folder, notes, doubts) if over else []
    images = merged(images)
    return Annotations([], images, files, by_area=True, notes=counted(notes), doubts=counted(doubts),
                       state=state_of(images, places, folder.root))


def counted(lines):
    """Return the lines of {line: number of files}, each with the number where it is said of several."""
    return [f"{line} ({count} files)" if count > 1 else line for line, count in lines.items()]


def merged(images):
    """Return [AnnotatedImage] with one entry for each image."""
    entries = {}
    for image in images:
        if image.name in entries:
            entries[image.name].shapes.extend(image.shapes)
        else:
            entries[image.name] = image
    return list(entries.values())


# --- files ------------------------------------------------------------------------------------------------
def features_of(content):
    """Return the features of the content of a JSON file, None where it is no GeoJSON."""
    if isinstance(content, dict) and content.get("type") == "Feature":
        return [content]
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
        return content if isinstance(content, list) else None
    is_list = isinstance(content, list) and content and all(
        isinstance(entry, dict) and entry.get("type") == "Feature" for entry in content)
    return content if is_list else None


def open_geojson(path, content):
    """Return the Layer of a GeoJSON file, without shapes. Raises InputError."""
    features = features_of(content)
    if any(map(qupath_kind, features)):
        return Layer(path, path.stem, features, None, in_pixels=True)
    is_said = isinstance(content, dict) and content.get("crs")
    return Layer(path, path.stem, features,
                 crs_of(path, content["crs"]["properties"]["name"]) if is_said else DEGREES)


def qupath_kind(feature):
    """Return what QuPath calls a feature, "" for those of other programs."""
    properties = properties_of(feature)
    id = str(feature.get("id")) if isinstance(feature, dict) else ""
    kind = properties.get("objectType") or (id if id.startswith("Path") else "")
    return str(kind or ("annotation" if "classification" in properties else ""))


def qupath_label(properties):
    """Return the class of a feature of QuPath."""
    label = properties.get("classification")
    label = (label.get("name") or ": ".join(label["names"])) if isinstance(label, dict) else label
    return "ignore" if str(label).lower() == "ignore*" else label or ""


def open_geopackage(path):
    """Return the [Layer] of the tables of a GeoPackage, without shapes. Raises InputError."""
    try:
        import shapely.wkb  # noqa: F401 - of which read_geometry has need
    except ImportError:
        raise InputError(f"{path} is a GeoPackage, which needs shapely: pip install shapely, or convert it "
                         f"with ogr2ogr -f GeoJSON {path.stem}.geojson {path.name}") from None
    layers, is_final = [], not path.with_name(f"{path.name}-wal").exists()  # else it is open elsewhere
    try:
        uri = f"file:{quote(str(path.resolve()))}?mode=ro&immutable={int(is_final)}"
        base = sqlite3.connect(uri, uri=True)
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
        raise InputError(f"{path} is not a readable GeoPackage ({error}): export it again") from None
    return layers


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


def crs_of(path, name):
    """Return the CRS of a name or definition. Raises InputError."""
    try:
        return CRS.from_user_input(name)
    except CRSError:
        raise InputError(f"{path} has the reference system {name}, which is not known: export it in EPSG:4326"
                         ) from None


# --- features ---------------------------------------------------------------------------------------------
def with_shapes(layers, notes):
    """Return layers with the Shapes of their features. Those with the same properties have one as class."""
    found = []
    for schema, alike in grouped(layers, schema_of).items():
        key = None
        if schema != QUPATH:
            key = class_property([properties_of(feature) for layer in alike for feature in layer.features])
        if key is not None:
            notes[f"the property `{key}` of the features is their class"] += len(alike)
        found += [read_layer(layer, key, notes) for layer in alike]
    return found


def read_layer(layer, key, notes):
    """Return a Layer with the Shapes of its features; key: the property that is their class, or None."""
    kinds = {qupath_kind(feature) for feature in layer.features}
    wanted = kinds & {*QUPATH_OBJECTS} or kinds

    def read_feature(feature, where):
        properties = feature.get("properties") or {}
        if layer.in_pixels and qupath_kind(feature) not in wanted:
            return []
        label = qupath_label(properties) if layer.in_pixels else label_of(properties, key)
        return read_geometry(feature["geometry"], Shape(label, "", where))

    if layer.in_pixels and kinds - wanted:
        notes[f"QuPath: {', '.join(sorted(kinds - wanted))} left aside, annotations are read"] += 1
    name = f"{layer.path} {layer.name}" if layer.path.suffix.lower() == ".gpkg" else layer.path
    shapes = flat(read_shapes(layer.features, read_feature, f"{name} feature", "GeoJSON"))
    rings = [ring for shape in shapes for ring in shape.rings]
    if layer.crs is DEGREES and any((abs(ring).max(0) > LARGEST).any() for ring in rings):
        layer = layer._replace(crs=None)  # these are no degrees
    return layer._replace(shapes=shapes)


def schema_of(layer):
    """Return the names of the properties in a Layer, as its first feature has them, or QUPATH."""
    return QUPATH if layer.in_pixels else tuple(next(iter(map(properties_of, layer.features)), ()))


def properties_of(feature):
    """Return the properties of a feature, {} where it has none."""
    properties = feature.get("properties") if isinstance(feature, dict) else None
    return properties if isinstance(properties, dict) else {}


def class_property(rows):
    """Return the property that names the class of a feature, None without; rows: all properties.

    A known one that at most half of the features have leaves the others without a class, which is a problem,
    but no reason to call all of them alike; names that most lack are rather those of single houses or roads.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = {key: [row[key] for row in rows if is_name(row.get(key))] for key in keys}
    common = [key for key in keys if 2 * len(values[key]) > len(rows) and (
        len(rows) <= OWN_NAMES or 2 * len(set(values[key])) <= len(rows))]
    rare = [key for key in keys if 0 < 2 * len(values[key]) <= len(rows) and 2 * len(set(values[key])) <= (
        len(values[key]) + OWN_NAMES * (key.lower() != "name"))]
    texts = [key for key in common if all(isinstance(value, str) for value in values[key])
             and len(set(values[key])) > 1]
    ways = (in_order(common, LABEL_KEYS), in_order(rare, SURE_KEYS), texts[:2 - len(texts)],
            in_order(rare, LABEL_KEYS))
    return next((key for way in ways for key in way), None)


def in_order(keys, names):
    """Return those of the keys that are among names, in the order of these."""
    return [key for name in names for key in keys if key.lower() == name]


def label_of(properties, key):
    """Return the class that a property says, "" where it says none; None without such a property."""
    if key is None:
        return None
    label = properties.get(key)
    return "" if not is_name(label) else f"class {label}" if isinstance(label, int) else label


def is_name(value):
    """Return whether the value of a property may name a class."""
    return isinstance(value, str) and bool(value.strip()) or type(value) is int


def read_geometry(geometry, shape):
    """Return the [Shape] of a geometry of GeoJSON, one for each polygon. Raises BadLabel."""
    if geometry is None:
        raise BadLabel("without a geometry")
    geometry = decode_blob(geometry) if isinstance(geometry, (bytes, str)) else geometry
    kind = geometry["type"]
    if kind == "GeometryCollection":
        return flat(read_geometry(part, shape) for part in geometry["geometries"])
    if kind not in ("Polygon", "MultiPolygon"):
        return [shape._replace(kind=KINDS.get(kind, kind))]
    polygons = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
    shapes = []
    for number, (outer, *holes) in enumerate(polygons, 1):
        rings = [read_ring(ring) for ring in (outer, *holes)]
        holes = [ring for ring in rings[1:] if len(ring) > 2]
        where = f"{shape.where} polygon {number}" if len(polygons) > 1 else shape.where
        shapes.append(shape._replace(kind="polygon", where=where, rings=rings[:1], holes=holes))
    return shapes


def read_ring(positions):
    """Return the positions of a ring, of two or three numbers each, as (n, 2). Raises BadLabel."""
    try:
        points = np.array([position[:2] for position in positions], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, KeyError):
        points = np.array([[np.nan, np.nan]])
    if not np.isfinite(points).all():
        raise BadLabel("with coordinates that are not pairs of numbers")
    return points


def flat(items):
    """Return lists of Shapes, and single ones among them, as one list."""
    return [shape for item in items for shape in (item if isinstance(item, list) else [item])]


def named(layers, notes):
    """Return layers over several images, with their names as the classes where nothing else names them."""
    without = {layer.name for layer in layers if any(shape.label is None for shape in layer.shapes)}
    use_names = len(without) <= OWN_NAMES and not any(map(split_in, without))
    if without:
        names = ", ".join(sorted(without))
        notes[f"no property names classes: they are called as their files, {names}" if use_names else
              f"no property names classes: the only one is called {OBJECT}"] += 1
    return [layer._replace(shapes=[with_label(shape, layer.name if use_names else OBJECT)
                                   for shape in layer.shapes]) for layer in layers]


def with_label(shape, label):
    """Return a Shape with a label where it has none."""
    return shape._replace(label=label) if shape.label is None else shape


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


def state_of(images, places, root):
    """Return where [AnnotatedImage] lie, as text with a line for each: the masks depend on it."""
    found = sorted((image.name, places[image.name]) for image in images if image.name)
    return "\n".join(f"{path.relative_to(root)} {place.transform and tuple(place.transform)[:6]} "
                     f"{place.crs and place.crs.to_wkt()}" for path, place in found)


def projected(layer, place, doubts):
    """Return the shapes of a Layer in the coordinates of a Place; those that cannot be have a problem."""
    if layer.crs == place.crs:
        return layer.shapes
    if layer.crs is None or place.crs is None:
        of = "images say no reference system" if layer.crs else "files say no reference system"
        doubts[f"{of}: coordinates are taken as they are, as in {layer.path.name}"] += 1
        return layer.shapes
    return transformed(layer.shapes, layer.crs, place.crs)


def transformed(shapes, crs, to):
    """Return shapes with rings and holes in another reference system."""
    def move(points):
        x, y = warp.transform(crs, to, *points.T)
        return np.stack([x, y], 1)

    rings = [ring for shape in shapes for ring in (*shape.rings, *shape.holes)]
    try:
        moved = np.split(move(np.concatenate(rings)), np.cumsum([len(ring) for ring in rings])[:-1]) \
            if rings else []
    except Exception as error:  # of GDAL's many classes: one that has no place fails all
        if len(shapes) == 1:
            problem = f"with coordinates that {to.to_string()} does not have ({error})"
            return [shapes[0]._replace(problem=problem)]
        return [moved for shape in shapes for moved in transformed([shape], crs, to)]
    moved, result = iter(moved), []
    for shape in shapes:
        result.append(shape._replace(rings=[next(moved) for _ in shape.rings],
                                     holes=[next(moved) for _ in shape.holes]))
    return result


def read_beside(image, place, layers, folder, doubts):
    """Return the AnnotatedImage of an image that files are called like."""
    found = []
    for layer in layers:
        shapes = [with_label(shape, OBJECT) for shape in layer.shapes]
        if place.transform is None or layer.in_pixels:
            found += in_pixels(shapes, layer, folder, doubts)
            continue
        kept = cut_all(projected(layer._replace(shapes=shapes), place, doubts), place)
        found += kept
        if shapes and not kept:
            folder.problems[f"file {OUTSIDE}"].append(str(layer.path))
        note_lost(len(shapes) - len(kept), doubts)
    return AnnotatedImage(image, str(image), layers[0].path, found)


def in_pixels(shapes, layer, folder, doubts):
    """Return the shapes of a file beside an image without georeference, whose coordinates are pixels.

    QGIS counts the rows of such an image downwards from 0, as negative numbers: they are turned. Shapes that
    all lie within two pixels are degrees, a problem.
    """
    rings = [ring for shape in shapes for ring in shape.rings]
    if not rings or layer.in_pixels:
        return shapes
    points = np.concatenate(rings)
    if (np.ptp(points, axis=0) < 2).all():
        folder.problems["file in degrees beside an image without georeference: save it as a GeoTIFF"].append(
            str(layer.path))
    if points[:, 1].max() > 0 or points[:, 1].min() > -2:
        return shapes
    doubts["rows are negative numbers, as QGIS counts those of images without georeference: turned"] += 1
    return [shape._replace(rings=[ring * (1, -1) for ring in shape.rings],
                           holes=[ring * (1, -1) for ring in shape.holes]) for shape in shapes]


def read_over(layers, places, folder, notes, doubts):
    """Return the [AnnotatedImage] of the images that lie within what the shapes of files cover together."""
    images, found = [], set()
    paths = {shape.where: layer.path for layer in layers for shape in layer.shapes}
    on_map = {image: place for image, place in places.items() if place.transform is not None}
    for alike in grouped(on_map, lambda image: on_map[image].crs and on_map[image].crs.to_wkt()).values():
        shapes = [shape for layer in layers for shape in projected(layer, on_map[alike[0]], doubts)]
        shapes = [shape for shape in shapes if shape.rings and not shape.problem]
        if not shapes:
            continue
        boxes = np.array([[*shape.rings[0].min(0), *shape.rings[0].max(0)] for shape in shapes])  # (N, 4)
        extent = np.concatenate([boxes.min(0)[:2], boxes.max(0)[2:]])
        for image in alike:
            box = box_of(on_map[image])
            if overlaps(extent[None], box).any():
                touching = [shapes[index] for index in np.flatnonzero(overlaps(boxes, box))]
                kept = cut_all(touching, on_map[image])
                found |= {shape.where for shape in kept}
                path = paths[kept[0].where] if kept else layers[0].path
                images.append(AnnotatedImage(image, str(image), path, kept))
    for layer in layers:
        if all(shape.where not in found for shape in layer.shapes):
            folder.problems[f"file without an image of its name, {OUTSIDE}"].append(str(layer.path))
    empty = sum(not image.shapes for image in images)
    if empty:
        notes[f"{count_of(empty, 'image')} without a shape, among those that have some: background"] += 1
    shapes = [shape for layer in layers for shape in layer.shapes]
    note_lost(sum(bool(shape.rings) and shape.where not in found for shape in shapes), doubts)
    if images:
        images[0].shapes.extend(shape for shape in shapes if not shape.rings and not shape.problem)
    strays = [shape for shape in shapes if shape.problem]
    return images + ([AnnotatedImage(None, "", layers[0].path, strays)] if strays else [])


def note_lost(count, doubts):
    """Add a doubt where shapes lie on no image."""
    if count:
        doubts[f"{count_of(count, 'shape')} cover the center of no pixel: outside of the images, or too small"
               ] += 1


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


# --- shapes in pixels -------------------------------------------------------------------------------------
def cut_all(shapes, place):
    """Return Shapes in pixels, cut to the image of a Place, without those that cover the center of no pixel.
    """
    inverse, kept = ~place.transform, []
    for shape in shapes:
        if shape.problem or not shape.rings:
            kept.append(shape)
            continue
        rings, holes = ([apply(inverse, ring) for ring in outlines]
                        for outlines in (shape.rings, shape.holes))
        if len(rings[0]) < 3 or not area_of(rings[0]) > 0:
            kept.append(shape._replace(rings=[np.zeros((1, 2))], holes=[]))  # which encloses nothing
            continue
        left, top = np.maximum(np.floor(rings[0].min(0)), 0).astype(int).tolist()
        right, bottom = np.minimum(np.ceil(rings[0].max(0)), place.size[::-1]).astype(int).tolist()
        bitmap = partial(draw_polygon, [*rings, *holes], (left, top, right, bottom))
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
