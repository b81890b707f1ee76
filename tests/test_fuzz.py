"""Hostile files: whatever the bytes, the answer is a result or one line that names the file.

    python -m pytest tests/test_fuzz.py                      # a few examples each, always the same
    FUZZ=500 python -m pytest tests/test_fuzz.py -s          # 500 of each kind, other ones every time
"""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, load, tiny, write_folder, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import check_data
import infer_image
from config import InputError
from dataio.annotations import find_masks
from dataio.labels import read_classes
from checkpoint import load_model, pack_checkpoint
from dataio.pairs import read_list
from dataio.readers import index_table, read_image, read_mask, read_pair
from dataio.stratify import count_pixels
from dataio.windows import WindowReader
from inference.video import VideoReader
from models.weights import read_weights
from labeling_tools import TOOLS

EXAMPLES = int(os.environ.get("FUZZ", 0))
fuzz = settings(
    max_examples=EXAMPLES or 15,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CLASSES = [("background", (0, 0, 0)), ("a", (255, 0, 0)), ("b", (0, 255, 0))]
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz")  # until the program ends
WORKDIR = Path(FOLDER.name)


def one_line(error, path):
    """Assert that an InputError is one line that names the file."""
    assert "\n" not in str(error) and Path(path).name in str(error)


def damage(data):
    """Return a strategy: the bytes with a few of them changed, cut off, doubled or replaced by others."""
    places = st.integers(0, max(0, len(data) - 1))

    def flip(changes):
        changed = bytearray(data)
        for place, value in changes:
            changed[place] ^= value
        return bytes(changed)

    return st.one_of(
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=8).map(flip),
        places.map(lambda end: data[:end]),
        st.tuples(places, places).map(lambda cut: data[: min(cut)] + data[max(cut) :]),
        st.tuples(places, st.binary(max_size=64)).map(lambda new: data[: new[0]] + new[1] + data[new[0] :]),
        st.binary(max_size=200),
    )


def encoded(kind):
    """Return (bytes, ending) of a small image of a kind."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    image, options, ending = Image.fromarray(noise), {}, kind.split()[0]
    if kind == "png palette":
        image = image.quantize(8)
        options = dict(transparency=3)
    elif kind == "png 16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif kind == "jpg cmyk":
        image = image.convert("CMYK")
    elif kind == "jpg exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = dict(exif=exif)
    elif kind == "tif nan":
        values = noise[..., 0].astype(np.float32)
        values[::3] = np.nan
        values[1::7] = np.inf
        image = Image.fromarray(values)
    elif kind == "png gif":  # an animation under a wrong ending
        options = dict(format="GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    elif kind == "png 1x1":
        image = image.crop((0, 0, 1, 1))
    elif kind == "png animated":
        options = dict(save_all=True, append_images=[image.rotate(180)])
    file = io.BytesIO()
    options.setdefault("format", {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
    image.save(file, **options)
    return file.getvalue(), "." + ending


KINDS = ["jpg", "png", "png palette", "png 16", "jpg cmyk", "jpg exif", "tif nan", "tif", "png gif"]
KINDS += ["png 1x1", "png animated", "webp", "bmp"]


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_images(kind, data):
    whole, ending = encoded(kind)
    path = WORKDIR / f"imagé {kind}{ending}"
    path.write_bytes(whole)
    before = read_image(path)
    assert before.dtype == torch.uint8 and before.shape[0] == 3
    path.write_bytes(data.draw(damage(whole)))
    for reader in (read_image, lambda path: read_image(path, at_least=(3, 3))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = reader(path)
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel()
        except InputError as error:
            one_line(error, path)


@pytest.mark.parametrize("kind", ["png", "png palette", "png 16", "png 1x1", "tif nan"])
@fuzz
@given(data=st.data())
def test_masks(kind, data):
    whole, ending = encoded(kind)
    path = WORKDIR / f"mask {kind}{ending}"
    path.write_bytes(data.draw(damage(whole)))
    for table in (index_table(256), index_table(3)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mask = read_mask(path, table)
            assert mask.dtype == np.uint8 and mask.ndim == 2
        except InputError as error:
            one_line(error, path)


@fuzz
@given(
    entries=st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=9)),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_lists(entries, end, mark):
    path = WORKDIR / "list.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(entries).encode())
    wanted = []
    for entry in entries:
        if entry.strip() and entry.strip().lstrip("\ufeff") not in wanted:
            wanted.append(entry.strip())
    try:
        assert [entry.lstrip("\ufeff") for entry in read_list(path)] == [
            entry.lstrip("\ufeff") for entry in dict.fromkeys(wanted)
        ]
    except InputError as error:
        one_line(error, path)
        assert not wanted or wanted == ["\ufeff"]


@fuzz
@given(
    text=st.one_of(
        st.binary(max_size=80),
        st.lists(
            st.from_regex(r"[a-c ]{0,3}(=| )?( ?-?[0-9]{1,3}){0,4}#?", fullmatch=True), max_size=6
        ).map(lambda lines: "\r\n".join(lines).encode()),
    )
)
def test_classes_files(text):
    root = WORKDIR / "folder"
    if not root.exists():
        write_folder(root, count=3)
    path = root / "classes.txt"
    path.write_bytes(text)
    try:
        read_classes(path)
        source = load("folder", root)
        for sample in source.splits["train"]:
            read_pair(sample, source.table)
    except InputError as error:
        assert "\n" not in str(error)


@fuzz
@given(data=st.data())
def test_damaged_checkpoints_are_refused_or_whole(data):
    path, packed = WORKDIR / "model.pth", pack_checkpoint(small_model(), CLASSES, (28, 28))
    file = io.BytesIO()
    torch.save(packed, file)
    path.write_bytes(data.draw(damage(file.getvalue())))
    try:
        model, checkpoint = load_model(path)
        assert checkpoint["classes"] == packed["classes"]
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in packed["model"].items())
    except InputError as error:
        one_line(error, path)


@fuzz
@given(
    key=st.sampled_from(["format", "version", "spec", "classes", "imgsz", "model", "arch", "head", "layers"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_checkpoints_of_wrong_content_are_refused(key, value):
    path, packed = WORKDIR / "content.pth", pack_checkpoint(small_model(), CLASSES, (28, 28))
    if key in packed:
        packed[key] = value
    else:
        packed["spec"] = {**packed["spec"], key: value}
    torch.save(packed, path)
    try:
        load_model(path)
    except InputError as error:
        assert "\n" not in str(error)


def small_model():
    """Return a Segmenter of few parameters."""
    return tiny(backbone="timm/test_vit.r160_in1k")


@fuzz
@given(data=st.data(), frames=st.integers(1, 4), odd=st.booleans())
def test_videos(data, frames, odd):
    path, size = WORKDIR / "clip.avi", (33 if odd else 32, 48)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, size[::-1])
    noise = np.random.default_rng(frames)
    for _ in range(frames):
        writer.write(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
    writer.release()
    path.write_bytes(data.draw(damage(path.read_bytes())))
    try:
        reader = VideoReader(path)
        for number, frame in enumerate(reader):
            assert frame.dtype == np.uint8 and frame.ndim == 3
            if number > 50:
                break
    except InputError as error:
        one_line(error, path)


@fuzz
@given(garbage=st.binary(max_size=300))
def test_kept_counts_that_are_garbage_are_counted_anew(garbage):
    root = WORKDIR / "counted"
    if not root.exists():
        write_folder(root, count=3)
    source = load("folder", root)
    wanted = count_pixels(source.splits["train"], source.table, 3, WORKDIR / "counts")
    kept = next((WORKDIR / "counts").glob("pixels-*.npy"))
    for head in (b"", b"PK\x03\x04", kept.read_bytes()[:20]):
        kept.write_bytes(head + garbage)
        again = count_pixels(source.splits["train"], source.table, 3, WORKDIR / "counts")
        assert np.array_equal(wanted, again)


@fuzz
@given(garbage=st.binary(max_size=300))
def test_kept_windows_that_are_garbage_are_made_anew(garbage):
    root = WORKDIR / "windows"
    if not root.exists():
        write_folder(root, count=1, size=(20, 30))
    source = load("folder", root, val_fraction=0)
    reader = WindowReader(source.splits["train"], source.table, root / "kept")
    (root / "kept").mkdir(exist_ok=True)
    image, points = reader.read(0, 0, 0, 20, 30)[0], reader.points(3, root / "kept")
    for kept in list((root / "kept").glob("*.npy")):
        whole = kept.read_bytes()
        for head in (b"", b"PK\x03\x04", whole[:20], whole[:80]):
            kept.write_bytes(head + garbage)
            again = WindowReader(source.splits["train"], source.table, root / "kept")
            assert (again.read(0, 0, 0, 20, 30)[0] == image).all()
            assert np.array_equal(again.points(3, root / "kept"), points)
        kept.write_bytes(whole)
    assert len(points)


# --- files that are known to do harm ----------------------------------------------------------------------
def png_header(width, height):
    """Return a PNG that says it is this large and holds next to nothing."""
    def chunk(kind, body):
        import zlib

        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c") + chunk(b"IEND", b"")


PEAK = """
import resource, sys
from pathlib import Path
from config import InputError
from dataio.readers import index_table, read_image, read_mask
from models.weights import read_weights
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before = peak()
image, weights = map(Path, sys.argv[1:])
for read, path in ((read_image, image), (lambda path: read_mask(path, index_table(3)), image),
                   (read_weights, weights)):
    try:
        read(path)
    except InputError:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_bombs_need_no_memory(tmp_path):
    image = tmp_path / "bomb.png"
    for side in (14_000, 60_000):  # below the largest that is read, and above
        image.write_bytes(png_header(side, side))
        for reader in (read_image, lambda path: read_mask(path, index_table(3))):
            with pytest.raises(InputError, match=r"bomb\.png claims more pixels"):
                reader(image)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a/data.pkl", "w") as file:
            for _ in range(400):
                file.write(bytes(1 << 20))
    with pytest.raises(InputError, match="unpacks to more than it holds"):
        read_weights(tmp_path / "bomb.pth")
    # in a process of its own, since no peak of this one can be taken back
    command = [sys.executable, "-c", PEAK, image, tmp_path / "bomb.pth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200


def test_a_folder_of_hostile_files_is_worked_through(tmp_path, run):
    good = {"täst bild.png": (40, 30), "long.png": (20_000, 10), "dot.png": (1, 1), "имя 1.jpg": (33, 47)}
    source = tmp_path / "in put"
    source.mkdir()
    for name, size in good.items():
        Image.new("RGB", size, "red").save(source / name)
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to(source / "nowhere.png")
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.png").write_text("no image")
    (source / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (source / "cut.jpg").write_bytes(encoded("jpg")[0][:300])
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 28)), tmp_path / "model.pth")
    flags = ["--input", source, "--model", tmp_path / "model.pth", "--out-dir", tmp_path / "out"]
    code, out, err = run(infer_image, *flags, "--device", "cpu")
    results = tmp_path / "out/inference_results_image"
    assert code == 1 and "4 of 8 images segmented" in out and err.count("skipped") == 4
    assert "Traceback" not in err
    for name, size in good.items():
        assert Image.open(results / f"{Path(name).stem}_mask.png").size == size


def test_check_data_lists_every_hostile_file(tmp_path, run):
    root = write_folder(tmp_path / "data", count=4)
    (root / "images/00.png").write_bytes(b"")
    (root / "masks/01.png").write_bytes(encoded("png")[0][:100])
    (root / "images/02.png").write_bytes(png_header(60_000, 60_000))
    write_pair(root / "images/99 ü.png", root / "masks/99 ü.png", np.zeros((5, 7), np.uint8))
    (root / "images/loop").symlink_to(root)
    code, out, err = run(check_data, "--data-root", root, "--out-dir", tmp_path / "out")
    assert code == 1 and "Traceback" not in out + err
    assert all(name in out + err for name in ("00.png", "01.png", "02.png"))


# --- annotation files -------------------------------------------------------------------------------------
HOSTILE = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.text(max_size=5),
                    st.sampled_from([10 ** 4, 10 ** 5, 10 ** 12, 10 ** 400]),
                    st.sampled_from([float("nan"), float("inf"), -1e308, 0.5]),
                    st.sampled_from([[], {}, [[]], [[1]], [None], {"size": [1, 1]}, "../x", "a" * 300, "\0"]))
TREES = {"COCO": "*.json", "COCO, compressed": "*.json", "labelme": "*.json", "Supervisely": "*.json",
         "YOLO": "labels/**/*.txt", "Label Studio": "*.json"}


def places(content, path=()):
    """Return the paths of all values in a JSON content."""
    items = content.items() if isinstance(content, dict) else enumerate(content) \
        if isinstance(content, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def changed(content, path, value):
    """Return a JSON content with the value at a path replaced, or left out where it is Ellipsis."""
    if not path:
        return None if value is ... else value
    copy = content.copy()
    if value is ... and len(path) == 1:
        copy.pop(path[0])
    else:
        copy[path[0]] = changed(content[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("tool", TREES)
def test_annotation_files(tool, tmp_path, monkeypatch):
    """Any value replaced or left out, any word of a line: masks, or one line that names a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    TOOLS[next(name for name in TOOLS if name.startswith(tool))](root)
    files = sorted(root.rglob(TREES[tool]))
    texts = {file: file.read_text() for file in files}

    @fuzz
    @given(data=st.data())
    def hostile(data):
        file = data.draw(st.sampled_from(files))
        if file.suffix == ".json":
            content = json.loads(texts[file])
            place = data.draw(st.sampled_from(places(content)))
            text = json.dumps(changed(content, place, data.draw(HOSTILE | st.just(...))))
        else:
            words = texts[file].split(" ")
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(
                st.sampled_from(["nan", "-1", "1e400", "x", "", "\n", "9" * 400, "inf", "0.5 0.5"]))
            text = " ".join(words)
        file.write_text(text)
        try:
            found = find_masks(root)
            for samples in found.splits.values():
                for sample in samples:
                    assert np.array(Image.open(sample.mask)).max() <= len(found.entries)
        except InputError as error:
            one_line(error, root)
        finally:
            file.write_text(texts[file])

    hostile()
