"""Checkpoints of every version, heads alone, averages of weights, and scores that survive a file."""
import copy
import dataclasses
import json
import math
import random
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from attacks import same_run
from conftest import build, call, load, random_images, refused, tiny, write_folder
from test_scripts import registered_options
from torch.nn.functional import interpolate
from tqdm import tqdm

import config
import engine
import evaluate
import export
import train
import utils
from checkpoint import (Run, data_options, hash_backbone, load_head, load_model, pack_checkpoint,
                        random_state, read_checkpoint, restore_random_state)
from config import InputError
from dataio.readers import Sample
from losses import Criterion
from model import ModelSpec
from models.backbones import build_backbone
from models.baselines import BASELINES
from models.heads import HEADS, BNHead, Reads
from models.upsampling import pixel_loss

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder data set of six images."""
    return write_folder(tmp_path_factory.mktemp("data"), count=6)


def flags_of(data, out, *more):
    """Return the flags of a run of two short epochs."""
    base = ["--dataset", "folder", "--data-root", data, "--imgsz", 30, 44, "--epochs", 2, "--batch-size", 4]
    return [*base, "--workers", 0, "--out-dir", out, *more]


def history_of(out):
    """Return the rows of history.jsonl."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def equal_states(first, second):
    """Return whether two state dicts are the same, bit for bit."""
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


# --- what a run reports is what its file scores -------------------------------------------------------------
QUICK = ["bn", "split-detail", "linear", "mask", "detail", "split"]  # with all registered options
NAMES = [*QUICK, *(name for name in (*HEADS, *BASELINES) if name not in QUICK)]


@pytest.mark.parametrize("options", [
    *(dict(head=head) for head in ("detail", "split", "mask")),
    *(dict(arch=arch) for arch in BASELINES if not arch.startswith("segformer_b")),
    dict(arch="segformer_b0")], ids=str)
def test_loading_draws_no_random_numbers(options, tmp_path):
    """As a teacher, or for an evaluation in between; what is built after it is random as ever."""
    model = tiny(**options) if "head" in options else build(unfreeze="all", **options)
    classes = [("ground", (0, 0, 0)), ("roof", (1, 1, 1)), ("pool", (2, 2, 2))]
    torch.save(pack_checkpoint(model, classes, (28, 42)), tmp_path / "model.pth")
    before = torch.get_rng_state()
    loaded, _ = load_model(tmp_path / "model.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_states(loaded.state_dict(), model.state_dict())
    assert all(value.any() for value in torch.nn.Linear(5, 7).parameters())


@pytest.mark.parametrize("number", [
    pytest.param(number, id=name, marks=() if name in QUICK else pytest.mark.long)
    for number, name in enumerate(NAMES)])
def test_the_best_file_is_the_model_that_was_validated(number, data, tmp_path, run, monkeypatch):
    """Whatever is wrong between training and file (a cache, a buffer, an average) shows as other logits; the
    best mIoU of history.jsonl is evaluate.py's on best_model_iou.pth.
    """
    name, original, images, validated = NAMES[number], engine.evaluate, random_images(2, 3, 30, 44), []

    def validate(model, *args, **options):
        result = original(model, *args, **options)
        with torch.no_grad():
            validated.append(model(images))
        return result

    monkeypatch.setattr(engine, "evaluate", validate)
    monkeypatch.setitem(utils.PRECISIONS, "auto", lambda device: None)
    options = registered_options(number, leave_out=("--loss", "--class-weights") if name == "mask" else ())
    precision = utils.PRECISIONS[options[options.index("--amp") + 1]]
    more = ["--backbone", "vit_tiny", "--head", name] if name in HEADS else ["--arch", name]
    more += ["--weights", "none", "--unfreeze", "all", "--lr", 0.003, "--val-fraction", 0.5]
    code, _, err = run(train, *flags_of(data, tmp_path, *more, "--normalize", "none", *options))
    assert code == 0, err
    monkeypatch.setitem(utils.PRECISIONS, "auto", precision)
    best = tmp_path / "best_model_iou.pth"
    code, _, err = run(evaluate, "--model", best, "--batch-size", 4, "--out-dir", tmp_path)
    assert code == 0, err
    model, checkpoint = load_model(best)
    row = max(history_of(tmp_path), key=lambda row: row["val_miou"])
    assert checkpoint["epoch"] == row["epoch"] and checkpoint["metrics"]["miou"] == row["val_miou"]
    with torch.no_grad():
        assert torch.allclose(model(images), validated[row["epoch"] - 1], atol=1e-4)
    scored = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert scored["miou"] == pytest.approx(row["val_miou"], abs=3e-3)  # a tie or two may fall otherwise
    assert [row["iou"] for row in scored["per_class"]] == pytest.approx(row["per_class_iou"], abs=6e-3)


class DemandingHead(BNHead):
    """Reads tokens and images, brings its own loss and scores, and copies a block of the backbone."""

    reads = Reads(tokens=(4,), image=True)

    @classmethod
    def build(cls, backbone, spec):
        head = cls(backbone.channels, spec.num_classes)
        head.block, head.prefix = copy.deepcopy(backbone.blocks[-1]), backbone.prefix_tokens
        head.special = torch.nn.Linear(head.prefix * backbone.channels[-1], spec.num_classes)
        head.stem = torch.nn.Conv2d(3, spec.num_classes, 7, stride=7, padding=3)
        return head

    def forward(self, features):
        tokens = features.tokens[4]  # (B, 1 + h * w, D), un-normed
        assert features.image.shape[-2:] == features.size
        special = self.special(self.block(tokens)[:, :self.prefix].flatten(1))  # (B, K)
        fine = self.stem(features.image)
        coarse = super().forward(features) + special[..., None, None]
        return dict(logits=interpolate(coarse, size=fine.shape[-2:], mode="bilinear") + fine, fine=fine)

    def loss(self, output, targets, geometry):
        _, terms, _ = pixel_loss(Criterion("ce"), output["logits"], geometry, targets["mask"])
        return {**terms, "extra": output["fine"].float().square().mean()}

    def scores(self, output, targets, geometry):
        return {"labeled": ((targets["mask"] != 255).sum(), targets["mask"].numel())}


@pytest.mark.long
def test_a_head_that_sees_the_backbone_and_the_image_trains_scores_and_exports(data, tmp_path, run,
                                                                             monkeypatch):
    monkeypatch.setitem(HEADS, "demanding", DemandingHead)
    registered = config.registered
    monkeypatch.setattr(config, "registered", lambda file, registry: (
        dict.fromkeys(HEADS, "") if registry == "HEADS" else registered(file, registry)))
    monkeypatch.setitem(utils.PRECISIONS, "auto", lambda device: None)
    flags = flags_of(data, tmp_path, "--backbone", "vit_tiny", "--head", "demanding")
    code, _, err = run(train, *flags)
    assert code == 0, err
    rows, best = history_of(tmp_path), tmp_path / "best_model_iou.pth"
    for row in rows:
        assert row["val_loss"] == pytest.approx(row["val_loss_ce"] + row["val_loss_extra"], rel=1e-5)
        assert row["val_labeled"] == 1.0
    assert run(evaluate, "--model", best, "--out-dir", tmp_path)[0] == 0
    scored = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert scored["miou"] == pytest.approx(max(row["val_miou"] for row in rows), abs=3e-3)
    code, text, err = run(export, "--model", best, "--format", "onnx")
    assert code == 0 and "100.000 %" in text, err  # of the pixels are equal
    model, _ = load_model(best)
    assert model(random_images(1, 3, 17, 50)).shape == (1, 3, 17, 50)
    code, _, err = run(train, *flags, "--cache-features", tmp_path / "cache")
    names = {path.name.rpartition("_")[0] for path in (tmp_path / "cache").glob("*.bin")}
    assert code == 0 and names == {"image", "map_2", "map_3", "map_4", "map_5", "tokens_4", "mask"}, err


@pytest.mark.parametrize("backbone", ["vit_tiny", "dinov2_vits14", "timm/vit_small_patch16_dinov3"])
def test_tokens_are_those_that_enter_the_block(backbone, hub_cache):
    net, outputs = build(backbone=backbone).eval().backbone, []
    images = torch.randn(2, 3, 2 * net.size_divisor, 3 * net.size_divisor)
    net.blocks[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        tokens = net(images, (3,))[1][3]
        assert torch.equal(tokens, outputs[0]) and net.prefix_tokens >= 1
        assert tokens.shape[1] == net.prefix_tokens + 6 and net(images)[1] == {}  # the hook is gone


# --- a run whose average is scored ------------------------------------------------------------------------
class Average:
    """An exponential moving average of a model's weights."""

    def __init__(self, model):
        self.weights = copy.deepcopy(model.state_dict())

    def update(self, model):
        for name, value in model.state_dict().items():
            self.weights[name].copy_(value if not value.is_floating_point() else
                                     0.7 * self.weights[name] + 0.3 * value)

    def state_dict(self):
        return self.weights

    def load_state_dict(self, weights):
        self.weights = copy.deepcopy(weights)


def make_run(data, out, resume=False):
    """Return a Run as train.py makes it, and its training and validation batches."""
    settings = config.resolve(dict(dataset="folder", data_root=str(data), backbone="vit_tiny", head="bn",
                                   unfreeze="all", imgsz=(28, 42), epochs=2, batch_size=2, workers=0,
                                   out_dir=str(out), resume=resume))
    source = load("folder", data)
    utils.seed_everything(settings.seed)
    net = tiny(unfreeze="all")
    optimizer = engine.OPTIMIZERS["adamw"](engine.parameter_groups(net, 1e-3, 1e-3))
    state = engine.TrainState(net, optimizer, utils.Precision("off", torch.device("cpu")))
    run = Run(state, dataclasses.asdict(settings), source, utils.RunFolder(out, resume))
    run.stop = SimpleNamespace(asked=0)
    batches = [train.make_loader(dataset, 2, 0) for dataset in train.build_datasets(settings, source)]
    return run, *batches


def train_with_average(data, out, stop_in=0, resume=False):
    """Train two epochs, scoring an average of the weights; a signal comes in the validation of `stop_in`.

    Returns {(what, epoch): weights} of the `live` and the `average` ones when an epoch was validated.
    """
    run, train_batches, val_batches = make_run(data, out, resume)
    state, weights = run.state, {}
    average = state.keep("average", Average(state.model))
    if resume:
        run.restore(read_checkpoint(out / "last.pth"))
    objective = engine.Objective(state.model, Criterion("ce"))

    def after_step(progress):
        average.update(state.model)
        run.after_step(progress)

    for epoch in range(len(state.history) + 1, 3):
        train_batches.start(epoch - 1, state.progress["batches"] if state.progress else 0)
        scores = engine.train_one_epoch(objective, tqdm(train_batches, disable=True), state, lambda step: 1.0,
                                        after_step=after_step)
        weights["live", epoch] = copy.deepcopy(state.model.state_dict())
        weights["average", epoch] = copy.deepcopy(average.weights)
        run.stop.asked = signal.SIGTERM if epoch == stop_in else 0
        try:
            with state.scored_with(average):
                val_scores, matrix = engine.evaluate(state.model, tqdm(val_batches, disable=True),
                                                     state.precision, objective, after_batch=run.after_batch)
                row = dict(epoch=epoch, **state.learning_rates(), seconds=1.0,
                           **{f"train_{name}": value for name, value in scores.items()},
                           **{f"val_{name}": value for name, value in val_scores.items()},
                           per_class_iou=utils.finite(matrix.per_class_iou().tolist()))
                run.end_epoch(row, matrix.counts)
        except utils.Stopped:
            break
        finally:
            assert equal_states(state.model.state_dict(), weights["live", epoch])
    return weights


@pytest.mark.parametrize("stop_in", [1, 2])
def test_averaged_weights_are_scored_and_the_live_ones_are_resumed(data, tmp_path, stop_in):
    weights = train_with_average(data, tmp_path / "straight")
    best = read_checkpoint(tmp_path / "straight/best_model_iou.pth")
    assert equal_states(best["model"], weights["average", best["epoch"]])
    assert not equal_states(best["model"], weights["live", best["epoch"]])
    stopped = tmp_path / "stopped"
    before = train_with_average(data, stopped, stop_in)
    last = read_checkpoint(stopped / "last.pth")
    assert last["epoch"] == stop_in - 1 and len(before) == 2 * stop_in
    assert equal_states(last["model"], before["live", stop_in])
    assert equal_states(last["kept"]["average"], before["average", stop_in])
    train_with_average(data, stopped, resume=True)
    same_run(tmp_path / "straight", stopped)
    assert equal_states(read_checkpoint(stopped / "last.pth")["model"], weights["live", 2])


# --- what a run keeps in its files -------------------------------------------------------------------------
@pytest.fixture
def new_run(data, tmp_path):
    """A Run as train.py makes it, before its first step."""
    settings = config.resolve(dict(dataset="folder", data_root=str(data), out_dir=str(tmp_path)))
    net = tiny(unfreeze="all")
    optimizer = engine.OPTIMIZERS["adamw"](engine.parameter_groups(net, 1e-3, 1e-3))
    state = engine.TrainState(net, optimizer, utils.Precision("off", torch.device("cpu")))
    return Run(state, dataclasses.asdict(settings), load("folder", data), utils.RunFolder(tmp_path))


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    def draw():
        devices = [torch.rand(1, device="cuda").item()] if torch.cuda.is_available() else []
        return random.random(), random.gauss(0, 1), np.random.random(), torch.rand(1).item(), *devices

    torch.save(random_state(), tmp_path / "state.pth")
    first, second = draw(), draw()
    restore_random_state(torch.load(tmp_path / "state.pth"))
    assert draw() == first and draw() == second and not {*first} & {*second}


def test_a_run_without_what_is_kept_now_does_not_resume(new_run, tmp_path):
    new_run.save()
    new_run.state.keep("average", tiny())
    with refused("last.pth", "average"):
        new_run.restore(read_checkpoint(tmp_path / "last.pth"))


def test_an_earlier_run_is_moved_before_an_epoch_is_saved_halfway(new_run, tmp_path):
    for name in ("best_model_iou.pth", "last.pth"):
        (tmp_path / name).write_text("earlier")
    new_run.save()
    assert {path.name for path in tmp_path.glob("previous/*/*")} == {"best_model_iou.pth", "last.pth"}
    assert read_checkpoint(tmp_path / "last.pth") and (tmp_path / "config.json").exists()
    assert not (tmp_path / "best_model_iou.pth").exists()


def test_processes_that_read_a_run_before_and_after_a_save_do_not_resume(new_run, tmp_path, monkeypatch):
    new_run.save()
    monkeypatch.setattr(utils, "all_gather", lambda value: [value, (value[0], value[1] + 1)])
    with refused("last.pth", "start them again"):
        new_run.restore(read_checkpoint(tmp_path / "last.pth"))


def test_a_run_whose_files_were_removed_says_so_at_its_end(new_run, tmp_path, capsys):
    new_run.warn_of_changed_files()
    assert not capsys.readouterr().out
    new_run.data.splits["val"][0] = Sample(tmp_path / "gone.png", tmp_path / "gone.png")
    new_run.warn_of_changed_files()
    assert capsys.readouterr().out.startswith("warning: files")


ROW = dict(epoch=1, lr=1e-3, seconds=1.0, train_loss=1.0, train_loss_ce=1.0, train_accuracy=0.5,
           train_miou=0.2, train_images_per_s=9.0, train_data_wait=0.1, val_loss=1.2, val_loss_ce=1.2,
           val_accuracy=0.4, val_miou=0.2, val_dice=0.3, per_class_iou=[0.4, 0.2, None])


@pytest.mark.parametrize("value", [np.float64(0.5), torch.tensor(0.5), math.nan], ids=str)
def test_a_new_score_of_another_type_costs_no_checkpoint(value, new_run, tmp_path):
    """numpy's float is a float to all but the reader of the file."""
    row, counts = dict(ROW, val_new=value), torch.zeros(3, 3)
    if torch.is_tensor(value):
        with pytest.raises(TypeError):
            new_run.end_epoch(row, counts)
        assert not list(tmp_path.glob("*.pth"))
        return
    new_run.end_epoch(row, counts)
    for name in ("last.pth", "best_model_iou.pth"):
        assert read_checkpoint(tmp_path / name)["metrics"]["new"] == pytest.approx(value, nan_ok=True)


def test_the_code_that_is_noted_is_the_one_that_ran(new_run, tmp_path, monkeypatch):
    """Not the one that lies there when the run first saves."""
    before = utils.code_hash(*utils.training_modules())
    monkeypatch.setattr(utils, "code_hash", lambda *modules: "edited")
    new_run.save()
    assert json.loads((tmp_path / "config.json").read_text())["code"] == before
    assert torch.load(tmp_path / "last.pth")["code"] == before


# --- versions -----------------------------------------------------------------------------------------------
OLD_SPEC = dict(arch="dinov2", backbone="vit_tiny", head="bn", normalize="auto", num_classes=3,
                layers=[2, 3, 4, 5])


@pytest.fixture(scope="module")
def packed():
    """A checkpoint of a small model."""
    return pack_checkpoint(tiny(), CLASSES, (28, 28))


@pytest.mark.parametrize("missing", [["normalize"], ["normalize", "arch"]], ids=str)  # in the first versions
def test_checkpoints_of_earlier_versions_load(missing, packed, tmp_path):
    spec = {name: value for name, value in OLD_SPEC.items() if name not in missing}
    torch.save(dict(packed, spec=spec), tmp_path / "old.pth")
    model, checkpoint = load_model(tmp_path / "old.pth")
    assert checkpoint["spec"] == model.spec == tiny().spec
    assert torch.equal(model(random_images(1, 3, 20, 30)), tiny().eval()(random_images(1, 3, 20, 30)))


def test_a_checkpoint_of_another_architecture_of_an_earlier_version_loads(tmp_path):
    old = dict(arch="segformer_b0", backbone="", head="", num_classes=3, layers=[])
    net = build(arch="segformer_b0").eval()
    torch.save(dict(pack_checkpoint(net, CLASSES, (28, 28)), spec=old), tmp_path / "old.pth")
    assert load_model(tmp_path / "old.pth")[0].spec == net.spec


def test_files_of_a_run_of_earlier_versions_load_and_resume(data, tmp_path, run):
    """Their entries, written out: nothing is kept beside the weights, settings are fewer, the fingerprint of
    the data is made of other facts.
    """
    source = load("folder", data)
    net = tiny(unfreeze="all")
    optimizer = engine.OPTIMIZERS["adamw"](engine.parameter_groups(net, 1e-3, 1e-3))
    settings = dict(dataset="folder", data_root=str(data), val_fraction=0.2, classes=[], resplit=False,
                    ignore_background=False, seed=0, recipe="", imgsz=[28, 42], augment=["flip"], workers=0,
                    arch="dinov2", backbone="vit_tiny", weights="none", layers=[], head="bn",
                    normalize="auto",
                    unfreeze="all", loss="ce", optimizer="adamw", lr=1e-3, backbone_lr_scale=1.0,
                    weight_decay=1e-3, scheduler="none", epochs=1, batch_size=2, accumulate=1,
                    save_head_only=False, compile=False, amp="off", device="cpu", resume=False,
                    out_dir=str(tmp_path))
    metrics = {name.removeprefix("val_"): ROW[name] for name in ROW if name.startswith("val_")}
    best = dict(
        format="dinoseg", version=1, classes=[[name, list(color)] for name, color in source.classes],
        imgsz=[28, 42], spec=OLD_SPEC,
        model=net.state_dict(), epoch=1, config=settings, metrics=metrics, processes=1,
        **dict(source.fingerprints(), data_fingerprint="0123456789abcdef"))
    numbers = torch.Generator().get_state()
    last = dict(
        best, optimizer=optimizer.state_dict(), scaler={}, step=2, history=[ROW], counts=torch.ones(3, 3),
        progress=None, origins={}, device="cpu", precision="float32", torch="2.0.0", hub_code=None,
        code="0123456789abcdef",
        random=dict(python=json.dumps([3, [*range(624), 624], None]), torch=numbers, devices=[],
                    numpy=["MT19937", list(range(624)), 624, 0, 0.0]))
    torch.save(best, tmp_path / "best_model_iou.pth")
    torch.save(last, tmp_path / "last.pth")
    model, checkpoint = load_model(tmp_path / "best_model_iou.pth")
    assert checkpoint["metrics"] == metrics and equal_states(model.state_dict(), net.state_dict())
    code, out, err = run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path)
    assert code == 0 and "0123456789abcdef" in out, err  # the code was another
    rows = history_of(tmp_path)
    assert rows[0] == ROW and rows[1]["epoch"] == 2 and rows[1]["train_loss"] > 0
    resumed = read_checkpoint(tmp_path / "last.pth")
    assert resumed["step"] == 2 + 3 and not equal_states(resumed["model"], net.state_dict())


@pytest.mark.parametrize(("changes", "named"), [
    (dict(version=2), "version"),
    (dict(spec=dict(OLD_SPEC, no_such_option=4)), "version"),
    (dict(spec=dict(OLD_SPEC, head="no-such-head")), "version"),
    (dict(spec=dict(OLD_SPEC, arch="no_such_arch")), "version"),
    (dict(spec=[1]), "spec"),
    (dict(spec=dict(OLD_SPEC, num_classes="3")), "spec.num_classes"),
    (dict(spec=dict(OLD_SPEC, layers=["1"])), "spec.layers"),
    (dict(spec=dict(OLD_SPEC, backbone="")), "spec.backbone"),
    (dict(imgsz=[0, 4]), "imgsz.0"),
    (dict(classes=[["a", [0, 0, 0]]]), "1 classes"),
    (dict(format="x"), "train.py"),
], ids=lambda value: value if isinstance(value, str) else next(iter(value)))
def test_checkpoints_that_do_not_load_are_named(changes, named, packed, tmp_path):
    torch.save({**packed, **changes}, tmp_path / "model.pth")
    with refused(tmp_path / "model.pth", named):
        read_checkpoint(tmp_path / "model.pth")


def test_an_input_error_is_never_taken_for_a_value_error():
    assert not issubclass(InputError, (ValueError, OSError, RuntimeError, TypeError, KeyError))


def test_every_option_of_a_model_is_stored_and_comes_back(tmp_path):
    net = tiny(head="unet-skip", layers=(1, 4), normalize="none", split_blocks=2)
    torch.save(pack_checkpoint(net, CLASSES, (28, 28)), tmp_path / "model.pth")
    stored = read_checkpoint(tmp_path / "model.pth")["spec"]
    assert isinstance(stored, ModelSpec) and stored == net.spec != tiny().spec
    assert (stored.layers, stored.normalize, stored.split_blocks) == ((1, 4), "none", 2)


def test_the_data_of_a_checkpoint_are_those_of_its_run():
    settings = dict(dataset="folder", data_root="a", val_fraction=0.4, classes=["x", "y"], lr=3.0)
    options = data_options({"config": settings})
    assert (options.dataset, options.data_root, options.val_fraction) == ("folder", "a", 0.4)
    assert data_options({"config": settings}, data_root="b").data_root == "b"
    other = data_options({"config": settings}, "voc")
    assert (other.dataset, other.data_root, other.classes) == ("voc", "data", ())
    with refused("--dataset"):
        data_options({})


# --- heads alone --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """A weights file of vit_tiny: a backbone that can be had again."""
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(build_backbone("vit_tiny", "none", 4).net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def head_run(data, backbone_file, tmp_path_factory):
    """The folder of a run that saved its head alone, and of one that saved all."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("alone", ["--save-head-only"]), ("all", [])):
        flags = flags_of(data, folder / name, "--backbone", "vit_tiny", "--weights", backbone_file, *more)
        call(train, *flags)
    return folder / "alone", folder / "all"


def test_a_head_alone_is_the_model_on_its_backbone_and_on_no_other(head_run, tmp_path, run, backbone_file):
    images, folders = random_images(2, 3, 30, 44), (tmp_path / "alone", tmp_path / "all")
    for source, target in zip(head_run, folders, strict=True):
        shutil.copytree(source, target)
    best = folders[0] / "best_model_iou.pth"
    assert 10 * best.stat().st_size < (folders[1] / "best_model_iou.pth").stat().st_size
    assert run(evaluate, "--model", best, "--out-dir", folders[0])[0] == 0
    for epochs in (2, 3):
        models = [load_model(folder / "last.pth")[0] for folder in folders]
        assert torch.equal(*(model(images) for model in models))
        if epochs == 2:
            for folder in folders:
                assert run(train, "--resume", "--epochs", 3, "--out-dir", folder)[0] == 0
    assert len(history_of(folders[0])) == 3

    content, state = backbone_file.read_bytes(), torch.load(backbone_file)
    try:
        state["norm.bias"] = state["norm.bias"] + 1e-3
        torch.save(state, backbone_file)
        for script, *more in ((evaluate, "--model", best), (train, "--resume", "--epochs", 4)):
            code, _, err = run(script, *more, "--out-dir", folders[0])
            assert code == 2 and "vit_tiny" in err and "SHA-256" in err and err.count("\n") == 1
        backbone_file.unlink()
        code, _, err = run(evaluate, "--model", best, "--out-dir", folders[0])
        assert code == 2 and str(best) in err and str(backbone_file) in err and err.count("\n") == 1
    finally:
        backbone_file.write_bytes(content)


def test_a_mask_token_does_not_count_in_a_backbones_hash():
    state = tiny().backbone.state_dict()
    assert hash_backbone(state) == hash_backbone({**state, "net.mask_token": torch.ones(3)})
    assert hash_backbone(state) != hash_backbone({**state, "net.norm.bias": state["net.norm.bias"] + 1})


def test_a_head_starts_from_a_trained_one(head_run, data, tmp_path, run, backbone_file):
    """With a learning rate of almost nothing, the head that was trained comes out again."""
    flags = flags_of(data, tmp_path, "--backbone", "vit_tiny", "--weights", backbone_file, "--epochs", 1)
    for folder in head_run:  # a head alone, and a model with its backbone
        file = folder / "last.pth"
        code, _, err = run(train, *flags, "--head-weights", file, "--lr", 1e-12, "--seed", 5)
        assert code == 0, err
        heads = [load_model(path)[0].head.direct.conv_seg.weight for path in (file, tmp_path / "last.pth")]
        assert torch.allclose(*heads, atol=1e-6)
    for wrong, named in (
        (["--head", "linear"], "--head"),
        (["--weights", "none"], "SHA-256"),
        (["--layers", "0", "1", "2", "3"], "--layers"),
        (["--normalize", "none"], "--normalize"),
        (["--head-weights", "nowhere.pth"], "nowhere.pth"),
    ):
        code, _, err = run(train, *flags, "--head-weights", file, *wrong, "--out-dir", tmp_path / "none")
        assert code == 2 and named in err and err.count("\n") == 1, err
        assert not (tmp_path / "none").exists()


def test_a_trained_head_is_taken_with_all_of_its_options(tmp_path, monkeypatch):
    """Those of a head that is written later too."""
    fields = [("act", str, config.setting("gelu", "model", "", affects="head")),
              ("rate", float, config.setting(0.0, "model", "", affects="head"))]
    options = dataclasses.make_dataclass("Options", fields, bases=(config.ModelOptions,))
    monkeypatch.setattr(config, "FIELDS", {**config.FIELDS, **{
        field.name: field for field in dataclasses.fields(options)}})
    own = [(field.name, field.type, dataclasses.field(default=field.default))
           for field in dataclasses.fields(ModelSpec) if field.name not in options.__dataclass_fields__]
    stored = dataclasses.make_dataclass("Spec", own, bases=(options,))
    net, path = tiny(), tmp_path / "head.pth"
    torch.save(pack_checkpoint(net, CLASSES, (28, 28)), path)
    plain = stored(**dataclasses.asdict(net.spec))
    with mock.patch("checkpoint.read_spec", lambda *_: plain):
        for changes in (dict(act="tanh"), dict(rate=0.5)):
            net.spec = dataclasses.replace(plain, **changes)
            with refused(path, *(f"--{name}" for name in changes)):
                load_head(net, path)
        net.spec = dataclasses.replace(plain, split_blocks=1)  # it copies no blocks
        assert [name for name, _ in load_head(net, path)["classes"]] == ["background", "cat", "dog"]


@pytest.mark.parametrize("flags", [["--weights", "none"], ["--unfreeze", "1"]], ids=str)
def test_a_head_is_not_saved_alone_where_its_backbone_is_lost(flags, data, tmp_path, run, backbone_file):
    flags = ["--backbone", "vit_tiny", "--weights", backbone_file, "--save-head-only", *flags]
    code, _, err = run(train, *flags_of(data, tmp_path / "out", *flags))
    assert code == 2 and "--save-head-only" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
