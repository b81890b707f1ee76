"""Exported models and OpenVINO: the same logits, masks and scores as PyTorch; clear refusals."""
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, call, random_images, refused, tiny
from filelock import FileLock
from PIL import Image
from test_video import write_clip

import evaluate
import export
import infer_image
import infer_video
import utils
from checkpoint import load_model, pack_checkpoint
from config import InputError
from dataio.image_rule import ImageRule
from dataio.resizing import resize_image
from inference import backends, predictor
from inference.backends import convert
from models.heads import HEADS
from models.weights import hash_files, hash_model_file

SIZE = (30, 43)  # not a multiple of the patches
KINDS = {"onnx": (".onnx", 0), "openvino": (".xml", 2)}  # ending, --batch-size


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder with a trained model, model.pth, and its exported forms, for which torch's ONNX exporter takes
    most of the seconds.
    """
    root = tmp_path_factory.mktemp("exported")
    shutil.copy(trained[1] / "best_model_iou.pth", root / "model.pth")
    for kind, (_, batch) in KINDS.items():
        call(export, "--model", root / "model.pth", "--format", kind, "--batch-size", batch, "--imgsz", *SIZE)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_exported_logits_are_those_of_pytorch(exported, kind):
    ending, batch = KINDS[kind]
    images = random_images(3, 3, *SIZE)
    model, _ = load_model(exported / "model.pth")
    other, facts = load_model(exported / f"model{ending}", precise=True)
    with torch.no_grad():
        want, got = model(images), other(images)
    assert got.shape == want.shape and torch.allclose(got, want, atol=2e-3 * want.abs().max())
    assert facts["imgsz"] == list(SIZE) and len(facts["classes"]) == other.num_classes == 3
    assert facts["batch"] == batch


def test_images_and_scores_are_those_of_pytorch(trained, exported, tmp_path, run):
    masks, protocols, mious = [], [], []
    for ending in (".pth", ".onnx", ".xml"):
        out = tmp_path / ending[1:]
        flags = ["--model", exported / f"model{ending}", "--out-dir", out, "--imgsz", *SIZE]
        code, _, err = run(infer_image, *flags, "--input", trained[0] / "images", "--backend", "auto")
        assert code == 0, err
        paths = sorted((out / "inference_results_image").glob("*_mask.png"))
        masks.append(np.concatenate([np.ravel(Image.open(path)) for path in paths]))
        assert run(evaluate, *flags)[0] == 0
        metrics = json.loads((out / "evaluation/metrics.json").read_text())
        mious.append(metrics["miou"])
        protocols.append(metrics["protocol"])
    assert len(paths) == 10 and mious == pytest.approx([mious[0]] * 3, abs=0.02)
    for other in (masks[1], masks[2]):
        assert (masks[0] == other).mean() > 0.99  # PyTorch's are in bfloat16 here
    assert len({protocol["weights_sha256"] for protocol in protocols}) == 3
    assert len({protocol["precision"] for protocol in protocols}) == 3


def test_flip_and_windows_work_with_an_exported_file(trained, exported, tmp_path, run):
    flags = ["--model", exported / "model.onnx", "--out-dir", tmp_path]
    code, text, err = run(infer_image, *flags, "--input", trained[0] / "images/00.png", "--tta", "flip",
                          "--protocol", "slide")
    assert code == 0 and "ONNX Runtime" in text, err


@pytest.mark.parametrize("head", [
    head if head == "deconv" else pytest.param(head, marks=pytest.mark.long) for head in HEADS])
def test_a_model_converted_in_memory_gives_the_same_logits(head):
    net = tiny(head=head).eval().requires_grad_(False)
    converted = convert(net, SIZE, "openvino")
    images = random_images(5, 3, *SIZE)  # more than it computes side by side
    images[::2] //= 3
    with torch.no_grad():
        want, side_by_side, alone = net(images), converted(images), converted(images[1:2])
    tolerance = 0.03 * want.abs().max()  # it may use bfloat16
    assert torch.allclose(side_by_side, want, atol=tolerance)
    assert torch.allclose(alone, want[1:2], atol=tolerance)


@pytest.mark.parametrize("faster", ["torch", "openvino"])
def test_the_backend_is_chosen_by_trying_and_named(exported, monkeypatch, faster):
    tried = []

    def seconds(function, model, images):
        tried.append(type(model).__name__)
        return float((type(model).__name__ == "ExportedModel") == (faster == "torch"))

    def converted(model, size, name):
        other = backends.ExportedModel(None, size)
        other.name = "OpenVINO"
        return other

    monkeypatch.setattr(predictor, "shortest_time", seconds)
    monkeypatch.setattr(predictor, "convert", converted)
    path = exported / "model.pth"
    many = predictor.Predictor(*load_model(path), "cpu", backend="auto", expected=None)
    assert tried == ["Segmenter", "ExportedModel"] and ("OpenVINO" in str(many)) == (faster == "openvino")
    few = predictor.Predictor(*load_model(path), "cpu", backend="auto", expected=3)
    assert len(tried) == 2 and "torch" in str(few)  # not worth the seconds it takes to start


@pytest.mark.long
def test_a_clip_runs_in_openvino_from_a_checkpoint(trained, exported, tmp_path, run):
    clip = write_clip(tmp_path / "clip.mp4", 12)
    code, text, err = run(infer_video, "--model", exported / "model.pth", "--input", clip,
                          "--out-dir", tmp_path, "--backend", "openvino", "--batch-size", 5)
    assert code == 0 and "12 frames" in text and "OpenVINO" in text, err


# --- threads ----------------------------------------------------------------------------------------------
def check_in_threads(predictor, rounds=8, batch=1):
    """Assert that three threads get of one Predictor, on images of three sizes, what one thread gets."""
    images = [random_images(batch, 3, 40 + 13 * number, 50, seed=number) // (number + 1)
              for number in range(3)]

    def confidences(number):
        return predictor.scores(images[number]).confidence if batch == 1 else \
            predictor.model.logits(resize_image(images[number], SIZE))[0].numpy()

    want = [confidences(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda number: [confidences(number) for _ in range(rounds)], range(3)))
    for number in range(3):
        for values in got[number]:
            np.testing.assert_allclose(values, want[number], atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_threads_share_a_network(head):
    facts = {"classes": [[name, [0, 0, 0]] for name in "abc"], "imgsz": SIZE}
    check_in_threads(predictor.Predictor(tiny(head=head).eval(), facts, "cpu",
                                         predictor.make_protocol("slide", "", SIZE)))


@pytest.mark.parametrize(("ending", "batch"), [(".onnx", 1), (".xml", 1), (".xml", 5)])
def test_threads_share_an_exported_file(exported, ending, batch):
    """batch 5: more than an exported file takes at once, so that OpenVINO computes side by side."""
    check_in_threads(predictor.Predictor(*load_model(exported / f"model{ending}", precise=True)), 25, batch)


# --- refusals ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ending", "flags", "named"), [
    (".onnx", ["--backend", "openvino"], "--backend"),
    (".onnx", ["--imgsz", 28, 42], "30x43"),
    (".onnx", ["--tta", "ms"], "30x43"),
])
def test_backends_that_cannot_be(trained, exported, tmp_path, run, ending, flags, named):
    code, _, err = run(infer_image, "--input", trained[0] / "images", "--out-dir", tmp_path,
                       "--model", exported / f"model{ending}", *flags)
    assert code == 2 and named in err.splitlines()[-1] and "Traceback" not in err, err


class SignalStack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    @classmethod
    def now(cls):
        """Return the address and size of the stack on which this thread handles signals."""
        stack = cls()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
        return stack.pointer, stack.size


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
@pytest.mark.parametrize("first", [0, 1])
def test_models_that_go_leave_signals_a_stack(exported, first):
    """It was that of a model which was freed: Ctrl-C crashed."""
    convert(tiny().eval().requires_grad_(False), SIZE, "openvino")
    before = SignalStack.now()
    net = tiny().eval().requires_grad_(False)
    models = [load_model(exported / "model.xml")[0], convert(net, SIZE, "openvino")]
    del models[first], models[0]
    gc.collect()
    assert SignalStack.now() == before


@pytest.mark.parametrize(("package", "ending"), [("openvino", ".xml"), ("onnxruntime", ".onnx")])
def test_a_package_that_is_missing_is_named(exported, monkeypatch, package, ending):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}$"):
        load_model(exported / f"model{ending}")


@pytest.mark.parametrize(("ending", "damage"), [
    *((ending, damage) for ending in (".onnx", ".xml") for damage in ("cut", "text", "missing", "foreign")),
    (".xml", "no bin")])
def test_broken_files_are_one_line(trained, exported, tmp_path, run, ending, damage):
    path, source = tmp_path / f"broken{ending}", exported / f"model{ending}"
    content = source.read_bytes()
    contents = {"cut": content[:len(content) // 2], "text": b"not a model",
                "foreign": content.replace(b"dinoseg", b"another")}
    if damage != "missing":
        path.write_bytes(contents.get(damage, content))
    if ending == ".xml" and damage != "no bin":
        shutil.copy(source.with_suffix(".bin"), path.with_suffix(".bin"))
    code, _, err = run(infer_image, "--model", path, "--input", trained[0] / "images/00.png")
    assert code == 2 and "broken" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("change", [
    {"imgsz": "224"}, {"imgsz": [224]}, {"batch": "1"}, {"batch": -1}, {"classes": "abc"},
    {"classes": [["a", [0, 0, 300]]]}, {"protocol": {"foo": 1}}, {"format": "other"},
    {"protocol": {"window": [28, 42], "slide": True, "stride": [28, 43]}},  # leaves out pixels
    {"protocol": {"window": [28, 42], "tile": 2.0, "stride": [20, 21]}},
    {"protocol": {"window": [28, 42], "slide": True}},
    {"protocol": {"window": [28, 42], "tile": 1e-5, "stride": [20, 21]}},  # tiles as large as no image is
    {"protocol": {"window": [28, 42], "scales": [1e-5]}}, {"protocol": {"window": [28, 42], "scales": [1e5]}},
    {"trained_on": "no hash"},
    {"checksum": "crc32:1"}], ids=str)
def test_metadata_that_export_did_not_write(change):
    good = {"format": "dinoseg", "imgsz": [28, 42], "batch": 1, "classes": [["a", [0, 0, 0]]]}
    assert backends.check_facts(json.dumps(good), "m.onnx")["imgsz"] == [28, 42]
    assert backends.check_facts(json.dumps(good | {"int8": True}), "m.onnx")["batch"] == 1  # of earlier files
    for text in (json.dumps(good | change), "[" * 100_000, None):
        with pytest.raises(InputError, match="^m.onnx"):
            backends.check_facts(text, "m.onnx")


# --- files that do not belong together --------------------------------------------------------------------
def copy_edited(source, path, **facts):
    """Copy an exported file, its metadata changed by `facts`, None leaves one out; return its path."""
    def edited(text):
        changed = json.loads(text) | facts
        return json.dumps({name: value for name, value in changed.items() if value is not None})

    if path.suffix == ".onnx":
        import onnx
        model = onnx.load(source)
        entry = next(entry for entry in model.metadata_props if entry.key == backends.METADATA)
        entry.value = edited(entry.value)
        onnx.save(model, path)
    else:
        tree = ElementTree.parse(source)
        element = next(tree.iter(backends.METADATA))
        element.set("value", edited(element.get("value")))
        tree.write(path)
        shutil.copy(source.with_suffix(".bin"), path.with_suffix(".bin"))
    return path


@pytest.mark.parametrize(("ending", "change"), [
    *((ending, change) for ending in (".onnx", ".xml") for change in (
        {"classes": [["a", [0, 0, 0]]] * 2}, {"classes": [["a", [0, 0, 0]]] * 5}, {"imgsz": [30, 44]},
        {"imgsz": [31, 43]}, {"image_rule": ImageRule(bands=(1, 2, 3, 4)).as_dict()})),
    (".xml", {"batch": 3}), (".xml", {"batch": 0})])
def test_metadata_of_another_network_are_refused(exported, tmp_path, ending, change):
    source = exported / f"model{ending}"
    with refused(tmp_path / f"m{ending}"):
        load_model(copy_edited(source, tmp_path / f"m{ending}", **change, checksum=None))


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_files_are_those_that_were_exported(exported, tmp_path, ending):
    source, path = exported / f"model{ending}", tmp_path / f"m{ending}"
    names = [[name, [0, 0, 0]] for name in "cba"]
    assert load_model(copy_edited(source, path, classes=names, checksum=None))[1]["classes"] == names
    with refused(path):
        load_model(copy_edited(source, path, classes=names))
    weights = path if ending == ".onnx" else path.with_suffix(".bin")
    for file in (path, weights):
        shutil.copy(source.with_suffix(file.suffix), file)
    assert load_model(path)[1]["file_sha256"] == hash_model_file(path)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # the weights of another training
    weights.write_bytes(content)
    with refused(path):
        load_model(path)


def test_a_checksum_is_of_the_file_but_itself_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "blocks_of", lambda file: iter(partial(file.read, 20), b""))
    own, path = "crc32:12345678", tmp_path / "m.onnx"
    for start in range(45):
        content = bytes(range(start)) + b"%s" + b"end"
        path.write_bytes(content.replace(b"%s", own.encode()))
        blank = content.replace(b"%s", backends.NO_CHECKSUM.encode())
        assert backends.checksum(path, own) == f"crc32:{zlib.crc32(blank):08x}"


def test_weights_beside_an_onnx_file_belong_to_it(tmp_path, run, monkeypatch):
    """As torch writes them above 1.5 GB: under the name that the file had."""
    torch.save(pack_checkpoint(tiny(head="linear"), [(name, (0, 0, 0)) for name in "abc"], SIZE),
               tmp_path / "m.pth")
    path, weights = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    assert run(export, "--model", tmp_path / "m.pth")[0] == 0 and weights.is_file()
    _, facts = load_model(path)
    assert facts["file_sha256"] == hash_files(path, weights) == hash_model_file(path)
    for file in (path, weights):
        shutil.copy(file, tmp_path / file.name.replace("m.", "other."))
    with refused(tmp_path / "other.onnx", weights.name):
        load_model(tmp_path / "other.onnx")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with refused(path, weights.name):
        load_model(path)
    monkeypatch.setattr(backends.OnnxRuntime, "write", lambda graph, batch, text, path: path.write_text(text))
    monkeypatch.setattr(export, "agreement", lambda *_: 1.0)
    assert run(export, "--model", tmp_path / "m.pth")[0] == 0 and not weights.exists()


@pytest.mark.parametrize("ending", [".pth", ".onnx", ".xml"])
def test_the_hash_is_that_of_what_was_loaded(trained, exported, tmp_path, run, monkeypatch, ending):
    """A training run replaces the file between loading and scoring."""
    path = tmp_path / f"m{ending}"
    others = [".bin"] * (ending == ".xml")
    for suffix in (ending, *others):
        shutil.copy(exported / f"model{suffix}", path.with_suffix(suffix))
    before = hash_model_file(path)

    def then_replaced(*args, **options):
        model = load_model(*args, **options)
        (tmp_path / "new").write_bytes(b"of another training")
        os.replace(tmp_path / "new", path)
        return model

    monkeypatch.setattr(evaluate, "load_model", then_replaced)
    code, _, err = run(evaluate, "--model", path, "--out-dir", tmp_path, "--data-root", trained[0])
    assert code == 0, err
    protocol = json.loads((tmp_path / "evaluation/metrics.json").read_text())["protocol"]
    assert protocol["weights_sha256"] == before[:16]


@pytest.mark.parametrize("ending", [".pth", ".onnx"])
def test_a_file_that_is_written_while_it_is_read_is_refused(exported, tmp_path, monkeypatch, ending):
    path = shutil.copy(exported / f"model{ending}", tmp_path / f"m{ending}")
    module, name = (torch, "load") if ending == ".pth" else (backends, "check_facts")
    original = getattr(module, name)

    def written_meanwhile(*args, **options):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
        return original(*args, **options)

    monkeypatch.setattr(module, name, written_meanwhile)
    with refused(path):
        load_model(path)


# --- export.py --------------------------------------------------------------------------------------------
@pytest.fixture
def quick_export(tmp_path, run, monkeypatch):
    """Return a function that runs export.py on tmp_path/m.pth, in which nothing is computed; its argument is
    called in place of the comparison with PyTorch.
    """
    torch.save(pack_checkpoint(tiny(), [(name, (0, 0, 0)) for name in "abc"], SIZE), tmp_path / "m.pth")
    monkeypatch.setattr(backends.OnnxRuntime, "write", lambda graph, batch, text, path: path.write_text(text))

    def export_with(agreement=lambda *_: 1.0):
        monkeypatch.setattr(export, "agreement", agreement)
        return run(export, "--model", tmp_path / "m.pth")

    return export_with


def test_an_export_that_disagrees_is_not_written(tmp_path, quick_export):
    code, _, err = quick_export(lambda *_: 0.9985)
    assert code == 2 and "99.850 %" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_files_as_they_were(tmp_path, quick_export, number):
    (tmp_path / "m.onnx").write_text("earlier")
    code, _, err = quick_export(lambda *_: os.kill(os.getpid(), number))
    assert code == 128 + number and err.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.pth"]
    assert (tmp_path / "m.onnx").read_text() == "earlier"


def test_what_a_killed_export_left_is_removed_and_another_at_work_is_not(tmp_path, quick_export):
    left, other = tmp_path / ".m.onnx.killed.export", tmp_path / ".other.onnx.killed.export"
    for folder in (left, other):
        folder.mkdir()
        (folder / "m.onnx").write_text("half")
    with FileLock(left / ".lock"):
        code, _, err = quick_export()
        assert code == 2 and "m.onnx" in err and (left / "m.onnx").exists()
    assert quick_export()[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "m.onnx", "m.pth"]


def test_exports_to_one_file_take_turns_and_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    with export.working_folder(path) as folder:
        with refused("m.onnx"), export.working_folder(path):
            pass
        assert folder.is_dir()
        monkeypatch.setattr(export, "write_exported", mock.Mock(side_effect=OSError(28, "No space left")))
        with refused("m.onnx", tmp_path, "No space left"):
            export.write(None, None, {}, folder / path.name)
    path.write_text("")
    with refused("--out:", path), export.working_folder(path / "m.onnx"):
        pass
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("new", "old"), [
    (("m.xml", "m.bin"), ("m.xml", "m.bin")), (("m.onnx",), ("m.onnx", "m.onnx.data")),
    (("m.onnx", "m.onnx.data"), ("m.onnx",))], ids=str)
def test_the_weights_of_an_export_never_stand_beside_an_earlier_file(tmp_path, monkeypatch, new, old):
    """Nor are they left alone by a signal."""
    for folder, names in ((tmp_path / "new", new), (tmp_path, old)):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("old" if folder == tmp_path else "new")
    states, replace = [], os.replace

    def watched(source, target):
        replace(source, target)
        states.append({path.name: path.read_text() for path in tmp_path.glob("m.*")})
        if len(states) == 1:  # a second one would not wait
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", watched)
    with utils.stopping_at_once(str):
        export.move_files(tmp_path / "new" / new[0], tmp_path / new[0])
    assert states == [dict.fromkeys(new[number:], "new") for number in reversed(range(len(new)))]


@pytest.mark.parametrize(("flags", "named"), [
    (["--out", "m.xml"], "m.xml"), (["--model", "gone.pth"], "gone.pth"), (["--model", "m.onnx"], "m.onnx")])
def test_what_cannot_be_exported_is_one_line(run, flags, named):
    code, _, err = run(export, *flags)
    assert code == 2 and named in err.splitlines()[-1] and "Traceback" not in err, err


def test_the_agreement_shows_a_wrong_model(exported):
    model, _ = load_model(exported / "model.pth")
    images = random_images(2, 3, *SIZE)
    assert export.agreement(model, exported / "model.onnx", images) > 0.999
    model.head.conv_seg.bias[0] += 100
    assert export.agreement(model, exported / "model.onnx", images) < 0.999


def test_checking_an_export_downloads_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in ("streets", "voc", "pet", "camvid"):
        facts = {"config": {"dataset": dataset, "data_root": str(tmp_path)}}
        for num_bands in (3, 5):
            images, origin = export.real_images(facts, (28, 42), num_bands)
            assert images.shape == (4, num_bands, 28, 42) and "streets" in origin
    assert not list(tmp_path.iterdir())


# --- hubconf.py -------------------------------------------------------------------------------------------
HUB = """
import os, sys, types
import numpy as np, torch
names = ("datasets", "utils", "config", "evaluate", "models", "models.heads", "engine", "model")
theirs = {name: types.ModuleType(name) for name in names}
sys.modules.update(theirs)
before, path = dict(sys.modules), list(sys.path)
segmenter = torch.hub.load(sys.argv[1], "segmenter", sys.argv[2], source="local")
exported = torch.hub.load(sys.argv[1], "segmenter", sys.argv[4], source="local", protocol="whole")
assert all(sys.modules[name] is module for name, module in before.items()) and sys.path == path
ours = [name for name, module in sys.modules.items() if name not in before
        and (getattr(module, "__file__", None) or "").startswith(sys.argv[1] + os.sep)
        and ".venv" not in module.__file__]
assert ours in ([], ["hubconf"]), ours
from_file = segmenter.predict(sys.argv[3])
from_array = segmenter.predict(np.zeros((20, 31, 3), np.uint8))
assert exported.predict(sys.argv[3]).shape == from_file.shape == (45, 61)
assert from_array.shape == (20, 31) and from_file.dtype == np.uint8
assert [name for name, _ in segmenter.classes] == ["background", "class 1", "class 2"]
try:
    segmenter.predict(np.zeros((20, 31, 4), np.uint8))
except Exception as error:
    print("refused:", type(error).__name__)
"""


PICKLED = """
import os, pickle, sys
import torch
root, image = sys.argv[1:3]
for name in sys.argv[3:]:
    segmenter = torch.hub.load(root, "segmenter", name, source="local", tta="flip")
    want = segmenter.predict(image)
    os.chdir("/")
    pickled = pickle.dumps(segmenter)
    again = pickle.loads(pickled)
    assert str(again) == str(segmenter) and (again.predict(image) == want).all()
    os.chdir(sys.path[0])
    try:
        segmenter.predict("gone.png")
    except Exception as error:
        assert "gone.png" in str(pickle.loads(pickle.dumps(error)))
    with open(name, "ab") as file:
        file.write(b" ")
    try:
        pickle.loads(pickled)
    except Exception as error:
        print("refused:", error)
"""


def test_a_pickled_segmenter_opens_its_file_again(trained, exported, tmp_path):
    """As processes need it that are spawned; the classes of hubconf are in none of their modules."""
    names = ["model.pth", "model.onnx", "model.xml"]
    for name in (*names, "model.bin"):
        shutil.copy(exported / name, tmp_path)
    (tmp_path / "program.py").write_text(PICKLED)
    done = subprocess.run([sys.executable, "program.py", str(ROOT), trained[0] / "images/00.png", *names],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert all(name in line for name, line in zip(names, refusals, strict=True)), done.stdout


def test_threads_may_load_at_the_same_time(exported):
    before, path = dict(sys.modules), list(sys.path)
    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(torch.hub.load, str(ROOT), "segmenter", str(exported / "model.pth"),
                             source="local") for _ in range(3)]
    assert all([name for name, _ in load.result().classes] == ["background", "class 1", "class 2"]
               for load in loads)
    assert sys.path == path and all(sys.modules[name] is module for name, module in before.items())


@pytest.mark.long
def test_three_lines_in_another_program_that_has_modules_of_the_same_names(trained, exported, tmp_path):
    """In a process of its own, which imports torch and ONNX Runtime anew."""
    files = [ROOT, exported / "model.pth", trained[0] / "images/00.png", exported / "model.onnx"]
    done = subprocess.run([sys.executable, "-c", HUB, *map(str, files)], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "refused: InputError"
