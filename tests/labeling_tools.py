"""Folders as labeling tools write them, of scenes whose true mask is known: write(root) -> {image: mask}."""
import base64
import io
import json
import sqlite3
import struct
import zlib

import cv2
import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from PIL import Image
from pycocotools import mask as coco_mask
from rasterio import warp
from rasterio.crs import CRS
from trees import save, scene

COUNT = 6
NAMES = ("background", "car", "tree")  # of the ids in the masks of scene()


def scenes(root, image):
    """Write COUNT photos; image: their path with {split} and {name}. Yield (name, split, path, mask)."""
    for seed in range(COUNT):
        pixels, mask = scene(seed, 3)
        split, name = "val" if seed % 3 == 2 else "train", f"shot {seed}"
        path = root / image.format(split=split, name=name)
        save(path, pixels)
        yield name, split, path, mask


def outlines(mask, id):
    """Return the outer outlines of a class as [(n, 2) float], around the pixels and not through them."""
    big = cv2.resize((mask == id).astype(np.uint8), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    rings, _ = cv2.findContours(big, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(ring[:, 0] + 0.5) / 4 for ring in rings if len(ring) >= 3]


def shapes(mask):
    """Return [(id, outline)] of a mask."""
    return [(id, ring) for id in (1, 2) for ring in outlines(mask, id)]


def dump(path, content):
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco(root, encoding="polygon", image="{split}2017/{name}.jpg",
         file="annotations/instances_{split}2017.json", first_id=1, head=()):
    """COCO as published, or as Roboflow writes it (a head of the list of categories, a file per split)."""
    truth, files = {}, {}
    for number, (_, split, path, mask) in enumerate(scenes(root, image)):
        truth[path] = mask
        content = files.setdefault(split, dict(images=[], annotations=[], categories=[
            *head, *(dict(id=id + first_id - 1, name=NAMES[id], supercategory="things") for id in (2, 1))]))
        height, width = mask.shape
        content["images"].append(dict(id=number, file_name=path.name, height=height, width=width))
        for id in (1, 2):
            if not (mask == id).any():
                continue
            rle = coco_mask.encode(np.asfortranarray(mask == id))
            segmentation = {
                "polygon": [ring.ravel().tolist() for ring in outlines(mask, id)],
                "compressed": dict(size=list(mask.shape), counts=rle["counts"].decode()),
                "plain": dict(size=list(mask.shape), counts=runs(mask == id)),
            }[encoding]
            content["annotations"].append(dict(
                id=len(content["annotations"]), image_id=number, category_id=id + first_id - 1,
                segmentation=segmentation, area=int((mask == id).sum()), iscrowd=int(encoding == "plain")))
    for split, content in files.items():
        dump(root / file.format(split=split), content)
    return truth


def runs(region):
    """Return COCO's plain run lengths of (H, W) bool: column by column, of zeros first."""
    flat = region.T.ravel()
    starts = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *starts, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def labelme(root):
    """labelme: a JSON file beside each image."""
    truth = {}
    for name, _, path, mask in scenes(root, "{name}.jpg"):
        truth[path] = mask
        entries = [dict(label=NAMES[id], points=ring.tolist(), shape_type="polygon", group_id=None)
                   for id, ring in shapes(mask)]
        dump(root / f"{name}.json", dict(shapes=entries, imagePath=path.name, imageData=None,
                                         imageHeight=mask.shape[0], imageWidth=mask.shape[1]))
    return truth


def yolo(root, image="images/{split}/{name}.jpg", names=("car", "tree")):
    """Ultralytics' layout: data.yaml, images/ and labels/ alike."""
    truth = {}
    for _, _, path, mask in scenes(root, image):
        truth[path] = mask
        sides = mask.shape[::-1]
        rows = [f"{id - 1} " + " ".join(f"{share:.6f}" for share in (ring / sides).ravel())
                for id, ring in shapes(mask)]
        label = root / str(path.relative_to(root)).replace("images", "labels")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.with_suffix(".txt").write_text("\n".join(rows))
    if names:
        (root / "data.yaml").write_text(yaml.safe_dump(dict(path=".", train="images/train", val="images/val",
                                                            names=names, nc=2)))
    else:  # as Label Studio and labelImg write it
        (root / "classes.txt").write_text("car\ntree\n")
    return truth


def supervisely(root):
    """Supervisely: dataset/img and dataset/ann, meta.json; cars are polygons, trees bitmaps."""
    truth = {}
    for _, _, path, mask in scenes(root, "{split}/img/{name}.jpg"):
        truth[path] = mask
        objects = [dict(classTitle="car", geometryType="polygon", points=dict(exterior=ring.tolist()))
                   for ring in outlines(mask, 1)]
        if (mask == 2).any():
            rows, columns = np.nonzero(mask == 2)
            left, top = int(columns.min()), int(rows.min())
            objects.append(dict(classTitle="tree", geometryType="bitmap", bitmap=dict(
                origin=[left, top], data=png_text((mask == 2)[top:, left:], True))))
        height, width = mask.shape
        dump(path.parents[1] / f"ann/{path.name}.json",
             dict(tags=[], size=dict(height=height, width=width), objects=objects))
    dump(root / "meta.json", dict(classes=[dict(title=name, color="#FF0000") for name in NAMES[1:]], tags=[]))
    return truth


def png_text(region, compressed):
    """Return (h, w) bool as a transparent PNG in base64, zlib-compressed or not."""
    file = io.BytesIO()
    Image.fromarray(np.where(region[..., None], 255, 0).astype(np.uint8).repeat(4, 2)).save(file, "PNG")
    content = file.getvalue()
    return base64.b64encode(zlib.compress(content) if compressed else content).decode()


def label_studio(root, tasks=True):
    """Label Studio: PNG files of the brush, one per task and label; the names of the images in its JSON."""
    truth, export = {}, []
    image = "images/4f0a-{name}.jpg" if tasks else "images/{name}.jpg"
    for number, (_, _, path, mask) in enumerate(scenes(root, image), 11):
        if not tasks:
            path = path.rename(path.with_stem(str(number)))
        truth[path] = mask
        export.append(dict(id=number, annotations=[], data=dict(image=f"/data/upload/3/{path.name}")))
        for id in (1, 2):
            if (mask == id).any():
                save(root / f"masks/task-{number}-annotation-{number + 4}-by-1-tag-{NAMES[id]}-0.png",
                     (mask == id).astype(np.uint8) * 255)
    if tasks:
        dump(root / "project-1.json", export)
    return truth


def cvat(root):
    """CVAT, "Segmentation mask 1.1": a VOC tree of painted masks, labelmap.txt, default.txt."""
    colors, truth = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8), {}
    for name, _, path, mask in scenes(root, "JPEGImages/{name}.jpg"):
        truth[path] = mask
        save(root / f"SegmentationClass/{name}.png", colors[mask])
        save(root / f"SegmentationObject/{name}.png", colors[mask])
    lines = ["# label:color_rgb:parts:actions", *(f"{name}:{','.join(map(str, color))}::" for name, color in
                                                  zip(NAMES, colors.tolist(), strict=True))]
    (root / "labelmap.txt").write_text("\n".join(lines) + "\n")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("".join(f"shot {number}\n" for number in range(COUNT)))
    return truth


def roboflow_masks(root):
    """Roboflow, "semantic segmentation masks": *_mask.png beside the images, _classes.csv in each part."""
    truth = {}
    for _, split, path, mask in scenes(root, "{split}/{name}_jpg.rf.0a1b.jpg"):
        truth[path] = mask
        save(path.with_name(f"{path.stem}_mask.png"), mask)
        (root / split / "_classes.csv").write_text(
            "Pixel Value, Class\n" + "".join(f"{id}, {name}\n" for id, name in enumerate(NAMES)))
    return truth


def class_masks(root, image, mask):
    """A black and white PNG of each class of an image: {split}, {name} and {label} in their paths."""
    truth = {}
    for name, split, path, ids in scenes(root, image):
        truth[path] = ids
        for id in (1, 2):
            save(root / mask.format(split=split, name=name, label=NAMES[id]), np.uint8(255) * (ids == id))
    return truth


def pairs_of_runs(region, by_columns=True):
    """Return Kaggle's text of the runs of (H, W) bool: first pixel, from 1, and length."""
    flat = np.concatenate([[0], region.ravel("F" if by_columns else "C"), [0]]).astype(np.int8)
    starts, ends = (np.flatnonzero(np.diff(flat) == step) + 1 for step in (1, -1))
    return " ".join(map(str, np.stack([starts, ends - starts], 1).ravel().tolist()))


def kaggle(root, titles="ImageId,EncodedPixels,ClassId", row="{file},{runs},{id}", image="{split}/{name}.jpg",
           by_columns=True):
    """Kaggle's train.csv: a row of run lengths for each class of an image, empty ones too."""
    truth, lines = {}, [titles]
    for name, _, path, mask in scenes(root, image):
        truth[path] = mask
        for id in (2, 1):
            values = dict(file=path.name, name=name, id=id, label=NAMES[id], height=mask.shape[0],
                          width=mask.shape[1], runs=pairs_of_runs(mask == id, by_columns))
            lines.append(row.format(**values))
    (root / "train.csv").write_text("\r\n".join(lines) + "\r\n")
    return truth


METERS, DEGREES = CRS.from_epsg(32633), CRS.from_epsg(4326)


def tiles(root, image="{split}/{name}.tif"):
    """Write COUNT GeoTIFFs of 0.5 m x 0.4 m a pixel, turned by 20 degrees: (split, path, mask, transform).
    """
    for number, (_, split, path, mask) in enumerate(scenes(root, image)):
        pixels = np.array(Image.open(path))
        cos, sin = 0.5 * np.cos(0.35), 0.5 * np.sin(0.35)
        transform = Affine(cos, 0.8 * sin, 400000 + 100 * number, sin, -0.8 * cos, 5800000)
        path.unlink()
        with rasterio.open(path, "w", driver="GTiff", height=mask.shape[0], width=mask.shape[1], count=3,
                           dtype="uint8", crs=METERS, transform=transform) as file:
            file.write(pixels.transpose(2, 0, 1))
        yield split, path, mask, transform


def on_map(ring, transform, crs=DEGREES):
    """Return an outline in pixels as closed positions [[x, y]] of a reference system."""
    a, b, c, d, e, f = transform[:6]
    x, y = warp.transform(METERS, crs, *(ring @ np.array([(a, d), (b, e)]) + (c, f)).T)
    return [*map(list, zip(x, y, strict=True)), [x[0], y[0]]]


def features(polygons, key="class", **properties):
    """Return GeoJSON of [(class, positions)]."""
    return dict(type="FeatureCollection", features=[
        dict(type="Feature", properties={key: label, **properties},
             geometry=dict(type="Polygon", coordinates=[positions])) for label, positions in polygons])


def geojson(root, beside=True):
    """QGIS or geopandas: GeoJSON in degrees, beside each GeoTIFF or one file of all."""
    truth, polygons = {}, []
    for _, path, mask, transform in tiles(root):
        truth[path] = mask
        found = [(NAMES[id], on_map(ring, transform)) for id, ring in shapes(mask)]
        if beside:
            dump(path.with_suffix(".geojson"), features(found, name=None))
        polygons += found
    if not beside:
        dump(root / "labels.geojson", features(polygons, area=7.5))
    return truth


def geopackage(root):
    """QGIS: a GeoPackage of a layer, in the projection of Europe's agencies."""
    shapely = pytest.importorskip("shapely")
    truth, europe = {}, CRS.from_epsg(3035)
    root.mkdir(exist_ok=True)
    base = sqlite3.connect(root / "labels.gpkg")
    base.executescript("""
        PRAGMA application_id = 0x47504B47;
        CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT, srs_id INTEGER PRIMARY KEY, organization TEXT,
            organization_coordsys_id INTEGER, definition TEXT, description TEXT);
        CREATE TABLE gpkg_contents (table_name TEXT PRIMARY KEY, data_type TEXT, identifier TEXT, srs_id INT);
        CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT, geometry_type_name TEXT,
            srs_id INTEGER, z TINYINT, m TINYINT);
        CREATE TABLE "my labels" (fid INTEGER PRIMARY KEY, geom BLOB, kind TEXT, height REAL);
        INSERT INTO gpkg_spatial_ref_sys VALUES ('none', 0, 'NONE', 0, 'undefined', ''),
            ('ETRS89', 3035, 'EPSG', 3035, 'x', '');
        INSERT INTO gpkg_contents VALUES ('my labels', 'features', 'my labels', 3035), ('t', 'tiles', 't', 0);
        INSERT INTO gpkg_geometry_columns VALUES ('my labels', 'geom', 'POLYGON', 3035, 0, 0);""")
    for _, path, mask, transform in tiles(root):
        truth[path] = mask
        for id, ring in shapes(mask):
            polygon = shapely.Polygon(on_map(ring, transform, europe))
            left, bottom, right, top = polygon.bounds
            head = b"GP" + bytes([0, 0b00000011]) + struct.pack("<i4d", 3035, left, right, bottom, top)
            base.execute('INSERT INTO "my labels" VALUES (NULL, ?, ?, 2.5)', (head + polygon.wkb, NAMES[id]))
    base.commit()
    base.close()
    return truth


def qupath(root):
    """QuPath, "Export objects as GeoJSON": in pixels, a file for each image."""
    truth = {}
    for name, split, path, mask in scenes(root, "{split}/{name}.png"):
        truth[path] = mask
        found = [(dict(name=NAMES[id], color=[200, 0, 0]), [*ring.tolist(), ring[0].tolist()])
                 for id, ring in shapes(mask)]
        content = features(found, "classification", objectType="annotation", isLocked=False)
        dump(root / split / f"{name}.geojson", content)
    return truth


TOOLS = {
    "COCO": coco,
    "COCO, compressed run lengths": lambda root: coco(root, "compressed"),
    "COCO, plain run lengths": lambda root: coco(root, "plain", first_id=7),
    "COCO, Roboflow": lambda root: coco(
        root, image="{split}/{name}.jpg", file="{split}/_annotations.coco.json",
        head=[dict(id=0, name="things", supercategory="none")]),
    "labelme": labelme,
    "YOLO, Ultralytics": yolo,
    "YOLO, names by number": lambda root: yolo(root, names={0: "car", 1: "tree"}),
    "YOLO, beside the images": lambda root: yolo(root, "{split}/{name}.jpg"),
    "YOLO, classes.txt": lambda root: yolo(root, names=None),
    "YOLO, Roboflow": lambda root: yolo(root, "{split}/images/{name}.jpg", names=["car", "tree"]),
    "Supervisely": supervisely,
    "Label Studio": label_studio,
    "Label Studio, without its JSON": lambda root: label_studio(root, tasks=False),
    "CVAT": cvat,
    "Roboflow, masks": roboflow_masks,
    "masks/car/": lambda root: class_masks(
        root, "images/{split}/{name}.jpg", "masks/{split}/{label}/{name}.png"),
    "masks/1_car.png": lambda root: class_masks(root, "{split}/{name}.jpg", "{split}/{name}_{label}.png"),
    "masks/1/car.png": lambda root: class_masks(
        root, "images/{split}/{name}.jpg", "masks/{name}/{label}.png"),
    "run lengths, Image_Label": lambda root: kaggle(
        root, "Image_Label,EncodedPixels", "{file}_{label},{runs}"),
    "run lengths, class": lambda root: kaggle(
        root, "id,annotation,width,height,class", "{name},{runs},{width},{height},{label}", by_columns=False),
    "GeoJSON": geojson,
    "GeoJSON over all tiles": lambda root: geojson(root, beside=False),
    "GeoPackage": geopackage,
    "QuPath": qupath,
}
