"""The Segmenter at odd sizes, frozen and unfrozen parts, torch.hub offline, checkpoints that are not ours."""

import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from timm.layers import resample_abs_pos_embed

import model as model_module
from config import InputError
from model import (
    BNHead,
    PositionEmbedding,
    build_model,
    load_model,
    load_strictly,
    pack_checkpoint,
    pad_to_multiple,
    read_weights,
)

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


def tiny(**options):
    """Return a vit_tiny Segmenter with three classes."""
    torch.manual_seed(0)
    return build_model(**{"backbone": "vit_tiny", "head": "bn", "num_classes": 3, **options})


def random_images(*size, seed=0):
    """Return (B, 3, H, W) uint8 noise."""
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


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


def test_padding_is_centred_and_only_where_needed():
    images = torch.ones(1, 1, 28, 30)
    padded, top, left = pad_to_multiple(images, 14)
    assert padded.shape == (1, 1, 28, 42) and (top, left) == (0, 6)
    assert torch.equal(padded[..., top : top + 28, left : left + 30], images) and padded.sum() == images.sum()


def test_bn_head_is_batchnorm_then_1x1_convolution():
    head = BNHead([8, 8], 5)
    assert [name for name, _ in head.named_children()] == ["bn", "conv_seg"]  # the official names
    assert head([torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4)]).shape == (2, 5, 3, 4)


# --- position embeddings ----------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 9)])
def test_position_embedding_equals_timm_and_is_computed_once(grid, monkeypatch):
    parameter = torch.nn.Parameter(torch.randn(1, 17, 6), requires_grad=False)
    positions = PositionEmbedding(parameter, 1, (4, 4))
    want = resample_abs_pos_embed(parameter, list(grid), [4, 4], num_prefix_tokens=1)
    first = positions(grid, torch.zeros(1))
    assert torch.allclose(first, want, atol=1e-6)
    assert positions(grid, torch.zeros(1)) is first
    monkeypatch.setattr(positions, "interpolate", None)  # a second computation would fail
    positions(grid, torch.zeros(1))


def test_position_embeddings_of_two_grids_do_not_mix():
    positions = PositionEmbedding(torch.nn.Parameter(torch.randn(1, 17, 6), requires_grad=False), 1, (4, 4))
    wide, tall = positions((2, 6), torch.zeros(1)), positions((6, 2), torch.zeros(1))
    assert wide.shape == tall.shape and not torch.equal(wide, tall)
    assert torch.equal(wide, positions((2, 6), torch.zeros(1)))


def official_interpolation(pos_embed, rows, columns):
    """Interpolate as the official DINOv2 code does: scale factors (grid + 0.1) / old grid, bicubic."""
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    patches = pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(
        patches, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic"
    )
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], 1)


def test_position_embedding_of_the_official_code_keeps_its_offset():
    parameter = torch.nn.Parameter(torch.randn(1, 26, 6), requires_grad=False)
    positions = PositionEmbedding(parameter, 1, (5, 5), offset=0.1, antialias=False)
    assert torch.allclose(
        positions((7, 3), torch.zeros(1)), official_interpolation(parameter, 7, 3), atol=1e-6
    )
    half = positions((7, 3), torch.zeros(1, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16  # rounded after the interpolation, not before
    assert torch.equal(half, positions((7, 3), torch.zeros(1)).bfloat16())


def test_position_embedding_that_trains_is_not_kept_and_gets_gradients():
    net = tiny(unfreeze="all").train()
    net(random_images(2, 3, 30, 45)).sum().backward()
    assert net.backbone.net.pos_embed.grad.abs().sum() > 0 and not net.backbone.positions.cache


def test_one_cache_serves_inference_and_later_training():
    net = tiny(unfreeze=1)
    with torch.inference_mode():
        net.eval()(random_images(1, 3, 30, 45))
    net.train()(random_images(2, 3, 30, 45)).sum().backward()  # an inference tensor would raise here


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
    assert tiny().spec["layers"] == [2, 3, 4, 5] and tiny(head="linear").spec["layers"] == [5]
    assert tiny(head="linear", layers=(0, 3)).spec["layers"] == [0, 3]


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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "vit_small_patch16_dinov3"])
def test_other_timm_backbones(name):
    net = tiny(backbone=f"timm/{name}").eval()
    assert net(random_images(1, 3, 50, 71)).shape == (1, 3, 50, 71)
    net = tiny(backbone=f"timm/{name}", unfreeze="all").train()
    net(random_images(2, 3, 64, 64)).sum().backward()


def test_a_network_for_one_size_only_says_so():
    net = tiny(backbone="timm/mixer_s16_224", layers=(2,))
    with pytest.raises(InputError, match="does not take 64x96 pixels"):
        net(random_images(1, 3, 64, 96))


def test_images_are_normalised_as_the_backbone_was_trained():
    half = tiny(backbone="timm/vit_tiny_patch16_224")
    assert half.mean.flatten().tolist() == [127.5] * 3 and half.std.flatten().tolist() == [127.5] * 3
    assert tiny().mean.flatten().tolist() == pytest.approx([255 * x for x in (0.485, 0.456, 0.406)])


def test_timm_backbone_equals_timm_at_another_size():
    net = tiny(backbone="timm/vit_tiny_patch16_224", layers=(3, 11)).eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(net.backbone.net.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = net.backbone.features(images)
        theirs = plain.forward_intermediates(images, indices=[3, 11], norm=True, intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


# --- torch.hub offline ------------------------------------------------------------------------------------
def test_hub_backbone_loads_from_the_cache_without_network(hub_cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    net = tiny(backbone="dinov2_vits14", weights="auto").eval()
    weights = torch.load(hub_cache / "hub/checkpoints/dinov2_vits14_pretrain.pth")
    assert all(torch.equal(value, weights[name]) for name, value in net.backbone.net.state_dict().items())
    assert type(net.backbone).__name__ == "HubBackbone" and net.spec["layers"] == [1, 2, 3, 4]
    images = random_images(1, 3, 50, 71)
    assert net(images).shape == (1, 3, 50, 71)
    padded, _, _ = pad_to_multiple((images.float() - net.mean) / net.std, 14)
    with torch.no_grad():
        want = net.backbone.net.get_intermediate_layers(padded, n=4, reshape=True, norm=True)
        assert torch.allclose(torch.cat(net.backbone.features(padded), 1), torch.cat(want, 1))


def test_hub_without_code_or_weights_says_what_goes_where(hub_cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    weights = hub_cache / "hub/checkpoints/dinov2_vits14_pretrain.pth"
    weights.rename(weights.with_name("kept.pth"))
    with pytest.raises(
        InputError,
        match="put https.*dinov2_vits14_pretrain.pth into .*checkpoints.*--weights FILE, or .*--weights none",
    ):
        tiny(backbone="dinov2_vits14", weights="auto")
    tiny(backbone="dinov2_vits14", weights="none")
    tiny(backbone="dinov2_vits14", weights=str(weights.with_name("kept.pth")))
    (hub_cache / "hub/facebookresearch_dinov2_main").rename(hub_cache / "hub/gone")
    with pytest.raises(InputError, match="as .*facebookresearch_dinov2_main, or .*--backbone timm/"):
        tiny(backbone="dinov2_vits14", weights="none")


def test_weights_of_another_model_are_refused_by_name(hub_cache, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth does not fit the model .*missing such as"):
        tiny(backbone="dinov2_vits14", weights=str(tmp_path / "other.pth"))


def test_registers_and_offsets_of_a_hub_network_reach_the_position_embedding():
    """A stand-in with the official attributes: positions come from our table, at odd sizes too."""

    class Official(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = torch.nn.Conv2d(3, 6, 14, 14)
            self.patch_embed.patch_size = (14, 14)
            self.pos_embed = torch.nn.Parameter(torch.randn(1, 26, 6))
            self.blocks = torch.nn.ModuleList([torch.nn.Identity()] * 4)
            self.interpolate_offset, self.interpolate_antialias = 0.1, False

        def interpolate_pos_encoding(self, tokens, height, width):
            raise AssertionError("the official interpolation ran")

        def get_intermediate_layers(self, images, n, reshape, norm):
            tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([tokens[:, :1] * 0, tokens], 1)
            tokens = tokens + self.interpolate_pos_encoding(tokens, *images.shape[-2:])
            return [tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 5))] * len(n)

    backbone = model_module.HubBackbone(Official(), (3,))
    backbone.requires_grad_(False)
    images = torch.randn(1, 3, 42, 70)
    want = backbone.net.patch_embed(images)
    want = want + official_interpolation(backbone.net.pos_embed, 3, 5)[:, 1:].transpose(1, 2).unflatten(
        2, (3, 5)
    )
    assert torch.allclose(backbone.features(images)[0], want, atol=1e-6)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_dinov2_checkpoint_runs_through_timm_where_the_hub_code_is_missing(name, tmp_path, monkeypatch):
    """The keys of an official state dict, made from timm's, come back as the same network."""
    twin = timm.create_model(
        "vit_small_patch14" + ("_reg4" if "reg" in name else "") + "_dinov2",
        num_classes=0,
        dynamic_img_size=True,
    )
    state = {f"backbone.net.{key}": value for key, value in twin.state_dict().items()}
    if "reg" in name:  # the official model keeps a position for the class token
        state["backbone.net.register_tokens"] = state.pop("backbone.net.reg_token")
        state["backbone.net.pos_embed"] = F.pad(state["backbone.net.pos_embed"], (0, 0, 1, 0))
    state["backbone.net.mask_token"] = torch.zeros(1, 384)
    spec = dict(backbone=name, head="bn", num_classes=3, layers=[10, 11])
    head = BNHead([384, 384], 3)
    state.update({f"head.{key}": value for key, value in head.state_dict().items()})
    net = model_module.Segmenter(model_module.TimmBackbone(twin, [10, 11]), head, 3, spec)
    state.update(mean=net.mean, std=net.std)
    torch.save(dict(pack_checkpoint(net, CLASSES, (70, 70)), model=state), tmp_path / "model.pth")

    def not_here(*args):
        raise InputError("no hub")

    monkeypatch.setattr(model_module, "load_hub_net", not_here)
    loaded, _ = load_model(tmp_path / "model.pth")
    images = random_images(1, 3, 518, 518)
    with torch.no_grad():
        assert torch.allclose(loaded(images), net.eval()(images), atol=1e-5)
    assert loaded.backbone.positions.offset == (0.0 if "reg" in name else 0.1)


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
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "text": b"hello\nworld", "empty": b""}[content]
        )
    with pytest.raises(InputError, match=reason) as error:
        load_model(path)
    assert "\n" not in str(error.value) and "model.pth" in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def test_weights_files_of_several_kinds(tmp_path):
    from safetensors.torch import save_file

    state = tiny().backbone.net.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        net = tiny(weights=str(tmp_path / name))
        load_strictly(net.backbone.net, read_weights(tmp_path / name), name)
    (tmp_path / "w.safetensors").write_bytes(b"1234")
    torch.save([1, 2], tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(InputError, match=name):
            read_weights(tmp_path / name)


def test_python_model_py_prints_the_model():
    done = subprocess.run(
        [sys.executable, "model.py", "--backbone", "vit_tiny", "--imgsz", "30", "45", "--unfreeze", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "BNHead" in done.stdout, done.stderr
    assert "-> logits (1, 7, 30, 45) float32" in done.stdout and "trained" in done.stdout
