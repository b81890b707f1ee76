"""The Segmenter at odd sizes, on images and on cached features; what trains; checkpoint files."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import build, loss_of, random_images, tiny

import model
from checkpoint import load_model, pack_checkpoint
from config import InputError
from models.backbones import features_of_parts
from models.heads import HEADS

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


def cached(net, images):
    """Return the Features of a cache that hold `images`, at the precision in which they are computed."""
    with torch.no_grad():
        parts = net.compute_parts(net.cached_parts(), images)
    return features_of_parts(parts, net.geometry(images.shape[-2:]))


def test_forward_equals_the_steps_written_out():
    net = tiny().eval()
    torch.nn.init.normal_(net.head.bn.weight)
    net.head.bn.running_mean.normal_()
    images = random_images(2, 3, 30, 45)
    with torch.no_grad():
        rgb = images.float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        rgb = (rgb - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        padded = F.pad(rgb, (5, 6, 6, 6))  # 30 -> 42 and 45 -> 56, zeros, the odd pixel on the far side
        maps = net.backbone.net.forward_intermediates(
            padded, indices=[2, 3, 4, 5], norm=True, intermediates_only=True
        )
        features = net.head.bn(torch.cat(maps, 1))
        weight, bias = net.head.conv_seg.weight[:, :, 0, 0], net.head.conv_seg.bias
        logits = torch.einsum("bdhw,kd->bkhw", features, weight) + bias.view(1, -1, 1, 1)
        logits = F.interpolate(logits, size=(42, 56), mode="bilinear", align_corners=False)
        assert torch.allclose(net(images), logits[:, :, 6:36, 5:50], atol=1e-5)


@pytest.mark.parametrize("unfreeze", [0, 2])
@pytest.mark.parametrize("head", list(HEADS))
def test_cached_features_give_what_images_give(head, unfreeze):
    """All that a head returns; the gradients of such a step are in test_feature_cache.py."""
    net, images = tiny(head=head, unfreeze=unfreeze).eval(), random_images(2, 3, 30, 45)
    with torch.no_grad():
        output, geometry = net.output(cached(net, images))
        live_output, live_geometry = net.output(images)
    assert geometry == live_geometry
    torch.testing.assert_close(output, live_output, atol=1e-4, rtol=1e-4)


def test_compiled_parts_give_the_same_logits_and_names(monkeypatch):
    compiled = []

    def compile(function, *args, **options):  # the compiler itself takes half a minute
        compiled.append(function)
        return function

    net = tiny()
    names, images = list(net.state_dict()), random_images(1, 3, 30, 43)
    expected = net.eval()(images)
    monkeypatch.setattr(torch, "compile", compile)
    net.compile_parts()
    assert len(compiled) == 2 and torch.equal(net(images), expected) and list(net.state_dict()) == names


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("from_cache", [False, True])
def test_a_compiled_step_is_a_step(from_cache):
    """As --compile trains: blocks, copies of blocks and the head, on images and on cached tokens."""
    masks, results = torch.randint(0, 3, (4, 30, 43)), []
    for compiled in (False, True):
        net = tiny(head="split-detail", unfreeze=1)
        if from_cache:
            net.cached_parts()  # from here on its tail is what trains
        if compiled:
            net.compile_parts()
        for seed in (0, 1):  # what the first step leaves behind must not reach the next
            images = random_images(4, 3, 30, 43, seed=seed)
            net.eval()
            inputs = cached(net, images) if from_cache else images
            net.train().zero_grad()
            loss, _, _ = loss_of(net, inputs, masks)
            loss.backward()
        results.append([loss, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for plain, other in zip(*results, strict=True):
        assert torch.allclose(plain, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [dict(unfreeze=2), dict(unfreeze="all"), dict(head="split-detail")],
                         ids=str)
@pytest.mark.parametrize("from_cache", [False, True])
def test_activations_that_are_computed_again_change_no_gradient_and_are_not_kept(options, from_cache):
    if from_cache and options.get("unfreeze") == "all":
        pytest.skip("is not cached")
    masks, images, results, kept = torch.randint(0, 3, (2, 30, 43)), random_images(2, 3, 30, 43), [], []
    for again in (False, True):
        net = tiny(**options)
        if from_cache:
            net.cached_parts()
        if again:
            assert net.checkpoint_activations()
            copied = copy.deepcopy(net)  # has blocks of its own
            with torch.no_grad():
                for value in net.parameters():
                    value.add_(1)
            net = copied
        inputs = cached(net.eval(), images) if from_cache else images
        net.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            loss, _, _ = loss_of(net, inputs, masks)
        loss.backward()
        results.append([loss, *(value.grad for value in net.parameters() if value.grad is not None)])
        kept.append(sum(sizes))
    assert len(results[0]) == len(results[1])
    for plain, other in zip(*results, strict=True):
        assert torch.allclose(plain, other, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.8 * kept[0]


def test_there_is_nothing_to_compute_again_where_no_block_trains():
    assert tiny().checkpoint_activations() == 0
    assert build(arch="fcn_resnet50", unfreeze="all").checkpoint_activations() == 0


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


def test_frozen_blocks_run_in_eval_mode_without_autograd():
    net = tiny().train()
    assert net.head.training and not any(module.training for module in net.backbone.net.modules())
    with_gradient = []
    net.head.register_forward_pre_hook(lambda _, args: with_gradient.append(args[0].maps[0].requires_grad))
    net(random_images(2, 3, 28, 28))
    assert with_gradient == [False]
    modes = [block.training for block in tiny(unfreeze=1).train().backbone.blocks]
    assert modes == [False] * 5 + [True]


def test_default_layers_are_the_last_four_and_the_last_one_for_linear():
    assert tiny().spec.layers == (2, 3, 4, 5) and tiny(head="linear").spec.layers == (5,)
    assert tiny(head="linear", layers=(0, 3)).spec.layers == (0, 3)
    assert tiny(layers=("quarters",)).spec.layers == (0, 2, 3, 5)  # 1.5, 3, 4.5 and 6 blocks, rounded down


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(unfreeze=7), "--unfreeze 7: .* 6 "),
        (dict(layers=(0, 6)), "--layers 0 6"),
        (dict(layers=(2, 1)), "--layers 2 1"),
        (dict(backbone="timm/resnet9000"), "timm/resnet9000"),
        (dict(weights="missing.pth"), "missing.pth"),
    ],
)
def test_wrong_settings_are_one_line(options, named):
    with pytest.raises(InputError, match=named) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


# --- checkpoints ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    dict(backbone="vit_tiny", layers=(1, 4)), dict(arch="segformer_b0", normalize="none"),
    pytest.param(dict(arch="deeplabv3_resnet101", aux_weight=0.4), marks=pytest.mark.long)], ids=str)
def test_a_checkpoint_is_self_contained_and_gives_the_same_logits(options, tmp_path):
    net = build(**options).eval()
    torch.save(pack_checkpoint(net, CLASSES, (28, 42)), tmp_path / "model.pth")
    loaded, checkpoint = load_model(tmp_path / "model.pth")
    images = random_images(1, 3, 31, 47)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    assert checkpoint["classes"][1] == ["cat", [255, 0, 0]] and checkpoint["imgsz"] == [28, 42]
    assert checkpoint["spec"] == net.spec
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


class Evil:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture(scope="module")
def packed():
    """The checkpoint of a model, as it is written."""
    return pack_checkpoint(tiny(), CLASSES, (28, 28))


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "evil", "foreign", "newer",
                                     "classes", "incomplete", "other", "missing"])
def test_what_is_not_a_checkpoint_is_refused_by_name_and_runs_no_code(packed, tmp_path, capsys, content):
    path = tmp_path / "model.pth"
    dicts = {
        "foreign": {"state_dict": {}},
        "newer": dict(packed, version=99),
        "classes": dict(packed, classes=packed["classes"][:2]),
        "incomplete": {"format": "dinoseg", "spec": {}},
        "other": dict(packed, model=tiny(num_classes=4).state_dict()),
    }
    torch.save(dicts.get(content, packed), path)
    data = path.read_bytes()
    middle = len(data) // 2
    replaced = {
        "truncated": data[:middle],
        "text": b"hello\nworld",
        "empty": b"",
        "evil": pickle.dumps(Evil(), protocol=2),
    }
    if content in replaced:
        path.write_bytes(replaced[content])
    elif content == "missing":
        path.unlink()
    with pytest.raises(InputError, match="model.pth") as error:
        load_model(path)
    assert "\n" not in str(error.value) and "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--unfreeze", 1], "(1, 7, 30, 45) float32"),
        (["--dataset", "folder", "--classes", "a", "b", "c"], "(1, 3, 30, 45) float32"),
        (["--dataset", "aeroscapes", "--ignore-background"], "(1, 11, 30, 45) float32"),
    ],
)
def test_python_model_py_prints_the_model_of_the_data_set(flags, printed, run):
    code, out, err = run(model, "--backbone", "vit_tiny", "--imgsz", 30, 45, *flags)
    assert code == 0 and "BNHead" in out and printed in out, err
