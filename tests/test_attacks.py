"""Hostile input: attacks on scripts (tests/attacks.py has all), forms of files, and readers fed with damage.

    python -m pytest tests/test_attacks.py                   # a few examples each, always the same
    FUZZ=500 python -m pytest tests/test_attacks.py -k fuzz  # 500 of each kind, other ones every time

Whatever the bytes, the answer of a reader is a result or one line that names the file.
"""

import dataclasses
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, load, tiny, write_folder, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labeling_tools import TOOLS
from PIL import Image

import check_data
import infer_image
import train
import visualize
from checkpoint import load_model, pack_checkpoint
from config import (FIELDS, RECIPES, InputError, TrainConfig, names, one_line, recipe_settings, script_parser,
                    setting)
from dataio import schema
from dataio.annotations import find_masks
from dataio.labels import read_classes
from dataio.layout import read_list
from dataio.readers import index_table, read_image, read_mask, read_sample, read_upright
from dataio.stratify import count_pixels
from dataio.windows import WindowReader
from inference.backends import import_openvino
from inference.predictor import Protocol, make_protocol
from inference.video import VideoReader

CLASSES = [("background", (0, 0, 0)), ("a", (255, 0, 0)), ("b", (0, 255, 0))]
EXAMPLES = int(os.environ.get("FUZZ", 0))
fuzz = settings(max_examples=EXAMPLES or 15, derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz")  # until the program ends
WORKDIR = Path(FOLDER.name)


# --- attacks on scripts, in processes of their own --------------------------------------------------------
QUICK = ("flags checkpoints resumed_runs tensors backbones pickles json_files damaged_data damaged_models "
         "wrong_formats no_files class_names file_names streams limits surroundings")


@pytest.mark.skipif(sys.platform != "linux", reason="attacks use what Linux has: /dev/full, fork")
@pytest.mark.parametrize("more", [
    pytest.param(["--each", 1, "--seed", 5, "--family", *QUICK.split()], id="quick"),
    pytest.param(["--each", 10, "--seed", 6], id="all", marks=pytest.mark.long),
    pytest.param(["--kills", 2], id="kills", marks=pytest.mark.long)])
def test_attacks_and_kills_are_survived(more):
    command = [sys.executable, "tests/attacks.py", *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- the forms of files -----------------------------------------------------------------------------------
def test_what_is_written_is_as_its_form_says():
    """A form that refuses what this version writes would lose work."""
    packed = pack_checkpoint(tiny(), CLASSES, (28, 28), config=dataclasses.asdict(TrainConfig()), epoch=3)
    packed["metrics"] = dict(miou=math.nan, loss=math.inf, dice=0.5, later=[1, 2])
    packed["later"] = object()
    assert schema.check(schema.Checkpoint, packed, "m.pth") is packed
    schema.check(schema.StoredSpec, packed, "m.pth")
    for kind, tta in (("whole", ""), ("slide", "ms,flip"), ("tile", "flip")):
        schema.check(schema.Protocol, make_protocol(kind, tta, (56, 70))._asdict(), "m.pth")
    assert set(schema.Protocol.model_fields) == set(Protocol._fields)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settings_of_every_recipe_are_as_their_form_says(recipe):
    known = dataclasses.asdict(TrainConfig(**recipe_settings(dict(recipe=recipe)), recipe=recipe))
    for settings_of_run in (known, json.loads(json.dumps(known))):
        schema.check(schema.Settings, settings_of_run, "m.pth")


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_takes_its_choices_and_refuses_other_types(name):
    field = FIELDS[name]
    many = field.type is tuple
    for choice in names(field.metadata["kind"]) if "kind" in field.metadata else ():
        schema.check(schema.Settings, {name: [choice] if many else choice}, "m.pth")
    for junk in (None, {}, [[]], math.nan, b"x", torch.zeros(1), np.float64(1), "a\nb", object):
        with pytest.raises(InputError, match=rf"^m\.pth .*config\.{name}\b"):
            schema.check(schema.UserNames, dict(config={name: junk}, classes=CLASSES), "m.pth")


@pytest.mark.parametrize("default", [(0.1, 0.2), (1, 2)], ids=str)
def test_a_new_setting_of_several_values_can_be_kept(default):
    field = setting(default, "model", "", affects="run", nargs="+", type=float)
    field.name, field.type = "rates", tuple
    assert schema.check_setting(field, list(default)) == list(default)
    with pytest.raises(ValueError):
        schema.check_setting(field, [None])


ROW = dict(epoch=1, seconds=0.5, val_miou=0.5)


@pytest.mark.parametrize(("form", "value", "entry"), [
    (schema.Protocol, dict(window=[5, 0]), "window.1"), (schema.Protocol, dict(window=[5]), "window.1"),
    (schema.Protocol, dict(window=5), "window"), (schema.Protocol, dict(window=[5, True]), "window.1"),
    (schema.Protocol, dict(window=[5, 2.0]), "window.1"), (schema.Protocol, {}, "window"),
    (schema.Protocol, dict(window=(5, 7), later=object()), None), (schema.Protocol, [], ""),
    (schema.Protocol, dict(window=[5, 7], stride=[]), None),
    (schema.Protocol, dict(window=[5, 7], stride=[1]), "stride"),
    (schema.Protocol, dict(window=[5, 7], scales=[0.0]), "scales.0"),
    (schema.Protocol, dict(window=[5, 7], tile=math.inf), "tile"),
    (list[schema.LoggedRow], [ROW], None), (list[schema.LoggedRow], [ROW, None], "1"),
    (list[schema.LoggedRow], [dict(ROW, seconds=math.inf)], "0.seconds"),
    (list[schema.LoggedRow], [dict(ROW, seconds=10**5000)], "0.seconds"),
    (list[schema.LoggedRow], [dict(ROW, val_miou=math.nan)], None),
    (list[schema.LoggedRow], [dict(ROW, val_miou=None)], None),
    (schema.Classes, [["a", [1, 2, 256]]], "0.1.2"), (schema.Classes, [], ""),
    (schema.Classes, [["a", 5]], "0.1"), (schema.Classes, [["caf\udce9", [1, 2, 3]]], None),
    (schema.Classes, [["a", [0, 0, 0]]] * 254, None), (schema.Classes, [["a", [0, 0, 0]]] * 255, ""),
    (schema.Classes, [["a\nb", [0, 0, 0]]], "0.0"), (schema.Classes, [["a" * 10**6, [0, 0, 0]]], "0.0"),
    (schema.Progress, dict(batches=1, images=1, sums={"x": math.inf}, counts=torch.zeros(1)), None),
    (schema.Progress, dict(batches=1, images=1, sums={"x": "y"}, counts=torch.zeros(1)), "sums.x"),
    (schema.Progress, dict(batches=1, images=1, sums={5: 1}, counts=torch.zeros(1)), "sums.5"),
    (schema.Progress, dict(batches=1, images=1, sums={}, counts=[1]), "counts"),
], ids=lambda value: "")
def test_the_entry_that_is_wrong_is_named(form, value, entry):
    if entry is None:
        assert schema.check(form, value, "m.pth") is value
        return
    with pytest.raises(InputError, match=r"^m\.pth ") as error:
        schema.check(form, value, "m.pth")
    text = str(error.value)
    assert f" {entry}" in text and "\n" not in text and len(text) < 500


def test_errors_are_one_line_whatever_they_hold():
    assert one_line("a\nb\x1b[31m\udce9é名") == r"a\nb\x1b[31m\udce9é名"
    assert len(one_line("x" * 10**6)) < 1300


def test_what_a_checkpoint_could_not_hold_is_refused_before_training(tmp_path, run):
    flags = ["--recipe", "demo", "--train-images", "4", "--epochs", "1", "--out-dir", str(tmp_path / "a\nb")]
    code, _, err = run(train, *flags)
    assert code == 2 and err.count("\n") == 1 and "out_dir" in err and not list(tmp_path.rglob("*.pth"))


@pytest.mark.plots
@pytest.mark.parametrize("function", ["plot_run", "side_by_side"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, run, monkeypatch, function):
    def broken(*args):
        raise ValueError("no such font\nanywhere")

    monkeypatch.setattr(visualize, function, broken)
    data = write_folder(tmp_path / "data", count=4)
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--weights", "none",
             "--imgsz", 28, 28, "--epochs", 2, "--workers", 0, "--device", "cpu", "--out-dir", tmp_path]
    code, _, err = run(train, *flags)
    assert code == 0 and (tmp_path / "best_model_iou.pth").exists()
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all("anywhere" in line for line in warnings) and "Traceback" not in err


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("3", False)])
def test_of_many_processes_the_first_names_the_wrong_flag(tmp_path, monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stop:
        script_parser("text").parse_args(["--nonsense\nx"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and (r"--nonsense\nx" in err) == printed
    assert (tmp_path / "error.json").exists() == printed
    if printed:
        content = json.loads((tmp_path / "error.json").read_text())["message"]
        assert content["message"] in err and content["extraInfo"]["timestamp"].isdecimal()


def test_nothing_reports_that_it_is_used():
    import_openvino()
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401


# --- readers ----------------------------------------------------------------------------------------------
def names_file(error, path):
    """Assert that an InputError is one line that names the file."""
    assert "\n" not in str(error) and Path(path).name in str(error)


def damage(data):
    """Return a strategy: the bytes with a few of them changed, cut off, doubled or replaced by others."""
    positions = st.integers(0, max(0, len(data) - 1))

    def flip(changes):
        changed = bytearray(data)
        for position, value in changes:
            changed[position] ^= value
        return bytes(changed)

    return st.one_of(
        st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=8).map(flip),
        positions.map(lambda end: data[:end]),
        st.tuples(positions, positions).map(lambda cut: data[:min(cut)] + data[max(cut):]),
        st.tuples(positions, st.binary(max_size=64)).map(lambda new: data[:new[0]] + new[1] + data[new[0]:]),
        st.binary(max_size=200),
    )


def encoded(kind):
    """Return (bytes, ending) of a small image of a kind."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    image, options, ending = Image.fromarray(noise), {}, kind.split()[0]
    if kind == "png palette":
        image, options = image.quantize(8), dict(transparency=3)
    elif kind == "png 16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif kind == "jpg cmyk":
        image = image.convert("CMYK")
    elif kind == "jpg exif":
        options = dict(exif=Image.Exif())
        options["exif"][0x0112] = 6
    elif kind == "tif nan":
        values = noise[..., 0].astype(np.float32)
        values[::3], values[1::7] = np.nan, np.inf
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


KINDS = ["jpg", "png", "png palette", "png 16", "jpg cmyk", "jpg exif", "tif nan", "tif", "png gif",
         "png 1x1", "png animated", "webp", "bmp"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_fuzz_images_and_masks(kind, data):
    content, ending = encoded(kind)
    path = WORKDIR / f"imagé {kind}{ending}"
    path.write_bytes(content)
    assert read_image(path).shape[0] == 3
    path.write_bytes(data.draw(damage(content)))
    for read in (read_image, lambda path: read_upright(path, at_least=(3, 3))[0]):
        try:
            image = read(path)
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel()
        except InputError as error:
            names_file(error, path)
    for table in (index_table(256), index_table(3)):
        try:
            mask = read_mask(path, table)
            assert mask.dtype == np.uint8 and mask.ndim == 2
        except InputError as error:
            names_file(error, path)


@fuzz
@given(entries=st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=9)),
       end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_fuzz_lists(entries, end, mark):
    path = WORKDIR / "list.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(entries).encode())
    wanted = list(dict.fromkeys(entry.strip() for entry in entries))
    wanted = [entry for entry in wanted if entry.lstrip("\ufeff")]
    try:
        names_read = [entry.lstrip("\ufeff") for entry in read_list(path)]
        assert list(dict.fromkeys(names_read)) == list(dict.fromkeys(e.lstrip("\ufeff") for e in wanted))
    except InputError as error:
        names_file(error, path)
        assert not wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("fuzz") / "folder", count=3, size=(20, 30))


@fuzz
@given(text=st.one_of(st.binary(max_size=80), st.lists(
    st.from_regex(r"[a-c ]{0,3}(=| )?( ?-?[0-9]{1,3}){0,4}#?", fullmatch=True), max_size=6
).map(lambda lines: "\r\n".join(lines).encode())))
def test_fuzz_classes_files(folder, text):
    path = folder / "classes.txt"
    path.write_bytes(text)
    try:
        read_classes(path)
        source = load("folder", folder)
        for sample in source.splits["train"]:
            read_sample(sample, source.table)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5)


@fuzz
@given(data=st.data())
def test_fuzz_checkpoints(data):
    """Damaged ones and ones of wrong content are refused, or load as a model with the classes they name."""
    path = WORKDIR / "model.pth"
    packed = pack_checkpoint(tiny(backbone="timm/test_vit.r160_in1k"), CLASSES, (28, 28))
    if data.draw(st.booleans()):
        content = io.BytesIO()
        torch.save(packed, content)
        path.write_bytes(data.draw(damage(content.getvalue())))
    else:
        key = data.draw(st.sampled_from([*packed, *packed["spec"]]))
        packed_entry = packed if key in packed else packed["spec"]
        packed_entry[key] = data.draw(JUNK)
        torch.save(packed, path)
    try:
        model, checkpoint = load_model(path)
        assert len(checkpoint["classes"]) == model.num_classes
        assert all(value.isfinite().all() for value in model.state_dict().values())
    except InputError as error:
        names_file(error, path)


@fuzz
@given(data=st.data(), frames=st.integers(1, 4), odd=st.booleans())
def test_fuzz_videos(data, frames, odd):
    path, size = WORKDIR / "clip.avi", (33 if odd else 32, 48)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, size[::-1])
    for frame in np.random.default_rng(frames).integers(0, 256, (frames, *size, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    path.write_bytes(data.draw(damage(path.read_bytes())))
    try:
        for number, frame in enumerate(VideoReader(path)):
            assert frame.dtype == np.uint8 and frame.ndim == 3
            if number > 50:
                break
    except InputError as error:
        names_file(error, path)


@fuzz
@given(garbage=st.binary(max_size=300))
def test_fuzz_caches_that_are_garbage_are_made_anew(folder, garbage):
    source, cache = load("folder", folder, val_fraction=0), folder.parent / "cache"
    cache.mkdir(exist_ok=True)

    def results():
        reader = WindowReader(source.splits["train"], source.table, cache)
        return (count_pixels(source.splits["train"], source.table, 3, cache),
                np.array(reader.read(0, 0, 0, 20, 30)[0]), reader.points(3, cache))

    before = results()
    for path in sorted(cache.rglob("*.npy")):
        content = path.read_bytes()
        for head in (b"", b"PK\x03\x04", content[:20], content[:80]):
            path.write_bytes(head + garbage)
            assert all(np.array_equal(old, new) for old, new in zip(before, results(), strict=True))
        path.write_bytes(content)


# --- files that are known to do harm ----------------------------------------------------------------------
def png_header(width, height):
    """Return a PNG that says it is this large and holds next to nothing."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c") + chunk(b"IEND", b"")


PEAK = """
import resource, sys
from config import InputError
from dataio.readers import index_table, read_image, read_mask
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (read_image, lambda path: read_mask(path, index_table(3))):
    try:
        read(sys.argv[1])
    except InputError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_an_image_that_claims_too_many_pixels_needs_no_memory(tmp_path):
    image = tmp_path / "bomb.png"
    for side in (14_000, 60_000):  # below the largest that is read, and above
        image.write_bytes(png_header(side, side))
        for read in (read_image, lambda path: read_mask(path, index_table(3))):
            with pytest.raises(InputError, match=r"bomb\.png"):
                read(image)
    # in a process of its own, since no peak of this one can be taken back
    command = [sys.executable, "-c", PEAK, image]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 200, done.stderr


def test_a_folder_of_hostile_files_is_worked_through(tmp_path, run):
    good = {"täst bild.png": (40, 30), "long.png": (20_000, 10), "dot.png": (1, 1), "имя 1.jpg": (33, 47)}
    source = tmp_path / "in put"
    source.mkdir()
    for name, size in good.items():
        Image.new("RGB", size, "red").save(source / name)
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to(source / "nowhere.png")
    bad = {"empty.jpg": b"", "text.png": b"text", "bomb.png": png_header(60_000, 60_000),
           "cut.jpg": encoded("jpg")[0][:300]}
    for name, content in bad.items():
        (source / name).write_bytes(content)
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 28)), tmp_path / "model.pth")
    flags = ["--input", source, "--model", tmp_path / "model.pth", "--out-dir", tmp_path / "out"]
    code, _, err = run(infer_image, *flags, "--device", "cpu")
    assert code == 1 and "Traceback" not in err and all(err.count(name) == 1 for name in bad)
    for name, size in good.items():
        results = tmp_path / "out/inference_results_image"
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
ANNOTATIONS = {"COCO": "*.json", "COCO, compressed": "*.json", "labelme": "*.json", "Supervisely": "*.json",
               "YOLO": "labels/**/*.txt", "Label Studio": "*.json"}


def entries_of(content, path=()):
    """Return the paths of all values in a JSON content."""
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list) else items
    paths = [path]
    for key, value in items:
        paths += entries_of(value, (*path, key))
    return paths


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


@pytest.mark.parametrize("tool", ANNOTATIONS)
def test_fuzz_annotation_files(tool, tmp_path, monkeypatch):
    """Any value replaced or left out, any word of a line: masks, or one line that names a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    TOOLS[next(name for name in TOOLS if name.startswith(tool))](root)
    texts = {file: file.read_text() for file in sorted(root.rglob(ANNOTATIONS[tool]))}

    @fuzz
    @given(data=st.data())
    def hostile(data):
        file = data.draw(st.sampled_from(list(texts)))
        if file.suffix == ".json":
            content = json.loads(texts[file])
            entry = data.draw(st.sampled_from(entries_of(content)))
            text = json.dumps(changed(content, entry, data.draw(HOSTILE | st.just(...))))
        else:
            words = texts[file].split(" ")
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(
                st.sampled_from(["nan", "-1", "1e400", "x", "", "\n", "9" * 400, "inf", "0.5 0.5"]))
            text = " ".join(words)
        file.write_text(text)
        try:
            masks = find_masks(root)
            for samples in masks.splits.values():
                for sample in samples:
                    assert np.array(Image.open(sample.mask)).max() <= len(masks.entries)
        except InputError as error:
            names_file(error, root)
        finally:
            file.write_text(texts[file])

    hostile()
