"""Settings: defaults < recipe < saved run < flags; names are known or listed."""

import dataclasses
import json

import pytest

from config import CLASSES, RECIPES, InputError, TrainConfig, parse_train_args, resolve, spare_colour


def test_explicit_flags_beat_the_recipe_and_the_recipe_beats_the_defaults():
    settings = resolve(parse_train_args(["--recipe", "demo", "--lr", "0.25", "--imgsz", "98", "140"]))
    assert settings.lr == 0.25 and settings.imgsz == (98, 140)
    assert settings.backbone == RECIPES["demo"][1]["backbone"] and settings.amp == TrainConfig.amp
    same_as_default = resolve(parse_train_args(["--recipe", "demo", "--unfreeze", "0"]))
    assert same_as_default.unfreeze == 0  # given, though it is the default of the flag


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_made_of_known_settings_and_json(name):
    assert set(RECIPES[name][1]) <= {field.name for field in dataclasses.fields(TrainConfig)}
    settings = dataclasses.asdict(resolve({"recipe": name}))
    saved = json.loads(json.dumps(settings))
    assert dataclasses.asdict(resolve({}, saved)) == settings


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--imgsz", "0", "640"], "'0' is not a whole number of at least 1"),
        (["--imgsz", "640"], "2 arguments"),
        (["--imgsz", "-5", "3"], "imgsz"),
        (["--dataset", "coco"], "voc"),
        (["--head", "big"], "linear"),
        (["--backbone", "resnet"], "dinov2_vitg14_reg"),
        (["--recipe", "x"], "person-bn"),
        (["--epoch", "3"], "--epoch"),
        (["--lr", "nan"], "above 0"),
        (["--lr", "fast"], "above 0"),
        (["--unfreeze", "-1"], "unfreeze"),
        (["--val-fraction", "1"], "between 0 and 1"),
        (["--seed", "1.5"], "at least 0"),
        (["--amp", "fp8"], "bf16"),
    ],
)
def test_wrong_flags_exit_with_2_and_list_what_is_known(capsys, flags, reason):
    with pytest.raises(SystemExit) as stop:
        parse_train_args(flags)
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_help_lists_every_flag_with_help_and_every_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = capsys.readouterr().out
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)]
    assert all(flag in text for flag in flags) and all(name in text for name in RECIPES)
    assert len(flags) + 1 <= 35
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_a_resumed_run_may_grow_but_not_change_shape():
    saved = dataclasses.asdict(resolve({"recipe": "demo"}))
    grown = resolve({"epochs": 99, "workers": 0, "resume": True}, saved)
    assert grown.epochs == 99 and grown.backbone == "vit_tiny" and grown.resume
    assert resolve({"recipe": "demo", "resume": True}, saved).epochs == saved["epochs"]
    with pytest.raises(InputError, match="--head is 'linear', but the run to resume has 'bn'"):
        resolve({"head": "linear"}, saved)


def test_augment_none_is_empty():
    assert resolve(parse_train_args(["--augment", "none"])).augment == ()
    assert resolve(parse_train_args(["--augment", "crop", "flip"])).augment == ("crop", "flip")


def test_class_tables_have_distinct_names_and_colours():
    for classes in CLASSES.values():
        assert len({name for name, _ in classes}) == len({colour for _, colour in classes}) == len(classes)
    assert len({spare_colour(id) for id in range(20)}) == 20 and spare_colour(200) != (0, 0, 0)
