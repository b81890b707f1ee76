"""The Segmenter at odd sizes, frozen and unfrozen parts, checkpoints that are not ours."""

import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, tiny

import model
from config import InputError
from checkpoint import load_model, pack_checkpoint
from losses import Criterion
from model import CachedSegmenter
from models.logits import pad, geometry_of

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


@pytest.mark.parametrize("head", ["bn", "linear"])
@pytest.mark.parametrize("size", [(1, 1), (14, 14), (15, 29), (56, 70), (101, 33)], ids=str)
def test_logits_have_the_size_of_the_images(head, size):
    net = tiny(head=head).eval()
    logits = net(random_images(2, 3, *size))
    assert logits.shape == (2, 3, *size) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_forward_equals_the_steps_written_out():
    net = tiny().eval()
    torch.nn.init.normal_(net.head.bn.weight)
    net.head.bn.running_mean.normal_()
    images = random_images(2, 3, 30, 45)
    with torch.no_grad():
        pixels = images.float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        padded = F.pad(pixels, (5, 6, 6, 6))  # 30 -> 42 and 45 -> 56, zeros, the odd pixel on the far side
        tokens = net.backbone.net.forward_intermediates(
            padded, indices=[2, 3, 4, 5], norm=True, intermediates_only=True
        )
        features = net.head.bn(torch.cat(tokens, 1))
        weight, bias = net.head.conv_seg.weight[:, :, 0, 0], net.head.conv_seg.bias
        logits = torch.einsum("bdhw,kd->bkhw", features, weight) + bias.view(1, -1, 1, 1)
        logits = F.interpolate(logits, size=(42, 56), mode="bilinear", align_corners=False)
        assert torch.allclose(net(images), logits[:, :, 6:36, 5:50], atol=1e-5)


def test_padding_is_centerd_and_only_where_needed():
    images = torch.ones(1, 1, 28, 30)
    geometry = geometry_of((28, 30), 14)
    padded, (_, (tall, wide), top, left) = pad(images, geometry), geometry
    assert padded.shape == (1, 1, tall, wide) == (1, 1, 28, 42) and (top, left) == (0, 6)
    assert torch.equal(padded[..., top : top + 28, left : left + 30], images) and padded.sum() == images.sum()


def test_compiled_parts_give_the_same_logits_and_names(monkeypatch):
    compiled = []

    def compile(function, *args, **options):  # the compiler itself takes half a minute
        compiled.append(function)
        return function

    net = tiny()
    names, images = list(net.state_dict()), random_images(1, 3, 30, 43)
    want = net.eval()(images)
    monkeypatch.setattr(torch, "compile", compile)
    net.compile_parts()
    assert len(compiled) == 2 and torch.equal(net(images), want) and list(net.state_dict()) == names


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("cached", [False, True])
def test_a_compiled_step_is_a_step(cached, tmp_path):
    """As --compile trains: blocks, copies of blocks and the head, on images and on cached tokens."""
    masks, found = torch.randint(0, 3, (4, 30, 43)), []
    for compiled in (False, True):
        net = tiny(head="split-detail", unfreeze=1)
        trained = CachedSegmenter(net, (30, 43)) if cached else net
        if compiled:
            trained.compile_parts()
        for seed in (0, 1):  # what one step leaves behind must not reach the next
            images = random_images(4, 3, 30, 43, seed=seed)
            with torch.no_grad():
                inputs = net.compute_parts(net.cached_parts(), images) if cached else images
            net.zero_grad()
            loss, _, _ = trained.train().loss(inputs, masks, Criterion("ce"))
            loss.backward()
        found.append([loss, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for want, got in zip(*found, strict=True):
        assert torch.allclose(want, got, rtol=1e-3, atol=1e-5)


# --- what trains ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, 2, "all"])
def test_unfreeze_trains_what_it_says_and_nothing_else(unfreeze):
    net = tiny(unfreeze=unfreeze)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    net(random_images(2, 3, 28, 42)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    blocks = {int(name.split(".")[3]) for name in changed if name.startswith("backbone.net.blocks.")}
    assert {"head.bn.running_mean", "head.conv_seg.weight"} <= changed
    assert blocks == {0: set(), 2: {4, 5}, "all": set(range(6))}[unfreeze]
    assert ("backbone.net.pos_embed" in changed) == (unfreeze == "all")
    assert net.backbone.net.norm.weight.requires_grad == (unfreeze != 0)


def test_default_layers_are_the_last_four_and_the_last_one_for_linear():
    assert tiny().spec.layers == (2, 3, 4, 5) and tiny(head="linear").spec.layers == (5,)
    assert tiny(head="linear", layers=(0, 3)).spec.layers == (0, 3)


def test_frozen_blocks_run_in_eval_mode_without_autograd():
    net = tiny().train()
    assert net.head.training and not any(part.training for part in net.backbone.net.modules())
    seen = []
    net.head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].requires_grad))
    net(random_images(2, 3, 28, 28))
    assert seen == [False]
    partly = tiny(unfreeze=1).train()
    modes = [block.training for block in partly.backbone.blocks]
    assert modes == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(unfreeze=7), "--unfreeze 7: the backbone has 6 blocks"),
        (dict(layers=(0, 6)), "--layers 0 6"),
        (dict(layers=(2, 1)), "--layers 2 1"),
        (dict(backbone="timm/resnet9000"), "timm/resnet9000"),
        (dict(weights="missing.pth"), "missing.pth does not exist"),
    ],
)
def test_wrong_settings_are_one_line(options, reason):
    with pytest.raises(InputError, match=reason) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


# --- checkpoints ------------------------------------------------------------------------------------------
def test_checkpoint_is_self_contained_and_gives_the_same_logits(tmp_path):
    net = tiny(layers=(1, 4)).eval()
    torch.save(pack_checkpoint(net, CLASSES, (28, 42)), tmp_path / "model.pth")
    loaded, checkpoint = load_model(tmp_path / "model.pth")
    images = random_images(1, 3, 31, 47)
    assert torch.equal(loaded(images), net(images))
    assert checkpoint["classes"][1] == ["cat", [255, 0, 0]] and checkpoint["imgsz"] == [28, 42]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


class Evil:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("truncated", "truncated or damaged"),
        ("text", "could run code|truncated or damaged"),
        ("empty", "truncated"),
        ("flipped", "damaged .checksum of"),
        ("evil", "could run code"),
        ("foreign", "is not a checkpoint of train.py"),
        ("missing", "does not exist"),
        ("newer", "another version of this code"),
        ("classes", "names 2 classes, but has 3"),
        ("incomplete", "incomplete checkpoint"),
        ("other", "does not fit the model"),
    ],
)
def test_files_that_are_no_checkpoint_of_ours_are_refused(tmp_path, capsys, content, reason):
    path = tmp_path / "model.pth"
    packed = pack_checkpoint(tiny(), CLASSES, (28, 28))
    if content == "evil":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "newer":
        torch.save(dict(packed, version=99), path)
    elif content == "classes":
        torch.save(dict(packed, classes=packed["classes"][:2]), path)
    elif content == "incomplete":
        torch.save({"format": "dinoseg", "spec": {}}, path)
    elif content == "other":
        torch.save(dict(packed, model=tiny(num_classes=4).state_dict()), path)
    elif content != "missing":
        torch.save(packed, path)
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]
        path.write_bytes(
            {"truncated": whole[:middle], "text": b"hello\nworld", "empty": b"", "flipped": flipped}[content]
        )
    with pytest.raises(InputError, match=reason) as error:
        load_model(path)
    assert "\n" not in str(error.value) and "model.pth" in str(error.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--unfreeze", 1], "-> logits (1, 7, 30, 45) float32"),
        (["--dataset", "camvid"], "-> logits (1, 11, 30, 45) float32"),
        (["--dataset", "folder", "--classes", "a", "b", "c"], "3 classes: --classes names those of a folder"),
        (["--dataset", "aeroscapes", "--ignore-background"], "-> logits (1, 11, 30, 45) float32"),
    ],
)
def test_python_model_py_prints_the_model_of_the_data_set(flags, wanted, run):
    code, text, err = run(model, "--backbone", "vit_tiny", "--imgsz", 30, 45, *flags)
    assert code == 0 and "BNHead" in text and "trained" in text and wanted in text, err
