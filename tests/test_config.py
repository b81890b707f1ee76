"""Settings: defaults < recipe < saved run < flags; names are known or listed."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, refused, tiny
from torch import nn

import config
import train
import utils
from config import (BUDGETS, CACHED_COSTS, FIELDS, LIVE_COSTS, PASS_PIXELS, RECIPES, REGISTRIES, InputError,
                    ModelOptions, TrainConfig, count_of, fields_affecting, has_meaning, names,
                    parse_train_args, resolve)
from dataio.transforms import AUGMENTS
from datasets import DATASETS
from engine import lr_lambda
from model import ModelSpec
from models.heads import HEADS


def test_explicit_flags_beat_the_recipe_and_the_recipe_beats_the_defaults():
    settings = resolve(parse_train_args(["--recipe", "demo", "--lr", "0.25", "--imgsz", "98", "140"]))
    assert settings.lr == 0.25 and settings.imgsz == (98, 140)
    assert settings.backbone == RECIPES["demo"][1]["backbone"] and settings.amp == TrainConfig.amp
    assert resolve(parse_train_args(["--augment", "none"])).augment == ()
    same_as_default = resolve(parse_train_args(["--recipe", "demo", "--unfreeze", "0"]))
    assert same_as_default.unfreeze == 0  # given, though it is the default of the flag


def test_a_budget_is_a_set_of_defaults_and_that_of_a_folder_with_cache_features():
    budget = resolve(parse_train_args(["--budget", "20", "--lr", "0.25"]))
    assert budget.lr == 0.25 and budget.unfreeze == "all" and budget.layer_decay < 1
    cached = ["--dataset", "folder", "--cache-features"]
    alone, named = (resolve(parse_train_args([*flags, *cached])) for flags in ([], ["--budget", "5"]))
    assert alone == named and alone.budget == 5 and alone.unfreeze != "all"
    for flags in ("--epochs 3", "--steps 30", "--recipe person-bn"):
        assert not resolve(parse_train_args([*flags.split(), *cached])).budget
    assert not resolve(parse_train_args(["--dataset", "voc", "--cache-features"])).budget
    saved = json.loads(json.dumps(dataclasses.asdict(alone)))
    assert resolve({"cache_features": alone.cache_features}, saved) == alone
    for flags in ("--head mask", "--save-head-only"):
        assert resolve(parse_train_args([*cached, *flags.split()])).unfreeze == 0
    assert resolve(parse_train_args(["--budget", "5", "--head", "linear"])).layers == ()
    native = resolve(parse_train_args([*cached, "--train-scale", "native"]))
    assert not native.budget and native.unfreeze == 0
    for flags in ("--budget 5 --recipe demo", "--budget 5 --arch fcn_resnet50",
                  "--budget 5 --train-scale native", "--train-imgsz 14 14 --train-scale native"):
        with refused(flags.split()[0]):
            resolve(parse_train_args(flags.split()))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("minutes", BUDGETS)
@pytest.mark.parametrize("images", [20, 100, 367])
def test_a_budget_is_spent_whatever_the_number_of_images(minutes, images, cached):
    settings = resolve({"budget": minutes, **({"cache_features": "cache"} if cached else {})})
    budget, validation = BUDGETS[minutes], images // 4
    available, spent = budget.passes, budget.spend(images, validation, settings)
    step_cost, validation_cost = CACHED_COSTS
    if not cached:
        step_cost = LIVE_COSTS[0] * budget.train_pixels / PASS_PIXELS
        validation_cost = LIVE_COSTS[1] * budget.pixels / PASS_PIXELS
    passes = spent["epochs"] * validation * validation_cost
    passes += spent["steps"] * settings.batch_size * step_cost
    passes += (spent["cache_views"] * images + validation) * cached
    most = max(available, images * (step_cost + spent["cache_views"] + 1))  # each is trained on once
    assert 0.9 * available < passes < 1.1 * most and spent["steps"] % spent["epochs"] == 0
    many = budget.spend(10 ** 6, 10, settings)
    assert many["steps"] * settings.batch_size == pytest.approx(10 ** 6, rel=1e-3)


@pytest.mark.parametrize("minutes", BUDGETS)
@pytest.mark.parametrize("proportion", [0.75, 4 / 3, 1.0, 0.1, 20.0])
def test_the_sizes_of_a_budget_have_the_proportions_of_the_images(minutes, proportion):
    budget = BUDGETS[minutes]
    live, cached = budget.sizes(proportion, cached=False), budget.sizes(proportion, cached=True)
    assert cached["train_imgsz"] == ()
    for (height, width), pixels in ((live["imgsz"], budget.pixels), (cached["imgsz"], PASS_PIXELS),
                                    (live["train_imgsz"], budget.train_pixels)):
        assert height % 14 == width % 14 == 0
        assert height / width == pytest.approx(proportion, rel=0.15)
        assert height * width == pytest.approx(pixels, rel=0.15)


def test_what_trains_is_asked_of_the_model_not_of_unfreeze():
    """Adapters train although --unfreeze is 0."""
    model = tiny()
    model.backbone.pretrained = True
    frozen = TrainConfig(save_head_only=True)
    train.check_effects({"save_head_only": True}, frozen, model)
    with refused("--backbone-lr-scale"):
        train.check_effects({"backbone_lr_scale": 0.5}, TrainConfig(), model)
    attention = model.backbone.blocks[-1].attn
    attention.qkv = nn.Sequential(attention.qkv, nn.Linear(attention.qkv.out_features, 576))
    train.check_effects({"backbone_lr_scale": 0.5}, TrainConfig(), model)
    with refused("--save-head-only"):
        train.check_effects({"save_head_only": True}, frozen, model)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_made_of_known_settings_and_json(name):
    assert set(RECIPES[name][1]) <= {field.name for field in dataclasses.fields(TrainConfig)}
    settings = dataclasses.asdict(resolve({"recipe": name}))
    saved = json.loads(json.dumps(settings))
    assert dataclasses.asdict(resolve({}, saved)) == settings


@pytest.mark.parametrize(
    "flags",
    [
        "--imgsz 0 640", "--imgsz 640", "--imgsz -5 3", "--dataset coco", "--head big", "--backbone resnet",
        "--recipe x", "--epoch 3", "--lr nan", "--lr fast", "--unfreeze -1", "--val-fraction 1",
        "--seed 1.5", "--seed 4294967296", "--weight-decay -0.1", "--amp fp8", "--arch unet",
        "--loss ce+ce", "--loss nonsense", "--optimizer nonsense", "--fold 0/5", "--fold 6/5", "--fold 1/1",
        "--fold 1", "--fold a/b", "--fold 1/5/2", "--fold 5/-1", "--augment",
    ],
)
def test_wrong_flags_exit_with_2_and_are_named(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        parse_train_args(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in err.splitlines()[-1]


@pytest.mark.parametrize("name", [name for name in FIELDS if "kind" in FIELDS[name].metadata])
def test_a_wrong_name_is_answered_with_those_that_are_known(capsys, name):
    with pytest.raises(SystemExit):
        parse_train_args([config.flag(name), "nonsense"])
    err = capsys.readouterr().err
    assert all(known in err for known in names(FIELDS[name].metadata["kind"]))


# --- what an option says of itself ------------------------------------------------------------------------
@pytest.mark.parametrize("name", FIELDS)
def test_every_option_says_what_it_affects_and_where_it_has_meaning(name):
    saved, metadata = dataclasses.asdict(TrainConfig()), FIELDS[name].metadata
    assert metadata["affects"] in ("features", "head", "run", "nothing") and metadata["help"]
    if "only" in metadata:
        option, *values = metadata["only"]
        given = dataclasses.replace(TrainConfig(), **{option: values[0] if values else "something"})
        assert has_meaning(name, given)
        if values:
            known = FIELDS[option].metadata.get("choices") or names(FIELDS[option].metadata["kind"])
            assert set(values) <= {*known, "dinov2"} if option == "arch" else set(values) <= set(known)
        else:
            assert not has_meaning(name, TrainConfig()) and option in FIELDS
    config.check_resumed({name: saved[name]}, saved)
    if metadata["affects"] == "nothing" or metadata.get("may_grow"):
        config.check_resumed({name: "another value"}, saved)
    else:
        with pytest.raises(InputError, match=config.flag(name)):
            config.check_resumed({name: "another value"}, saved)


def test_options_of_a_model_affect_its_features_or_its_head():
    of_model = {field.name for field in dataclasses.fields(ModelOptions)}
    features, head = (set(fields_affecting(kind, ModelOptions)) for kind in ("features", "head"))
    assert features | head == of_model and not features & head


def test_split_blocks_belongs_to_the_heads_that_copy_blocks():
    backbone = tiny().backbone
    for name, head in HEADS.items():
        specs = [ModelSpec(num_classes=3, head=name, split_blocks=count) for count in (1, 2)]
        sizes = [sum(value.numel() for value in head.build(backbone, spec).parameters()) for spec in specs]
        assert has_meaning("split_blocks", TrainConfig(head=name)) == (sizes[0] != sizes[1]), name
        assert not has_meaning("split_blocks", TrainConfig(head=name, arch="fcn_resnet50"))


def test_help_lists_every_flag_and_every_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = capsys.readouterr().out
    assert all(config.flag(name) in text for name in FIELDS) and all(name in text for name in RECIPES)


def test_a_resumed_run_may_grow_but_not_change_shape():
    saved = dataclasses.asdict(resolve({"recipe": "demo"}))
    grown = resolve({"epochs": 99, "workers": 0, "resume": True}, saved)
    assert grown.epochs == 99 and grown.backbone == "vit_tiny" and grown.resume
    assert resolve({"recipe": "demo", "resume": True}, saved).epochs == saved["epochs"]
    with pytest.raises(InputError, match="--head .*linear.*bn"):
        resolve({"head": "linear"}, saved)
    with pytest.raises(InputError, match="--recipe .*voc-unet.*demo"):
        resolve({"recipe": "voc-unet", "resume": True}, saved)


def test_other_architectures_train_as_a_whole():
    plain = resolve(parse_train_args(["--arch", "fcn_resnet50"]))
    assert plain.unfreeze == "all" and plain.backbone_lr_scale == 1.0
    assert resolve(parse_train_args(["--arch", "fcn_resnet50", "--unfreeze", "0"])).unfreeze == 0


def test_a_recipe_with_another_architecture_keeps_its_data_and_steps():
    ours, other = resolve({"recipe": "voc-unet"}), resolve({"recipe": "voc-unet", "arch": "segformer_b0"})
    assert (other.unfreeze, other.backbone_lr_scale, other.head) == ("all", 1.0, TrainConfig.head)
    same = {"dataset", "imgsz", "loss", "optimizer", "lr", "scheduler", "epochs", "batch_size"}
    assert all(getattr(ours, name) == getattr(other, name) for name in same)
    back = resolve({"recipe": "pet-fcn", "arch": "dinov2"})
    assert (back.unfreeze, back.imgsz, back.weights, back.normalize) == (0, (64, 64), "auto", "auto")
    alike = resolve({"recipe": "pet-fcn", "arch": "segformer_b0"})
    assert (alike.weights, alike.normalize, alike.unfreeze) == ("none", "none", "all")


@pytest.mark.parametrize(
    "flags",
    [
        ["--augment", "none"],
        ["--arch", "fcn_resnet50", "--unfreeze", "0"],
        ["--recipe", "voc-unet", "--lr", "1e-3"],
        ["--recipe", "demo", "--arch", "segformer_b1"],
    ],
)
def test_a_run_resumes_with_its_own_flags_and_with_some_of_them(flags):
    saved = json.loads(json.dumps(dataclasses.asdict(resolve(parse_train_args(flags)))))
    again = dataclasses.asdict(resolve(parse_train_args([*flags, "--resume"]), saved))
    resumed = dataclasses.asdict(resolve(parse_train_args([*flags[:2], "--resume"]), saved))
    assert again == resumed == {**dataclasses.asdict(resolve(parse_train_args(flags))), "resume": True}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--dataset voc --classes a b", "--classes"),
        ("--dataset voc --unlabelled ignore", "--unlabelled"),
        ("--fold 1/5 --dataset camvid", "--fold .*--resplit"),
        ("--dataset voc --val-fraction 0.3", "--val-fraction .*--resplit"),
        ("--fold 1/5 --val-fraction 0.3 --dataset folder", "--val-fraction"),
        ("--aux-weight 0.4", "--aux-weight .*fcn_resnet50"),
        ("--aux-weight 0.4 --arch segformer_b0", "--aux-weight .*segformer_b0"),
        ("--steps 3 --epochs 4", "--steps 3 .*--epochs 3"),
        ("--steps 31", "--epochs 1"),
        ("--head-weights x --arch segformer_b0", "--head-weights .*segformer_b0"),
        ("--arch fcn_resnet50 --head unet", "--head .*dinov2.*fcn_resnet50"),
        ("--arch fcn_resnet50 --backbone vit_tiny", "--backbone "),
        ("--arch fcn_resnet50 --layers 1", "--layers "),
        ("--arch fcn_resnet50 --split-blocks 1", "--split-blocks .*fcn_resnet50"),
        ("--head bn --split-blocks 1", "--split-blocks .*--head split.*bn"),
        ("--augment none flip", "--augment none"),
        ("--balance", "--balance .*--train-scale native"),
        ("--cache-images", "--cache-images .*--train-scale native"),
        ("--cache-views 2", "--cache-views .*--cache-features"),
        ("--cache-features --augment crop", "--augment .*--cache-views"),
        ("--save-head-only --unfreeze 1", "--save-head-only"),
        ("--save-head-only --weights none", "--save-head-only"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, named):
    with pytest.raises(InputError, match=named):
        resolve(parse_train_args(flags.split()))


@pytest.mark.parametrize("flags", [
    "--head split --split-blocks 1 --backbone-lr-scale 0.5", "--unfreeze 1 --backbone-lr-scale 0.5",
    "--save-head-only", "--head split --save-head-only", "--arch fcn_resnet50 --aux-weight 0.5",
    "--arch fcn_resnet50 --backbone-lr-scale 0.5", "--cache-features --cache-views 2 --augment crop",
    "--train-scale native --balance --cache-images", "--dataset voc --resplit --fold 1/5"])
def test_flags_that_go_together_are_taken(flags):
    resolve(parse_train_args(flags.split()))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_names_on_the_command_line_are_those_of_the_registry(kind):
    file, registry = REGISTRIES[kind]
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert names(kind) == list(getattr(module, registry)) and names(kind)


WITHOUT_TORCH = """
import contextlib, io, runpy, sys
sys.modules["torch"] = None
for script in sys.argv[1:]:
    for flag, expected in (("--help", 0), ("--no-such-flag", 2)):
        sys.argv, text = [script, flag], io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        assert code == expected and "usage:" in text.getvalue(), (script, flag, text.getvalue())
"""


def test_help_and_wrong_flags_need_no_torch():
    scripts = [str(path) for path in ROOT.glob("*.py") if "utils.run_main(" in path.read_text()]
    command = [sys.executable, "-c", WITHOUT_TORCH, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(scripts) > 6 and done.returncode == 0, done.stderr


RECIPE_TABLE = {  # data set, model, unfreeze, loss, optimizer, schedule, size, batch, epochs
    "person-bn": "folder dinov2_vits14+bn 0 ce adamw none 640 8 30",
    "voc-unet": "voc dinov2_vitb14+unet 1 lovasz adamw none 518 2 8",
    "aeroscapes-deconv": "aeroscapes dinov2_vitb14+deconv 0 ce adam none 518 2 11",
    "pet-fcn": "pet fcn_resnet50 all ce adamw exponential 64 64 30",
    "pet-segformer": "pet segformer_b0 all ce adamw exponential 64 64 30",
    "cityscapes-fcn": "cityscapes fcn_resnet50 all ce adamw exponential 64 64 30",
    "cityscapes-segformer": "cityscapes segformer_b0 all ce adamw exponential 64 64 30",
    "drone-deeplab": "aeroscapes deeplabv3_resnet101 all focal+dice sgd onecycle 512 8 80",
    "voc-linear": "voc dinov2_vits14+bn 0 ce adamw linear 512 16 40",
    "voc-ms": "voc dinov2_vits14+bn 0 ce adamw linear 640 16 40",
    "demo": "streets vit_tiny+bn all ce adamw cosine 224 16 10",
}


def test_recipes_are_those_of_the_write_ups():
    lines = {}
    for name in RECIPE_TABLE:
        c = resolve({"recipe": name})
        model = f"{c.backbone}+{c.head}" if c.arch == "dinov2" else c.arch
        steps = (c.loss, c.optimizer, c.scheduler, c.imgsz[0], c.batch_size, c.epochs)
        lines[name] = " ".join(map(str, (c.dataset, model, c.unfreeze, *steps)))
    assert lines == RECIPE_TABLE
    drone = resolve({"recipe": "drone-deeplab"})
    assert drone.resplit and drone.accumulate == 2 and drone.weights == "auto" and drone.val_fraction == 0.2
    assert resolve({"recipe": "voc-unet"}).lr == resolve({"recipe": "aeroscapes-deconv"}).lr == 1e-4
    assert resolve({"recipe": "pet-fcn"}).normalize == "none"


def test_dinov2_recipes_follow_the_published_configurations():
    """dinov2_vits14_voc2012_{linear,ms}_config.py: 40,000 iterations of 16 images, AdamW 1e-3, decay 1e-4."""
    for name, scale, side in (("voc-linear", (0.5, 2.0), 512), ("voc-ms", (1.0, 3.0), 640)):
        c = resolve({"recipe": name})
        assert (c.steps, c.batch_size, c.lr, c.weight_decay) == (40_000, 16, 1e-3, 1e-4)
        crop = AUGMENTS[c.augment[0]]
        assert (crop.scale, crop.covers, crop.max_share, c.imgsz) == (scale, True, 0.75, (side, side))
        assert c.augment[1:] == ("flip", "photometric")
        factor = lr_lambda(c.scheduler, 40_000, 1000)
        steps = np.arange(40_000)  # mmcv: poly of power 1, whose first 1,500 steps are scaled from 1e-6 to 1
        wanted = (1 - steps / 40_000) * np.where(steps < 1500, 1 - (1 - steps / 1500) * (1 - 1e-6), 1)
        assert np.abs(wanted - [factor(step) for step in steps.tolist()]).max() < 1e-3
    assert resolve({"recipe": "voc-ms", "epochs": 3}).steps == 0  # three passes over the images
    assert resolve({"recipe": "voc-ms", "epochs": 3, "steps": 9}).steps == 9


def test_a_run_of_steps_keeps_its_epochs_when_resumed():
    saved = {**dataclasses.asdict(TrainConfig()), "steps": 60, "epochs": 3}
    with pytest.raises(InputError, match="--epochs .*60.*3"):
        resolve({"epochs": 4, "resume": True}, saved)
    assert resolve({"epochs": 3, "resume": True}, saved).steps == 60
    old = {name: value for name, value in saved.items() if name not in ("steps", "fold")}  # had no such flag
    for name, value in (("steps", 60), ("fold", (1, 3))):
        with pytest.raises(InputError, match=f"--{name} "):
            resolve({name: value, "resume": True}, old)


def test_class_tables_have_distinct_names_and_colors():
    tables = {name: classes for name, (_, classes) in DATASETS.items() if classes}
    for name, classes in tables.items():
        assert len({name for name, _ in classes}) == len(classes)
        twice = len(classes) - len({color for _, color in classes})
        assert twice == (name == "ade20k")  # whose own palette has one color twice
    counts = dict(voc=21, camvid=11, aeroscapes=12, pet=3, cityscapes=19, ade20k=150, streets=7)
    assert {name: len(tables[name]) for name in counts} == counts


def test_counts_are_of_the_right_number():
    assert [count_of(number, "mask") for number in (0, 1, 2)] == ["0 masks", "1 mask", "2 masks"]


# --- Ctrl-C while a script starts -------------------------------------------------------------------------
COMMANDS = [["train.py"], ["model.py"], ["evaluate.py"], ["infer_image.py", "--input", "a.png"],
            ["infer_video.py", "--input", "a.mp4"], ["export.py", "--format", "onnx"], ["check_data.py"],
            ["compare.py", "a"], ["demo.py"], ["-m", "tools.benchmark", "train"], ["-m", "tools.bands", "a"]]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of POSIX")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_ctrl_c_ends_a_script_that_still_imports_without_a_traceback(tmp_path, command):
    interrupted = "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(5)"
    (tmp_path / "torch.py").write_text(interrupted)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == -signal.SIGINT and done.stderr == ""


@pytest.mark.parametrize(("script", "handler", "imported", "ends"), [
    (ROOT / "train.py", signal.default_int_handler, False, True),
    (ROOT / "train.py", signal.default_int_handler, True, False),
    (ROOT / "train.py", signal.SIG_IGN, False, False),
    ("/elsewhere/train.py", signal.default_int_handler, False, False)],
    ids=["starts", "in main", "nohup", "another's"])
def test_ctrl_c_is_left_alone_where_it_is_not_ours(monkeypatch, script, handler, imported, ends):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    before = signal.signal(signal.SIGINT, handler)
    try:
        config.end_at_interrupts()
        assert signal.getsignal(signal.SIGINT) == (signal.SIG_DFL if ends else handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_main_and_in_programs_that_import_the_scripts_is_an_exception(capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        config.script_parser("text")  # not the start of a script
        assert signal.getsignal(signal.SIGINT) is before
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with pytest.raises(SystemExit) as stop:
            utils.run_main(lambda: signal.raise_signal(signal.SIGINT))
        assert stop.value.code == 130 and "stopped" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, before)
