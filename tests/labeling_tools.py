"""Folders as labeling tools write them, of scenes whose true mask is known: write(root) -> {image: mask}.

    python tests/labeling_tools.py        # prints what becomes of each of them, and of files with faults
"""
import base64
import csv
import io
import json
import re
import shutil
import sqlite3
import struct
import sys
import tempfile
import zlib
from pathlib import Path

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
from trees import call, save, scene

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


def label_studio_masks(root, tasks=True):
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


def cvat_masks(root):
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


def box_of(region):
    """Return (left, top, width, height) of the pixels of (H, W) bool."""
    rows, columns = np.nonzero(region)
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1


def brush(region):
    """Return (H, W) bool, or (H, W, 4), as Label Studio's brush: @thi.ng/rle-pack of its RGBA values, a list
    of bytes.
    """
    flat = np.repeat(region.ravel() * 255, 4) if region.ndim == 2 else region.ravel()
    sizes = (3, 4, 8, 16)
    bits = f"{len(flat):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    ends = np.append(np.flatnonzero(np.diff(flat)) + 1, len(flat))
    start = 0
    for end in ends.tolist():
        while start < end:
            count = min(end - start, 2**16)
            size = next(index for index, size in enumerate(sizes) if count <= 2**size)
            repeats = count > 4  # short runs value by value
            values = f"{flat[start]:08b}" * (1 if repeats else count)
            bits += f"{repeats:b}{size:02b}{count - 1:0{sizes[size]}b}{values}"
            start += count
    bits += "0" * (8 - len(bits) % 8)
    return [int(bits[place:place + 8], 2) for place in range(0, len(bits), 8)]


def label_studio_tasks(root, image, url):
    """Write images and return ({image: mask}, [(task number, URL, regions)]), cars as polygons, trees as
    brush strokes: (type, value) in percent.
    """
    truth, tasks = {}, []
    for number, (name, split, path, mask) in enumerate(scenes(root, image), 11):
        truth[path] = mask
        sides = mask.shape[::-1]
        regions = [("polygonlabels", dict(points=(ring / sides * 100).tolist(), closed=True))
                   for ring in outlines(mask, 1)]
        if (mask == 2).any():
            regions.append(("brushlabels", dict(format="rle", rle=brush(mask == 2))))
        regions = [(kind, {**value, kind: ["car" if kind == "polygonlabels" else "tree"]})
                   for kind, value in regions]
        tasks.append((number, url.format(name=name.replace(" ", "%20"), split=split), regions))
    return truth, tasks


def label_studio(root):
    """Label Studio, JSON of local files: a list of tasks, with questions, drafts and a skipped annotation."""
    truth, tasks = label_studio_tasks(root, "images/{split}/{name}.jpg",
                                      "/data/local-files/?d=shots/{split}/{name}.jpg")
    export = []
    for number, url, regions in tasks:
        results = [dict(id=f"r{index}", type=kind, value=value, origin="manual", to_name="image",
                        from_name="label", image_rotation=0, original_width=112, original_height=84)
                   for index, (kind, value) in enumerate(regions)]
        results.append(dict(id="q", type="choices", value=dict(choices=["day"]), from_name="light",
                            to_name="image", origin="manual"))
        done = dict(id=number + 40, completed_by=1, result=results, was_cancelled=False, ground_truth=False,
                    created_at="2024-05-04T10:11:12.131415Z", draft_created_at=None, lead_time=9.5)
        export.append(dict(id=number, annotations=[done, {**done, "was_cancelled": True, "result": []}],
                           file_upload=None, drafts=[], predictions=[], meta={}, inner_id=number - 10,
                           data=dict(image=url, caption="a car"), project=3, total_annotations=1))
    dump(root / "project-3-at-2024-05-04-10-11-deadbeef.json", export)
    return truth


def label_studio_min(root):
    """Label Studio, JSON-MIN of uploads, of which the user has the files with their own names."""
    truth, tasks = label_studio_tasks(root, "{name}.jpg", "/data/upload/3/4f0a1b2c-{name}.jpg")
    dump(root / "project-3.json", [dict(
        image=url.replace("%20", "_"), id=number, annotator=1, annotation_id=number + 40,
        created_at="2024-05-04T10:11:12.131415Z", updated_at="2024-05-04T10:11:12.131415Z", lead_time=9.5,
        light="day", label=[{**value, "original_width": 112, "original_height": 84}
                            for _, value in regions]) for number, url, regions in tasks])
    return truth


def via(root, export="project"):
    """VGG Image Annotator 2: its project, or its annotations as JSON or CSV; a class is a drop-down."""
    truth, metadata = {}, {}
    for name, _, path, mask in scenes(root, "{name}.jpg"):
        truth[path] = mask
        regions = [dict(shape_attributes=dict(name="polygon", all_points_x=ring[:, 0].tolist(),
                                              all_points_y=ring[:, 1].tolist()),
                        region_attributes=dict(note="", kind=NAMES[id], quality=dict(good=True)))
                   for id, ring in shapes(mask)]
        size = path.stat().st_size
        metadata[f"{name}.jpg{size}"] = dict(filename=path.name, size=size, regions=regions,
                                             file_attributes=dict(caption="a car"))
    if export == "project":
        options = dict.fromkeys(NAMES[1:], "")
        dump(root / "via_project_4May2024_10h11m.json", dict(
            _via_settings=dict(ui={}, core={}, project=dict(name="p")), _via_img_metadata=metadata,
            _via_attributes=dict(region=dict(kind=dict(type="dropdown", options=options)), file={}),
            _via_data_format_version="2.0.10", _via_image_id_list=list(metadata)))
    elif export == "json":
        for entry in metadata.values():
            entry["regions"] = {str(number): region for number, region in enumerate(entry["regions"])}
        dump(root / "via_export_json.json", metadata)
    else:
        heads = ("filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
                 "region_attributes")
        with open(root / "via_export_csv.csv", "w", newline="") as file:
            file.write(heads + "\n")
            csv.writer(file).writerows(
                [entry["filename"], entry["size"], '{"caption":"a car"}', len(entry["regions"]), number,
                 *map(json.dumps, region.values())]
                for entry in metadata.values() for number, region in enumerate(entry["regions"]))
    return truth


def via3(root):
    """VGG Image Annotator 3: its project; a class is one of the options of an attribute."""
    truth, files, views, metadata = {}, {}, {}, {}
    for number, (_, _, path, mask) in enumerate(scenes(root, "{name}.jpg"), 1):
        truth[path] = mask
        files[number] = dict(fid=number, fname=path.name, type=2, loc=1, src="")
        views[number] = dict(fid_list=[number])
        metadata |= {f"{number}_{index}": dict(vid=str(number), flg=0, z=[], xy=[7, *ring.ravel().tolist()],
                                               av={"1": "sunny", "2": str(id - 1)})
                     for index, (id, ring) in enumerate(shapes(mask))}
        metadata[f"{number}_file"] = dict(vid=str(number), flg=0, z=[], xy=[], av={"3": "0"})
    attributes = {"1": dict(aname="light", anchor_id="FILE1_Z0_XY1", type=1, desc="", options={},
                            default_option_id=""),
                  "2": dict(aname="Class", anchor_id="FILE1_Z0_XY1", type=4, desc="", options={
                      "0": "car", "1": "tree"}, default_option_id="0"),
                  "3": dict(aname="ok", anchor_id="FILE1_Z0_XY0", type=2, desc="", options={"0": "yes"},
                            default_option_id="")}
    dump(root / "via_project_4May2024.json", dict(
        project=dict(pid="__VIA_PROJECT_ID__", pname="p", data_format_version="3.1.1", vid_list=list(views)),
        config=dict(file=dict(loc_prefix={}), ui=dict(spatial_region_label_attribute_id="")),
        attribute=attributes, file=files, view=views, metadata=metadata))
    return truth


def superannotate(root, pixel=False, file="{name}.jpg___objects.json"):
    """SuperAnnotate: a JSON file for each image, of polygons or of the colors of objects in a picture."""
    truth = {}
    for number, (name, _, path, mask) in enumerate(scenes(root, "{split}/{name}.jpg")):
        truth[path] = mask
        common = dict(probability=100, locked=False, visible=True, groupId=0, attributes=[], trackingId=None,
                      creationType="Manual", createdAt="2024-05-04T10:11:12.131Z", error=None)
        metadata = dict(name=path.name, height=mask.shape[0], width=mask.shape[1], status="Completed",
                        pinned=False, isPredicted=None, projectId=None, annotatorEmail=None)
        if pixel:
            instances, picture = [], np.zeros((*mask.shape, 3), np.uint8)
            for color, (id, ring) in enumerate(shapes(mask), 3):
                picture[(mask == id) & filled(ring, mask.shape)] = (0, color, 15 * color)
                instances.append(dict(common, classId=880 + id, className=NAMES[id],
                                      parts=[dict(color=f"#00{color:02X}{15 * color:02X}")]))
            save(path.with_name(f"{path.name}___save.png"), picture)
            target = f"{path.name}___pixel.json"
        else:
            class_name = dict(className="car") if number % 2 else {}
            instances = [dict(common, type="polygon", classId=880 + id, points=ring.ravel().tolist(),
                              exclude=[], pointLabels={}, **(class_name if id == 1 else {}))
                         for id, ring in shapes(mask)]
            target = file.format(name=name)
        instances.append(dict(common, type="tag", classId=885, className="sunny"))
        dump(path.with_name(target), dict(metadata=metadata, instances=instances, tags=["day"], comments=[]))
    dump(root / "classes/classes.json", [
        dict(id=880 + id, name=NAMES[id], color="#0fb1d3", count=4, project_id=7, attribute_groups=[])
        for id in (2, 1)])
    return truth


def filled(ring, size):
    """Return (H, W) bool of an outline, with what lies on it."""
    grid = np.zeros(size, np.uint8)
    return cv2.fillPoly(grid, [np.round(ring).astype(np.int32)], 1) > 0


def isat(root):
    """ISAT: a JSON file beside each image, and isat.yaml; a hole is an object of __background__ above."""
    truth = {}
    for name, _, path, mask in scenes(root, "{name}.jpg"):
        truth[path] = mask
        entries = [(1, NAMES[id], ring) for id, ring in shapes(mask)]
        entries.insert(0, (3.0, "__background__", np.array([(4, 4), (12, 4), (12, 9), (4, 9)])))
        entries.insert(1, (2.0, "car", np.array([(2, 2), (14, 2), (14, 12), (2, 12)])))
        mask[2:12, 2:14], mask[4:9, 4:12] = 1, 0
        objects = [dict(category=category, group=number, segmentation=ring.tolist(), area=9.0, layer=layer,
                        bbox=[0, 0, 1, 1], iscrowd=False, note="", shape_type="polygon")
                   for number, (layer, category, ring) in enumerate(entries, 1)]
        info = dict(description="ISAT", folder="/home/a/shots", name=path.name, width=mask.shape[1],
                    height=mask.shape[0], depth=3, note="")
        dump(root / f"{name}.json", dict(info=info, objects=objects))
    names = ["__background__", "tree", "car"]
    (root / "isat.yaml").write_text(yaml.safe_dump(dict(
        label=[dict(name=name, color="#e24736") for name in names], contour_mode="external", language="en")))
    return truth


def datumaro(root, encoding="polygon"):
    """Datumaro: annotations/SUBSET.json and images/SUBSET; trees are masks, which lie below the cars."""
    truth, files = {}, {}
    for name, split, path, mask in scenes(root, "images/{split}/{name}.jpg"):
        truth[path] = mask
        labels = [dict(name=name, parent="", attributes=["occluded"]) for name in ("tree", "car")]
        content = files.setdefault(split, dict(
            dm_format_version="1.0", media_type=2, infos={}, items=[],
            categories=dict(label=dict(label_groups=[], labels=labels, attributes=["occluded"]),
                            mask=dict(colormap=[dict(label_id=0, r=51, g=221, b=255)]))))
        annotations = [dict(id=0, type="label", attributes={}, group=0, label_id=0)]
        for id in (1, 2):
            common = dict(id=id, attributes=dict(occluded=False), group=0, label_id=2 - id, z_order=2 - id)
            if id == 1 and encoding == "polygon":
                annotations += [dict(common, type="polygon", points=ring.ravel().tolist())
                                for ring in outlines(mask, id)]
            elif (mask == id).any():
                rle = coco_mask.encode(np.asfortranarray(mask == id))
                annotations.append(dict(common, type="mask", rle=dict(
                    counts=rle["counts"].decode(), size=list(mask.shape))))
        content["items"].append(dict(id=f"shots/{name}", annotations=annotations, attr=dict(frame=3),
                                     media=dict(path=""),
                                     image=dict(path=f"shots/{name}.jpg", size=list(mask.shape))))
    for split, content in files.items():
        dump(root / f"annotations/{split}.json", content)
    return truth


CVAT_XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><project><id>3</id><name>p</name><labels>
    <label><name>car</name><color>#fa3253</color><type>any</type><attributes></attributes></label>
    <label><name>tree</name><color>#33ddff</color><type>any</type><attributes></attributes></label>
    <label><name>1</name><type>points</type><parent>body</parent></label>
  </labels></project><dumped>2024-05-04 10:11:12.131415+00:00</dumped></meta>
{images}
</annotations>
"""
CVAT_COMMON = 'source="manual" occluded="0" z_order="0"'


def cvat_images(root, only_masks=False):
    """CVAT, "CVAT for images 1.1" of a project: cars are polygons or masks, trees masks."""
    truth, images = {}, []
    for number, (name, split, path, mask) in enumerate(scenes(root, "images/{split}/{name}.jpg")):
        truth[path] = mask
        height, width = mask.shape
        shapes = ['<tag label="car" source="manual"><attribute name="ok">true</attribute></tag>']
        for id in (1, 2):
            region = mask == id
            if id == 1 and not only_masks:
                rings = [";".join(f"{x:.2f},{y:.2f}" for x, y in ring) for ring in outlines(mask, 1)]
                shapes += [f'<polygon label="car" {CVAT_COMMON} group_id="4" points="{ring}">'
                           '<attribute name="ok">true</attribute></polygon>' for ring in rings]
            elif region.any():
                left, top, wide, tall = box_of(region)
                rle = runs(region[top:top + tall, left:left + wide].T)
                shapes.append(f'<mask label="{NAMES[id]}" {CVAT_COMMON} rle="{str(rle)[1:-1]}" left="{left}" '
                              f'top="{top}" width="{wide}" height="{tall}"></mask>')
        subset = {"train": "Train", "val": "Validation"}[split]
        images.append(f'<image id="{number}" name="{name}.jpg" subset="{subset}" task_id="1" width="{width}" '
                      f'height="{height}">{"".join(shapes)}</image>')
    (root / "annotations.xml").write_text(CVAT_XML.format(images="\n".join(images)))
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
    "Label Studio, masks": label_studio_masks,
    "Label Studio, masks without JSON": lambda root: label_studio_masks(root, tasks=False),
    "Label Studio": label_studio,
    "Label Studio, JSON-MIN": label_studio_min,
    "CVAT, painted masks": cvat_masks,
    "CVAT for images": cvat_images,
    "CVAT for images, masks": lambda root: cvat_images(root, only_masks=True),
    "VIA 2, project": via,
    "VIA 2, JSON": lambda root: via(root, "json"),
    "VIA 2, CSV": lambda root: via(root, "csv"),
    "VIA 3": via3,
    "SuperAnnotate": superannotate,
    "SuperAnnotate, newer": lambda root: superannotate(root, file="{name}.jpg.json"),
    "SuperAnnotate, pixel masks": lambda root: superannotate(root, pixel=True),
    "ISAT": isat,
    "Datumaro": datumaro,
    "Datumaro, masks": lambda root: datumaro(root, "mask"),
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


# --- files with faults ------------------------------------------------------------------------------------
def with_fault(write, pattern, change):
    """Return a writer that then changes the files below its folder that fit a pattern: change(content) of
    JSON files, change(text) -> text of others.
    """
    def write_faulty(root):
        truth = write(root)
        for path in sorted(root.rglob(pattern)):
            content = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
            changed = change(content)
            path.write_text(changed if isinstance(content, str) else json.dumps(content))
        return truth

    return write_faulty


def scale_rings(factor, every=1):
    """Return change(content) that multiplies the points of every n-th polygon of COCO by a factor."""
    def change(content):
        for entry in content["annotations"][::every]:
            entry["segmentation"] = [(np.array(ring) * factor).tolist() for ring in entry["segmentation"]]

    return change


def in_pixels(text):
    """Return the text of a YOLO file with coordinates times 100."""
    rows = [line.split() for line in text.splitlines()]
    return "\n".join(" ".join([row[0], *(str(float(cell) * 100) for cell in row[1:])]) for row in rows)


def first_shape(**values):
    """Return change(content) that changes the first shape of a file of COCO or labelme."""
    return lambda content: content.get("annotations", content.get("shapes"))[0].update(values)


def resize(content):
    """Double the size and the points of a labelme file, as if it was made on a larger copy."""
    content.update(imageHeight=2 * content["imageHeight"], imageWidth=2 * content["imageWidth"])
    for entry in content["shapes"]:
        entry["points"] = (np.array(entry["points"]) * 2).tolist()


FAULTS = {
    "COCO, all polygons of a copy 2.5 times as large": with_fault(coco, "*.json", scale_rings(2.5)),
    "COCO, a third of the polygons 1.3 times as large": with_fault(coco, "*.json", scale_rings(1.3, 3)),
    "COCO, points in shares of the sides": with_fault(coco, "*.json", scale_rings(0.01)),
    "COCO, a ring of one point among others": with_fault(
        coco, "*train*.json", lambda content: content["annotations"][0]["segmentation"].append([3, 3])),
    "COCO, a polygon of two points": with_fault(
        coco, "*train*.json", first_shape(segmentation=[[1, 1, 9, 9]])),
    "COCO, a box without an outline": with_fault(coco, "*train*.json", first_shape(segmentation=[])),
    "COCO, an image that is not there": with_fault(
        coco, "*train*.json", lambda content: content["images"][0].update(file_name="gone.jpg")),
    "COCO, no `categories`": with_fault(coco, "*.json", lambda content: content.pop("categories")),
    "labelme, of a copy twice as large": with_fault(labelme, "*.json", resize),
    "labelme, an unknown kind": with_fault(labelme, "shot 0.json", first_shape(shape_type="cuboid")),
    "labelme, a line": with_fault(labelme, "shot 0.json", first_shape(shape_type="line")),
    "labelme, a broken file": with_fault(labelme, "shot 0.json", lambda content: content.pop("shapes")),
    "YOLO, in pixels": with_fault(yolo, "labels/**/*.txt", in_pixels),
    "YOLO, a class that is not listed": with_fault(
        yolo, "shot 0.txt", lambda text: text.replace("0 ", "7 ", 1)),
}


# --- what becomes of them ---------------------------------------------------------------------------------
def agreement(root, truth):
    """Return (lowest IoU of a class over the masks of a folder, number of images, notes)."""
    from config import DataOptions
    from dataio.folder import folder
    from dataio.readers import read_sample
    source = folder(root, DataOptions(val_fraction=0, skip_bad_labels=True))
    names = [name for name, _ in source.classes]
    both, either = np.zeros(3), np.zeros(3)
    samples = [sample for samples in source.splits.values() for sample in samples]
    for sample in samples:
        ids = np.array([0, *(NAMES.index(name) if name in NAMES else int(name[-1]) for name in names[1:])])
        mask = ids[read_sample(sample, source.table)[1]["mask"].numpy()]
        for id in range(3):
            both[id] += ((mask == id) & (truth[sample.image] == id)).sum()
            either[id] += ((mask == id) | (truth[sample.image] == id)).sum()
    return (both / either.clip(1)).min(), len(samples)


def main():
    """Print the tables of all tools and faults as Markdown."""
    from config import InputError
    for title, writers in (("what the folder holds", TOOLS), ("fault", FAULTS)):
        print(f"\n| {title} | what `check_data.py` says | images, lowest IoU of their masks |\n|---|---|---|")
        for name, write in writers.items():
            place = Path(tempfile.mkdtemp())
            truth = write(place / "data")
            text = call(place, "check_data", "--data-root", place / "data")
            lines = [line.replace("|", "/").removesuffix(" Train with:") for line in text.splitlines()
                     if re.match("verdict|error|warning|problem", line)]
            try:
                iou, count = agreement(place / "data", truth)
                result = f"{count} of {len(truth)}, {iou:.3f}"
            except InputError:
                result = "(refused)"
            print(f"| {name} | {'; '.join(lines)} | {result} |", flush=True)
            shutil.rmtree(place)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
