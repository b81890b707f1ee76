"""One attack of every family (tests/attacks.py has all of them), and the forms that files are checked by."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny

import schema
from checkpoint import pack_checkpoint
from config import FIELDS, RECIPES, TrainConfig, names, one_line, recipe_settings
from config import InputError
from inference.predictor import Protocol, make_protocol

CLASSES = [("a", (1, 2, 3)), ("b", (4, 5, 6)), ("c", (7, 8, 9))]


def test_one_attack_of_every_family_is_survived():
    command = [sys.executable, "tests/attacks.py", "--each", "1", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 not survived" in done.stdout.splitlines()[-1], done.stdout[-3000:]


@pytest.mark.long
def test_ten_attacks_of_every_family_are_survived():
    command = [sys.executable, "tests/attacks.py", "--each", "10", "--seed", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_is_written_is_as_its_form_says():
    """A form that refuses what this version writes would lose work."""
    packed = pack_checkpoint(tiny(), CLASSES, (28, 28), config=dataclasses.asdict(TrainConfig()), epoch=3)
    packed["metrics"] = dict(miou=math.nan, loss=None, dice=0.5)
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
