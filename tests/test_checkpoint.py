"""Checkpoints of every version, whole messages, and scores that survive the way through a file."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import build, random_images, tiny, write_folder

import config
import engine
import evaluate
import export
import train
import utils
from checkpoint import (NUMBERS, data_options, hash_backbone, load_head, load_model, pack_checkpoint,
                        read_checkpoint)
from config import InputError, setting
from model import ModelSpec
from models.backbones import build_backbone
from models.baselines import BASELINES
from models.heads import HEADS, BNHead

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]
QUICK = {"bn", "split-detail", "segformer_b0"}


# --- what a run reports is what its file scores ------------------------------------------------------------
MODELS = {name: ["--backbone", "vit_tiny", "--head", name] for name in HEADS}
MODELS |= {name: ["--arch", name] for name in BASELINES}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_the_best_file_is_the_model_that_was_validated(name, tmp_path, run, monkeypatch):
    """Whatever is wrong between training and file (a cache, a buffer, an average) shows as other logits; the
    best mIoU of history.jsonl is evaluate.py's on best_model_iou.pth.
    """
    original, images, validated = engine.evaluate, random_images(2, 3, 30, 44), []

    def validate(model, *args, **options):
        result = original(model, *args, **options)
        with torch.no_grad():
            validated.append(model.logits(images).pixels())
        return result

    monkeypatch.setattr(engine, "evaluate", validate)
    monkeypatch.setitem(utils.PRECISIONS, "auto", lambda device: None)
    data = write_folder(tmp_path / "data", count=6)
    flags = ["--dataset", "folder", "--data-root", data, "--weights", "none", "--unfreeze", "all"]
    flags += ["--lr", 0.003, "--imgsz", 30, 44, "--epochs", 2, "--batch-size", 4, "--workers", 0]
    flags += ["--val-fraction", 0.5]
    code, _, err = run(train, *flags, *MODELS[name], "--normalize", "none", "--out-dir", tmp_path)
    assert code == 0, err
    best = tmp_path / "best_model_iou.pth"
    code, _, err = run(evaluate, "--model", best, "--batch-size", 4, "--out-dir", tmp_path)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_miou"])
    with torch.no_grad():
        logits = load_model(tmp_path / "best_model_iou.pth")[0](images)
    assert torch.allclose(logits, validated[best["epoch"] - 1], atol=1e-4)
    scored = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert scored["miou"] == pytest.approx(best["val_miou"], abs=3e-3)  # a tie or two may fall otherwise
    assert [row["iou"] for row in scored["per_class"]] == pytest.approx(best["per_class_iou"], abs=6e-3)


@pytest.mark.parametrize("value", [np.float64(0.5), torch.tensor(0.5)], ids=["numpy", "tensor"])
def test_a_new_score_of_another_type_costs_no_checkpoint(value, tmp_path, run, monkeypatch):
    """numpy's float is a float to all but the reader of the file."""
    original = engine.evaluate

    def validate(model, *args, **options):
        scores, matrix = original(model, *args, **options)
        return dict(scores, new=value), matrix

    monkeypatch.setattr(engine, "evaluate", validate)
    data = write_folder(tmp_path / "data", count=4)
    flags = ["--dataset", "folder", "--data-root", data, "--weights", "none", "--backbone", "vit_tiny"]
    flags += ["--imgsz", 28, 28, "--epochs", 1, "--workers", 0, "--out-dir", tmp_path / "out"]
    if torch.is_tensor(value):
        with pytest.raises(TypeError, match="Tensor is not JSON"):
            run(train, *flags)
        assert not list((tmp_path / "out").glob("*.pth"))
        return
    code, _, err = run(train, *flags)
    assert code == 0, err
    for name in ("last.pth", "best_model_iou.pth"):
        assert read_checkpoint(tmp_path / "out" / name)["metrics"]["new"] == 0.5


def test_the_code_that_is_noted_is_the_one_that_ran(tmp_path, run, monkeypatch):
    """Not the one that lies there when the run first saves."""
    original, before = engine.evaluate, utils.hash_code(*NUMBERS)

    def edited(*args, **options):
        monkeypatch.setattr(utils, "hash_code", lambda *files: "edited")
        return original(*args, **options)

    monkeypatch.setattr(engine, "evaluate", edited)
    data = write_folder(tmp_path / "data", count=4)
    flags = ["--dataset", "folder", "--data-root", data, "--weights", "none", "--backbone", "vit_tiny"]
    assert run(train, *flags, "--imgsz", 28, 28, "--epochs", 1, "--workers", 0, "--out-dir", tmp_path)[0] == 0
    assert json.loads((tmp_path / "config.json").read_text())["code"] == before
    assert torch.load(tmp_path / "last.pth")["code"] == before


# --- heads that want more ----------------------------------------------------------------------------------
class DemandingHead(BNHead):
    """Reads tokens and images, returns two maps, brings its own loss, and copies a block of the backbone."""

    token_blocks = (4,)
    sees_image = True

    @classmethod
    def build(cls, backbone, spec):
        head = cls(backbone.channels, spec.num_classes)
        head.block, head.prefix = backbone.blocks[-1], backbone.prefix_tokens
        width = head.block.norm1.weight.shape[0]
        head.special = torch.nn.Linear(head.prefix * width, spec.num_classes)
        head.stem = torch.nn.Conv2d(3, spec.num_classes, 7, stride=7, padding=3)
        return head

    def forward(self, features, size):
        tokens = features.tokens[4]  # (B, 1 + h * w, D), un-normed
        assert features.images.shape[-2:] == size
        special = self.special(self.block(tokens)[:, :self.prefix].flatten(1))  # (B, K)
        return super().forward(features, size) + special[..., None, None], self.stem(features.images)

    def logits(self, output, geometry):
        coarse, fine = output
        coarse = torch.nn.functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        return super().logits(coarse + fine, geometry)

    def loss(self, output, masks, geometry, criterion):
        loss, terms, preds = super().loss(output, masks, geometry, criterion)
        extra = output[1].float().square().mean()
        return loss + extra, {**terms, "extra": extra}, preds


def test_a_head_that_sees_the_backbone_and_the_image_trains_scores_and_exports(tmp_path, run, monkeypatch):
    monkeypatch.setitem(HEADS, "demanding", DemandingHead)
    registered = config.registered
    monkeypatch.setattr(config, "registered", lambda file, registry: (
        dict.fromkeys(HEADS, "") if registry == "HEADS" else registered(file, registry)))
    monkeypatch.setitem(utils.PRECISIONS, "auto", lambda device: None)
    data = write_folder(tmp_path / "data", count=6)
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--head", "demanding"]
    flags += ["--imgsz", 30, 44, "--epochs", 2, "--batch-size", 3, "--workers", 0, "--out-dir", tmp_path]
    code, _, err = run(train, *flags)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["val_loss"] == pytest.approx(row["val_loss_ce"] + row["val_loss_extra"], rel=1e-5)
    assert run(evaluate, "--model", tmp_path / "best_model_iou.pth", "--out-dir", tmp_path)[0] == 0
    scored = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert scored["miou"] == pytest.approx(max(row["val_miou"] for row in rows), abs=3e-3)
    code, text, err = run(export, "--model", tmp_path / "best_model_iou.pth", "--format", "onnx")
    assert code == 0 and "it agrees with PyTorch in 100.000 %" in text, err
    model, _ = load_model(tmp_path / "best_model_iou.pth")
    assert model(random_images(1, 3, 17, 50)).shape == (1, 3, 17, 50)
    code, text, err = run(train, *flags, "--cache-features", tmp_path / "cache")
    kept = {path.name.rpartition("_")[0] for path in (tmp_path / "cache").glob("*.bin")}
    assert code == 0 and kept == {"image", "map_2", "map_3", "map_4", "map_5", "tokens_4", "masks"}, err


@pytest.mark.parametrize("backbone", ["vit_tiny", "dinov2_vits14", "timm/vit_small_patch16_dinov3"])
def test_tokens_are_those_that_enter_the_block(backbone, hub_cache):
    net = build(backbone=backbone).eval()
    images = torch.randn(2, 3, 2 * net.backbone.size_divisor, 3 * net.backbone.size_divisor)
    seen = []
    net.backbone.blocks[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features = net.backbone.features(images, token_blocks=(3,))
    assert torch.equal(features.tokens[3], seen[0]) and features.images is images
    assert features.tokens[3].shape[1] == net.backbone.prefix_tokens + 6 and net.backbone.prefix_tokens >= 1
    with torch.no_grad():
        assert net.backbone.features(images).tokens == {}  # the hook is gone


# --- versions ----------------------------------------------------------------------------------------------
def packed(**changes):
    """Return a checkpoint of a small model with some entries changed."""
    return {**pack_checkpoint(tiny(), CLASSES, (28, 28)), **changes}


def test_checkpoints_of_earlier_versions_load(tmp_path):
    state = packed()
    for spec in (
        dict(arch="dinov2", backbone="vit_tiny", head="bn", num_classes=3, layers=[2, 3, 4, 5]),
        dict(backbone="vit_tiny", head="bn", num_classes=3, layers=[2, 3, 4, 5]),  # the first ones
    ):
        torch.save(dict(state, spec=spec), tmp_path / "old.pth")
        model, checkpoint = load_model(tmp_path / "old.pth")
        assert checkpoint["spec"] == model.spec == tiny().spec
        assert torch.equal(model(random_images(1, 3, 20, 30)), tiny().eval()(random_images(1, 3, 20, 30)))
    old = dict(arch="segformer_b0", backbone="", head="", num_classes=3, layers=[])
    net = build(arch="segformer_b0").eval()
    torch.save(dict(pack_checkpoint(net, CLASSES, (28, 28)), spec=old), tmp_path / "old.pth")
    assert load_model(tmp_path / "old.pth")[0].spec == net.spec


OTHER_VERSION = "{path} was written by another version of this code: use that version"




def spec(**changes):
    """Return the stored spec of a small model with some entries changed."""
    return dict(dataclasses.asdict(tiny().spec), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(version=2), OTHER_VERSION),
        (dict(spec=spec(no_such_option=4)), OTHER_VERSION),
        (dict(spec=spec(head="no-such-head")), OTHER_VERSION),
        (dict(spec=spec(arch="no_such_arch")), OTHER_VERSION),
        (dict(spec=[1]), "spec"),
        (dict(spec=spec(num_classes="3")), "spec.num_classes"),
        (dict(spec=spec(layers=["1"])), "spec.layers"),
        (dict(spec=spec(backbone="")), "spec.backbone"),
        (dict(imgsz=[0, 4]), "imgsz.0"),
        (dict(classes=[["a", [0, 0, 0]]]), "{path} names 1 classes, but has 3"),
        (dict(format="x"), "{path} is not a checkpoint of train.py (best_model_iou.pth, last.pth)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_whole_messages_of_checkpoints_that_do_not_load(changes, message, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(packed(**changes), path)
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert text.startswith(str(path)) and message.format(path=path) in text and "\n" not in text


def test_an_input_error_is_never_taken_for_a_value_error():
    assert not issubclass(InputError, (ValueError, OSError, RuntimeError, TypeError, KeyError))


def test_every_option_of_a_model_is_stored_and_comes_back(tmp_path):
    net = tiny(head="unet-skip", layers=(1, 4), normalize="none")
    torch.save(pack_checkpoint(net, CLASSES, (28, 28)), tmp_path / "model.pth")
    spec = read_checkpoint(tmp_path / "model.pth")["spec"]
    assert isinstance(spec, ModelSpec) and spec == net.spec
    assert (spec.head, spec.layers, spec.normalize, spec.num_classes) == ("unet-skip", (1, 4), "none", 3)


def test_the_data_of_a_checkpoint_are_those_of_its_run():
    config = dict(dataset="folder", data_root="a", val_fraction=0.4, classes=["x", "y"], lr=3.0)
    checkpoint = {"config": config}
    options = data_options(checkpoint)
    assert (options.dataset, options.data_root, options.val_fraction) == ("folder", "a", 0.4)
    assert data_options(checkpoint, data_root="b").data_root == "b"
    other = data_options(checkpoint, "voc")
    assert (other.dataset, other.data_root, other.classes) == ("voc", "data", ())
    with pytest.raises(InputError, match="does not say what it was trained on"):
        data_options({})


# --- heads alone ------------------------------------------------------------------------------------------
@pytest.fixture
def backbone_file(tmp_path):
    """A weights file of vit_tiny: a backbone that can be had again."""
    path = tmp_path / "backbone.pth"
    torch.save(build_backbone("vit_tiny", "none", 4).net.state_dict(), path)
    return path


def test_a_head_alone_is_the_whole_model_on_its_backbone_and_on_no_other(tmp_path, run, backbone_file):
    data, whole, alone = write_folder(tmp_path / "data", count=6), tmp_path / "whole", tmp_path / "alone"
    flags = ["--dataset", "folder", "--data-root", data, "--imgsz", 30, 44, "--epochs", 2, "--workers", 0]
    flags += ["--backbone", "vit_tiny", "--weights", backbone_file]
    assert run(train, *flags, "--out-dir", whole)[0] == 0
    flags.append("--save-head-only")
    assert run(train, *flags, "--epochs", 1, "--scheduler", "none", "--out-dir", tmp_path / "other")[0] == 0
    assert run(train, *flags, "--out-dir", alone)[0] == 0
    best, images = alone / "best_model_iou.pth", random_images(2, 3, 30, 44)
    assert 10 * best.stat().st_size < (whole / "best_model_iou.pth").stat().st_size
    models = [load_model(folder / "last.pth")[0] for folder in (whole, alone)]
    assert torch.equal(*(model(images) for model in models))
    assert run(evaluate, "--model", best, "--out-dir", alone)[0] == 0

    code, text, _ = run(train, "--resume", "--epochs", 3, "--out-dir", alone)
    assert code == 0 and "resumed after epoch 2" in text
    assert run(train, "--resume", "--epochs", 3, "--out-dir", whole)[0] == 0
    models = [load_model(folder / "last.pth")[0] for folder in (whole, alone)]
    assert torch.equal(*(model(images) for model in models))

    state = torch.load(backbone_file)
    torch.save({**state, "mask_token": torch.ones(1, 3)}, tmp_path / "more.pth")
    state["norm.bias"] = state["norm.bias"] + 1e-3
    torch.save(state, backbone_file)
    code, _, err = run(evaluate, "--model", best, "--out-dir", alone)
    assert code == 2 and "holds a head for vit_tiny with other weights" in err and err.count("\n") == 1
    assert "with other weights" in run(train, "--resume", "--epochs", 4, "--out-dir", alone)[2]
    backbone_file.unlink()
    code, _, err = run(evaluate, "--model", best, "--out-dir", alone)
    said = f"{best} holds a head alone: the weights of its backbone, {backbone_file}, are not here"
    assert code == 2 and said in err


def test_a_mask_token_is_no_part_of_a_backbones_hash():
    state = tiny().backbone.state_dict()
    assert hash_backbone(state) == hash_backbone({**state, "net.mask_token": torch.ones(3)})
    assert hash_backbone(state) != hash_backbone({**state, "net.norm.bias": state["net.norm.bias"] + 1})


def test_a_head_starts_from_a_trained_one(tmp_path, run, backbone_file):
    """With a learning rate of almost nothing, the head that was trained comes out again."""
    data = write_folder(tmp_path / "data", count=6)
    flags = ["--dataset", "folder", "--data-root", data, "--imgsz", 30, 44, "--epochs", 1, "--workers", 0]
    flags += ["--backbone", "vit_tiny", "--weights", backbone_file]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(train, *flags, "--save-head-only", "--out-dir", first)[0] == 0
    for file in (first / "last.pth", second / "last.pth"):  # a head alone, and a whole model
        start = ["--head-weights", file, "--lr", 1e-12, "--seed", 5, "--out-dir", second]
        code, text, err = run(train, *flags, *start)
        assert code == 0 and "trained on background, class 1" in text, err
        heads = [load_model(folder / "last.pth")[0].head.conv_seg.weight for folder in (first, second)]
        assert torch.allclose(*heads, atol=1e-6)
    for wrong, said in (
        (["--head", "linear"], "was trained with --head detail, and this run has linear"),
        (["--weights", "none"], "with other weights"),
        (["--layers", "0", "1", "2", "3"], "was trained with --layers (2, 3, 4, 5), and this run has (0, 1"),
        (["--normalize", "none"], "was trained with --normalize auto, and this run has none"),
        (["--head-weights", "nowhere.pth"], "nowhere.pth does not exist"),
    ):
        code, _, err = run(train, *flags, "--head-weights", first / "last.pth", *wrong, "--out-dir", tmp_path)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_trained_head_is_taken_with_all_of_its_options(tmp_path):
    """Those of a head that is written later too."""
    fields = [("act", str, setting("gelu", "model", "", affects="head")),
              ("rate", float, setting(0.0, "model", "", affects="head"))]
    spec = dataclasses.make_dataclass("Spec", fields, bases=(ModelSpec,))
    net, path = tiny(), tmp_path / "head.pth"
    torch.save(pack_checkpoint(net, CLASSES, (28, 28)), path)
    plain = net.spec
    for options in (dict(act="tanh"), dict(rate=0.5)):
        net.spec = spec(**dataclasses.asdict(plain), **options)
        with (mock.patch("checkpoint.read_spec", lambda stored, path: spec(**dataclasses.asdict(plain))),
              pytest.raises(InputError, match=f"--{list(options)[0]} (gelu|0.0)")):
            load_head(net, path)
    net.spec = dataclasses.replace(plain, split_blocks=1)  # it copies no blocks
    assert load_head(net, path) == ["background", "cat", "dog"]


@pytest.mark.parametrize(
    ("flags", "said"), [(["--weights", "none"], "one is random"), (["--unfreeze", "1"], "one trains")]
)
def test_a_head_is_not_saved_alone_where_its_backbone_is_lost(flags, said, tmp_path, run, backbone_file):
    data = write_folder(tmp_path / "data", count=4)
    flags = ["--backbone", "vit_tiny", "--weights", backbone_file, "--save-head-only", *flags]
    code, _, err = run(train, "--dataset", "folder", "--data-root", data, *flags, "--out-dir", tmp_path)
    assert code == 2 and said in err and err.count("\n") == 1
