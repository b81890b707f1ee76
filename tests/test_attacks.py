"""A few attacks (tests/attacks.py has all of them), and the forms that files are checked by."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny, write_folder

from dataio import schema
import train
import visualize
from checkpoint import load_model, pack_checkpoint
from config import FIELDS, RECIPES, InputError, TrainConfig, names, one_line, recipe_settings, script_parser
from dataio.feature_cache import CachedDataset, EntryFile
from inference.backends import keep_private
from inference.predictor import Protocol, make_protocol

CLASSES = [("a", (1, 2, 3)), ("b", (4, 5, 6)), ("c", (7, 8, 9))]


QUICK = (
    "flags_train flags_infer_image checkpoint_classes checkpoint_protocol checkpoint_of_spec tensors pickles "
    "backbones json_metrics damaged_mask wrong_formats no_files class_names file_names streams limits"
)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="attacks use what Linux has: /dev/full, fork")


@on_linux
def test_attacks_are_survived():
    """Slow, since its process imports torch and trains what is attacked."""
    command = [sys.executable, "tests/attacks.py", "--each", "1", "--seed", "5", "--family", *QUICK.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 not survived" in done.stdout.splitlines()[-1], done.stdout[-3000:]


@on_linux
@pytest.mark.long
def test_ten_attacks_of_every_family_are_survived():
    command = [sys.executable, "tests/attacks.py", "--each", "10", "--seed", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_is_written_is_as_its_form_says():
    """A form that refuses what this version writes would lose work."""
    packed = pack_checkpoint(tiny(), CLASSES, (28, 28), config=dataclasses.asdict(TrainConfig()), epoch=3)
    packed["metrics"] = dict(miou=math.nan, loss=math.inf, dice=0.5)
    assert schema.check(schema.CHECKPOINT, packed, "m.pth") is packed
    assert schema.fault(schema.SPEC, packed["spec"]) == ""
    for kind, tta in (("whole", ""), ("slide", "ms,flip"), ("tile", "flip")):
        protocol = make_protocol(kind, tta, (56, 70))
        assert schema.fault(schema.PROTOCOL, protocol._asdict()) == ""
    assert set(schema.PROTOCOL) == {f"{name}?" for name in Protocol._fields} - {"window?"} | {"window"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settings_of_every_recipe_are_as_their_form_says(recipe):
    settings = dataclasses.asdict(TrainConfig(**recipe_settings(dict(recipe=recipe)), recipe=recipe))
    assert schema.settings(settings) == ""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    assert schema.settings(listed) == ""  # as JSON has them


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_takes_its_choices_and_refuses_other_types(name):
    field = FIELDS[name]
    many = field.type is tuple
    for choice in names(field.metadata["kind"]) if "kind" in field.metadata else ():
        assert schema.fault_of_setting(field, [choice] if many else choice) == ""
    for junk in (None, {}, [[]], math.nan, b"x", torch.zeros(1), "a\nb", object):
        if not (junk is math.nan and field.type is str):
            assert schema.fault_of_setting(field, junk), (name, junk)


@pytest.mark.parametrize(
    ("form", "value", "wrong"),
    [
        (schema.SIZE, [5, 0], "[1]: 0 is no integer from 1 to 65535"),
        (schema.SIZE, [5], ": a list does not have 2 entries"),
        (schema.SIZE, 5, ": 5 is no list"),
        (schema.integer(0, 9), True, ": True is no integer from 0 to 9"),
        (schema.integer(0, 9), 2.0, ": 2.0 is no integer from 0 to 9"),
        (schema.number, math.inf, ": inf is no finite number"),
        (schema.number, 10**400, None),
        (schema.score, math.nan, ""),
        (schema.score, math.inf, ": inf is no finite number"),
        (schema.loss, math.inf, ""),
        (schema.loss, None, ""),
        (schema.loss, "x", ": 'x' is no finite number"),
        (schema.score, None, ""),
        (schema.class_list, [["a", [1, 2, 256]]], "[0][1][2]: 256 is no integer from 0 to 255"),
        (schema.class_list, [], ": 0 classes, and 1 to 254 can be"),
        (schema.class_list, [["a", [0, 0, 0]]] * 255, ": 255 classes, and 1 to 254 can be"),
        (schema.class_list, [["a\nb", [0, 0, 0]]], None),
        ({str: schema.number}, {"x": 1, 5: 2}, ": the key 5 is no text"),
        ({"a": int, "b?": str}, {"a": 1}, ""),
        ({"a": int, "b?": str}, {"b": "x"}, ": a is missing"),
        ({"a": int, "b?": str}, {"a": 1, "b": 2}, ".b: 2 is no str"),
        ({"a": int}, {"a": 1, "later": object()}, ""),
        (frozenset({"x"}), ["x"], ": a list is none of x"),
    ],
)
def test_what_is_wrong_is_named(form, value, wrong):
    found = schema.fault(form, value)
    assert (found == wrong) if wrong is not None else (found and "\n" not in found and len(found) < 200)
    if found:
        with pytest.raises(InputError, match="^m.pth was made by hand or is damaged: [^:. ]"):
            schema.check(form, value, "m.pth")


def test_errors_are_one_line_whatever_they_hold():
    assert one_line("a\nb\x1b[31m\udce9é名") == r"a\nb\x1b[31m\udce9é名"
    assert len(one_line("x" * 10**6)) < 1300


def test_what_a_checkpoint_could_not_hold_is_refused_before_training(tmp_path, run):
    flags = ["--recipe", "demo", "--train-images", "4", "--epochs", "1", "--out-dir", str(tmp_path / "a\nb")]
    code, _, err = run(train, *flags)
    assert code == 2 and "no checkpoint can hold config.out_dir: '" in err and "is no text of" in err
    assert not list(tmp_path.rglob("*.pth"))


# --- what no failure may cost -----------------------------------------------------------------------------
@pytest.mark.plots
@pytest.mark.parametrize("part", ["plot_run", "side_by_side"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, run, monkeypatch, part):
    def broken(*args):
        raise ValueError("no such font\nanywhere")

    monkeypatch.setattr(visualize, part, broken)
    data = write_folder(tmp_path / "data", count=4)
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        data,
        "--backbone",
        "vit_tiny",
        "--weights",
        "none",
        "--head",
    ]
    flags += [
        "bn",
        "--imgsz",
        28,
        28,
        "--epochs",
        2,
        "--workers",
        0,
        "--device",
        "cpu",
        "--out-dir",
        tmp_path,
    ]
    code, text, err = run(train, *flags)
    assert code == 0 and "best epoch" in text and (tmp_path / "best_model_iou.pth").exists()
    assert err.count("warning: ") == 2 and r"no such font\nanywhere" in err and "Traceback" not in err


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    classes = [("$\\foo$", (0, 0, 0)), ("caf\udce9 $", (9, 9, 200))]
    visualize.plot_per_class_iou([0.5, math.nan], classes, tmp_path / "iou.png")
    visualize.plot_confusion(torch.eye(2).numpy(), classes, tmp_path / "confusion.png")
    assert visualize.legend(classes).shape[2] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    packed = pack_checkpoint(tiny(), CLASSES, (28, 28))
    key = sorted(packed["model"])[5]
    packed["model"][key].view(-1)[-1] = value
    torch.save(packed, tmp_path / "m.pth")
    with pytest.raises(InputError, match=f"m.pth: {key} holds values that are no numbers"):
        load_model(tmp_path / "m.pth")


# --- limits of the machine --------------------------------------------------------------------------------
def items(count=4, side=100):
    """Return a list as a dataset of images."""
    return [
        (torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(side, side, dtype=torch.uint8), "x")
    ] * count


def test_a_cache_that_was_cut_off_is_named(tmp_path):
    files = {"map 1": EntryFile(tmp_path / "map.bin", 3, (4, 5), torch.bfloat16)}
    files["map 1"].create({})
    dataset = SimpleNamespace(samples=[], augments=None, seed=0)
    cached = CachedDataset(dataset, files, None, 1)
    cached.check()
    with open(tmp_path / "map.bin", "r+b") as file:
        file.truncate(7)
    with pytest.raises(InputError, match="map.bin was cut off or removed: go on with --resume"):
        cached.check()


# --- one line, once ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("3", False)])
def test_of_many_processes_one_names_the_wrong_flag(tmp_path, monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    parser = script_parser("text")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--nonsense\nx"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and (r"error: unrecognized arguments: --nonsense\nx" in err) == printed
    assert (tmp_path / "error.json").exists() == printed
    if printed:
        content = json.loads((tmp_path / "error.json").read_text())["message"]
        assert content["message"] in err and content["extraInfo"]["timestamp"].isdecimal()


def test_nothing_reports_that_it_is_used():
    keep_private()
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
