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
import pickle
import random
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import torch
from attacks import JUNK, damaged, png_header
from conftest import ROOT, load, tiny, write_folder, write_pair
from PIL import Image

import check_data
import demo  # noqa: F401
import infer_image
import train
import visualize
from checkpoint import load_model, pack_checkpoint
from config import (FIELDS, RECIPES, InputError, TrainConfig, names, one_line, recipe_settings, script_parser,
                    setting)
from dataio import schema
from dataio.labels import read_classes
from dataio.layout import read_list
from dataio.image_rule import PICTURES
from dataio.readers import index_table, read_mask, read_sample
from dataio.stratify import count_pixels
from dataio.windows import WindowReader
from inference.backends import import_openvino
from inference.predictor import Protocol, make_protocol
from inference.video import VideoReader
from models.weights import read_weights
from utils import read_kept

CLASSES = [("background", (0, 0, 0)), ("a", (255, 0, 0)), ("b", (0, 255, 0))]
EXAMPLES = int(os.environ.get("FUZZ", 0))


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


class Evil:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_file_runs_the_code_in_it(tmp_path):
    """Checkpoints and weights, images and masks, caches."""
    evil = Evil(tmp_path / "ran")
    torch.save(dict(pack_checkpoint(tiny(), CLASSES, (28, 28)), later=evil), tmp_path / "model.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(evil))
    np.save(tmp_path / "array.npy", np.array([[evil]], object), allow_pickle=True)
    np.savez(tmp_path / "array.npz", np.array([[evil]], object), allow_pickle=True)
    readers = dict(model=[load_model, read_weights], plain=[load_model, read_weights],
                   array=[LENIENT.read, partial(read_mask, table=index_table(3))])
    for path in sorted(tmp_path.iterdir()):
        for read in readers[path.stem]:
            with pytest.raises(InputError, match=path.name):
                read(path)
    assert read_kept(tmp_path / "array.npy") is None and not evil.path.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert evil.path.exists()


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


def small_run(tmp_path, out):
    """Return the flags of a short run on four images."""
    data = write_folder(tmp_path / "data", count=4)
    return ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--weights", "none",
            "--imgsz", 28, 28, "--epochs", 2, "--workers", 0, "--device", "cpu", "--out-dir", out]


def test_what_a_checkpoint_could_not_hold_is_refused_before_training(tmp_path, run):
    code, _, err = run(train, *small_run(tmp_path, tmp_path / "a\nb"))
    assert code == 2 and err.count("\n") == 1 and "out_dir" in err and not list(tmp_path.rglob("*.pth"))


@pytest.mark.plots
@pytest.mark.parametrize("function", ["plot_run", "side_by_side"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, run, monkeypatch, function):
    def broken(*args):
        raise ValueError("no such font\nanywhere")

    monkeypatch.setattr(visualize, function, broken)
    code, _, err = run(train, *small_run(tmp_path, tmp_path))
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
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"  # by demo.py, before gradio is imported


# --- readers ----------------------------------------------------------------------------------------------
def generators():
    """Yield random number generators: fifteen that are always the same, or FUZZ others every time."""
    first = random.randrange(10**9) if EXAMPLES else 0
    for seed in range(first, first + (EXAMPLES or 15)):
        print("seed", seed)  # pytest shows it where a test fails
        yield random.Random(seed)


@contextmanager
def refused_by_name(*names):
    """Context that may end in an InputError that has one of the names in it: of one line, or a report with an
    indented line for each thing that is wrong.
    """
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error).replace("\n  ", "") and any(name in str(error) for name in names), error


def image_files():
    """Return {file name: bytes} of a small image of every kind."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    image, deep = Image.fromarray(noise), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    values = noise[..., 0].astype(np.float32)
    values[::3], values[1::7] = np.nan, np.inf
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    frames = dict(save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    files = {
        "imagé.jpg": (image, dict(format="JPEG")),
        "cmyk.jpg": (image.convert("CMYK"), dict(format="JPEG")),
        "exif.jpg": (image, dict(format="JPEG", exif=exif)),
        "plain.png": (image, dict(format="PNG")),
        "palette.png": (image.quantize(8), dict(format="PNG", transparency=3)),
        "deep.png": (deep, dict(format="PNG")),
        "animated.png": (image, dict(format="PNG", **frames)),
        "gif.png": (image, dict(format="GIF", **frames)),
        "1x1.png": (image.crop((0, 0, 1, 1)), dict(format="PNG")),
        "plain.tif": (image, dict(format="TIFF")),
        "nan.tif": (Image.fromarray(values), dict(format="TIFF")),
        "plain.webp": (image, dict(format="WEBP")),
        "plain.bmp": (image, dict(format="BMP")),
    }
    contents = {}
    for name, (picture, options) in files.items():
        file = io.BytesIO()
        picture.save(file, **options)
        contents[name] = file.getvalue()
    bands = noise.transpose(2, 0, 1).astype(np.uint16) * 200
    with rasterio.MemoryFile() as file:
        with file.open(driver="GTiff", width=31, height=23, count=3, dtype="uint16", nodata=0) as writer:
            writer.write(bands)
        contents["bands.tif"] = file.read()
    for name, write in (("array.npy", np.save), ("array.npz", np.savez)):
        file = io.BytesIO()
        write(file, bands)
        contents[name] = file.getvalue()
    return contents


IMAGES, LENIENT = image_files(), dataclasses.replace(PICTURES, strict=False)


def check_image(path):
    for at_least in (None, (3, 3)):
        with refused_by_name(path.name):
            image = LENIENT.read(path, at_least).image
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel()
    for table in (index_table(256), index_table(3)):
        with refused_by_name(path.name):
            mask = read_mask(path, table)
            assert mask.dtype == np.uint8 and mask.ndim == 2


def checkpoint_bytes(rng):
    """Return a checkpoint that is damaged, or has junk in an entry."""
    packed, file = pack_checkpoint(tiny(backbone="timm/test_vit.r160_in1k"), CLASSES, (28, 28)), io.BytesIO()
    if rng.random() < 0.5:
        torch.save(packed, file)
        return damaged(file.getvalue(), rng)
    entries = rng.choice([packed, packed["spec"]])
    entries[rng.choice(list(entries))] = rng.choice(JUNK)
    torch.save(packed, file)
    return file.getvalue()


def check_model(path):
    model, checkpoint = load_model(path)
    assert len(checkpoint["classes"]) == model.num_classes
    assert all(value.isfinite().all() for value in model.state_dict().values())


def clip_bytes(rng):
    """Return a damaged clip."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "clip.avi", (48, rng.choice((32, 33)))
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, size)
        for _ in range(rng.randrange(1, 5)):
            writer.write(np.frombuffer(rng.randbytes(size[1] * 48 * 3), np.uint8).reshape(size[1], 48, 3))
        writer.release()
        return damaged(path.read_bytes(), rng)


def check_clip(path):
    for number, frame in enumerate(VideoReader(path)):
        assert frame.dtype == np.uint8 and frame.ndim == 3
        if number > 50:
            break


def list_bytes(rng):
    """Return lines of names such as lists of images hold."""
    lines = ["".join(rng.choices("ab#/\\ é名\u00a0\u200b,;:.'\"", k=rng.randrange(9)))
             for _ in range(rng.randrange(6))]
    return rng.choice((b"", b"\xef\xbb\xbf")) + rng.choice(("\n", "\r\n")).join(lines).encode()


def check_list(path):
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    expected = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    try:
        assert list(dict.fromkeys(read_list(path))) == expected
    except InputError:
        assert not expected
        raise


FILES = {  # name -> function rng -> bytes, function that reads the file and looks at what it reads
    **{name: (partial(damaged, content), check_image) for name, content in IMAGES.items()},
    "model.pth": (checkpoint_bytes, check_model),
    "clip.avi": (clip_bytes, check_clip),
    "list.txt": (list_bytes, check_list),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_fuzz_files(name, tmp_path):
    path, (make, check) = tmp_path / name, FILES[name]
    if name in IMAGES:
        path.write_bytes(IMAGES[name])
        assert LENIENT.read(path).image.shape[0] == 3
    for rng in generators():
        path.write_bytes(make(rng))
        with refused_by_name(name):
            check(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("fuzz") / "folder", count=3, size=(20, 30))


def test_fuzz_classes_files(folder):
    path = folder / "classes.txt"
    for rng in generators():
        lines = ["".join(rng.choices(["a", "b", "c", " ", "=", "#", "-1", "255", "0 0 0", "999"], k=5))
                 for _ in range(rng.randrange(1, 7))]
        path.write_bytes(rng.choice(["\r\n".join(lines).encode(), rng.randbytes(80)]))
        with refused_by_name(""):
            read_classes(path)
            source = load("folder", folder)
            for sample in source.splits["train"]:
                read_sample(sample, source.table)
    path.unlink()


def test_fuzz_caches_that_are_garbage_are_made_anew(folder):
    source, cache = load("folder", folder, val_fraction=0), folder.parent / "cache"
    cache.mkdir()

    def results():
        reader = WindowReader(source.splits["train"], source.table, cache)
        return (count_pixels(source.splits["train"], source.table, 3, cache),
                np.array(reader.read(0, 0, 0, 20, 30)[0]), reader.points(3, cache))

    before = results()
    for path in sorted(cache.rglob("*.npy")):
        content = path.read_bytes()
        for rng in generators():
            path.write_bytes(rng.choice([b"", b"PK\x03\x04", content[:20], content[:80]]) + rng.randbytes(99))
            assert all(map(np.array_equal, before, results()))
        path.write_bytes(content)


# --- files that are known to do harm ----------------------------------------------------------------------
PEAK = """
import resource, sys
from config import InputError
from dataio.image_rule import read_image
from dataio.readers import index_table, read_mask
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read in (read_image, lambda path: read_mask(path, index_table(3))):
        try:
            read(path)
        except InputError as error:
            assert path in str(error)
        else:
            raise AssertionError
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_an_image_that_claims_too_many_pixels_needs_no_memory(tmp_path):
    for side in (14_000, 60_000):  # below the largest that is read, and above
        (tmp_path / f"{side}.png").write_bytes(png_header(side, side))
    # in a process of its own, since no peak of this one can be taken back
    command = [sys.executable, "-c", PEAK, *map(str, tmp_path.iterdir())]
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
           "cut.jpg": IMAGES["imagé.jpg"][:300]}
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
    (root / "masks/01.png").write_bytes(IMAGES["plain.png"][:100])
    (root / "images/02.png").write_bytes(png_header(60_000, 60_000))
    write_pair(root / "images/99 ü.png", root / "masks/99 ü.png", np.zeros((5, 7), np.uint8))
    (root / "images/loop").symlink_to(root)
    code, out, err = run(check_data, "--data-root", root, "--out-dir", tmp_path / "out")
    assert code == 1 and "Traceback" not in out + err
    assert all(name in out + err for name in ("00.png", "01.png", "02.png"))
