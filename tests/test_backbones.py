"""Position embeddings at any grid, timm backbones, torch.hub offline."""

import copy
import email.message
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_images, tiny
from timm.layers import resample_abs_pos_embed

from checkpoint import load_model, pack_checkpoint
from config import InputError, names
from model import ModelSpec, build_model
from models.backbones import (DINOV3, HubBackbone, PositionEmbedding, TimmBackbone, build_backbone,
                              create_timm, origins)

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


def refuse_network(*args, **kwargs):
    """Stand in for whatever would ask the network."""
    raise OSError("no network")


# --- position embeddings ----------------------------------------------------------------------------------
def position_net(tokens=17):
    """Return a stand-in for a ViT: something with a pos_embed."""
    return SimpleNamespace(pos_embed=torch.nn.Parameter(torch.randn(1, tokens, 6), requires_grad=False))


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 9)])
def test_position_embedding_equals_timm(grid):
    net = position_net()
    positions = PositionEmbedding(net, 1, (4, 4))
    expected = resample_abs_pos_embed(net.pos_embed, list(grid), [4, 4], num_prefix_tokens=1)
    assert torch.allclose(positions(grid, torch.zeros(1)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.pos_embed.data.mul_(3),  # as averages of weights often do
        lambda net: net.load_state_dict({"pos_embed": net.pos_embed * -9}, strict=False),
        lambda net: net.load_state_dict({"pos_embed": net.pos_embed * -9}, strict=False, assign=True),
        lambda net: setattr(net, "pos_embed", torch.nn.Parameter(net.pos_embed * -9)),
    ],
    ids=["data", "load", "assign", "replace"],
)
def test_position_embedding_follows_its_parameter_however_that_is_changed(change):
    """The network's own, not that of the copy of it that was made before."""
    net, images = tiny().eval(), torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        before = torch.cat(net.backbone.maps(images))
        twin = copy.deepcopy(net)
        change(net.backbone.net)
        fresh = tiny().eval()
        fresh.load_state_dict(net.state_dict())
        after = torch.cat(net.backbone.maps(images))
        assert torch.equal(after, torch.cat(fresh.backbone.maps(images)))
        assert torch.equal(torch.cat(twin.backbone.maps(images)), before)
    assert not torch.allclose(after, before, atol=1e-3)


def official_interpolation(pos_embed, rows, columns):
    """Interpolate as the official DINOv2 code does: scale factors (grid + 0.1) / old grid, bicubic."""
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    patches = pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (rows + 0.1) / side, (columns + 0.1) / side
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], 1)


def test_position_embedding_of_the_official_code_keeps_its_offset():
    net = position_net(26)
    positions = PositionEmbedding(net, 1, (5, 5), offset=0.1, antialias=False)
    exact = positions((7, 3), torch.zeros(1))
    assert torch.allclose(exact, official_interpolation(net.pos_embed, 7, 3), atol=1e-6)
    half = positions((7, 3), torch.zeros(1, dtype=torch.bfloat16))
    assert torch.equal(half, exact.bfloat16())  # rounded after the interpolation, not before


def test_position_embedding_that_trains_gets_gradients():
    net = tiny(unfreeze="all").train()
    net(random_images(2, 3, 30, 45)).sum().backward()
    assert net.backbone.net.pos_embed.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "vit_small_patch16_dinov3"])
def test_other_timm_backbones(name):
    net = tiny(backbone=f"timm/{name}").eval()
    assert net(random_images(1, 3, 50, 71)).shape == (1, 3, 50, 71)
    net = tiny(backbone=f"timm/{name}", unfreeze="all").train()
    net(random_images(2, 3, 64, 64)).sum().backward()


def test_a_network_for_one_size_only_says_so():
    net = tiny(backbone="timm/mixer_s16_224", layers=(2,))
    with pytest.raises(InputError, match="64x96"):
        net(random_images(1, 3, 64, 96))


def test_images_are_normalized_as_the_backbone_was_trained():
    half = tiny(backbone="timm/vit_tiny_patch16_224")
    assert half.mean.flatten().tolist() == [127.5] * 3 and half.std.flatten().tolist() == [127.5] * 3
    assert tiny().mean.flatten().tolist() == pytest.approx([255 * x for x in (0.485, 0.456, 0.406)])


def test_timm_backbone_equals_timm_at_another_size():
    net = tiny(backbone="timm/vit_tiny_patch16_224", layers=(3, 11)).eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(net.backbone.net.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = net.backbone.maps(images)
        theirs = plain.forward_intermediates(images, indices=[3, 11], norm=True, intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_maps_of_a_pyramid_are_resized_to_the_finest_without_a_shift():
    """A ramp is a ramp again, with the same values in the same places of the image."""
    net = tiny(backbone="timm/convnext_atto", layers=(0, 1, 3)).eval()
    rising = [torch.arange(2.0 * side)[None] + torch.arange(side)[:, None] for side in (16, 8, 2)]
    net.backbone.net.forward_intermediates = lambda *args, **options: [ramp[None, None] for ramp in rising]
    maps = net.backbone.maps(torch.zeros(1, 3, 64, 128))
    rows, columns = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    for values, side in zip(maps, (16, 8, 2), strict=True):
        expected = (rows + columns) * side / 16 - 1  # at the centers of the pixels
        inside = slice(8 // side, 16 - 8 // side), slice(8 // side, 32 - 8 // side)
        torch.testing.assert_close(values[0, 0][inside], expected[inside])


# --- torch.hub offline ------------------------------------------------------------------------------------
@pytest.fixture
def offline_hub(hub_cache, monkeypatch):
    """The folder of hub_cache; the network may not be asked."""
    monkeypatch.setattr(torch.hub, "urlopen", refuse_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_network)
    return hub_cache / "hub"


def test_hub_backbone_loads_from_the_cache_without_network(offline_hub):
    net = tiny(backbone="dinov2_vits14", weights="auto").eval()
    weights = torch.load(offline_hub / "checkpoints/dinov2_vits14_pretrain.pth")
    assert all(torch.equal(value, weights[name]) for name, value in net.backbone.net.state_dict().items())
    assert isinstance(net.backbone, HubBackbone) and net.spec.layers == (1, 2, 3, 4)
    images = random_images(1, 3, 50, 71)
    assert net(images).shape == (1, 3, 50, 71)
    padded = net.normalized(images, net.geometry((50, 71)))
    with torch.no_grad():
        expected = net.backbone.net.get_intermediate_layers(padded, n=4, reshape=True, norm=True)
        assert torch.allclose(torch.cat(net.backbone.maps(padded), 1), torch.cat(expected, 1))


def test_hub_without_code_or_weights_says_what_goes_where(offline_hub):
    weights = offline_hub / "checkpoints/dinov2_vits14_pretrain.pth"
    moved = weights.rename(weights.with_name("moved.pth"))
    with pytest.raises(InputError, match="https.*dinov2_vits14_pretrain.pth .*checkpoints.*--weights FILE"):
        tiny(backbone="dinov2_vits14", weights="auto")
    tiny(backbone="dinov2_vits14", weights="none")
    tiny(backbone="dinov2_vits14", weights=str(moved))
    (offline_hub / "facebookresearch_dinov2_main").rename(offline_hub / "gone")
    with pytest.raises(InputError, match="facebookresearch_dinov2_main.*--backbone timm/"):
        tiny(backbone="dinov2_vits14", weights="none")


def test_the_hub_reference_can_be_pinned_and_is_recorded(hub_cache, monkeypatch):
    code = hub_cache / "hub/facebookresearch_dinov2_main"
    before = origins("dinov2_vits14", "auto")
    assert before["hub"] == "facebookresearch/dinov2:main" and before["weights_file"].endswith("pretrain.pth")
    assert before["weights_sha256"] == hashlib.sha256(Path(before["weights_file"]).read_bytes()).hexdigest()
    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("DINOSEG_HUB", f"facebookresearch/dinov2:{commit}")
    shutil.copytree(code, code.with_name(f"facebookresearch_dinov2_{commit}"))
    tiny(backbone="dinov2_vits14", weights="auto")
    assert origins("dinov2_vits14", "auto") == {**before, "hub": f"facebookresearch/dinov2:{commit}"}
    (code.with_name(f"facebookresearch_dinov2_{commit}") / "more.py").write_text("x = 1")
    assert origins("dinov2_vits14", "none")["hub_code"] != before["hub_code"]
    assert origins("vit_tiny", "none") == dict.fromkeys(before)


@pytest.mark.parametrize("ref", ["0123456789abcdef" * 2 + "01234567", "some/branch", "v1.0"])
def test_the_code_of_a_commit_a_branch_and_a_tag_is_downloaded(ref, hub_cache, monkeypatch):
    """GitHub lists branches and tags, and torch.hub would refuse a commit that is not on the list."""
    code, urls = hub_cache / "hub/facebookresearch_dinov2_main", []

    def list_refs(request):
        listed = [ref] if "commit" not in request.full_url and "page=1" in request.full_url else []
        refs = [dict(name=name, commit=dict(sha="f" * 40)) for name in listed if len(name) < 40]
        answer = io.BytesIO(json.dumps(refs).encode())
        answer.headers = email.message.Message()
        return answer

    def download(url, path, **_):
        urls.append(url)
        shutil.make_archive(str(path).removesuffix(".zip"), "zip", code.parent, code.name)

    monkeypatch.setattr(torch.hub, "urlopen", list_refs)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("DINOSEG_HUB", f"facebookresearch/dinov2:{ref}")
    for _ in range(2):  # downloaded, then kept
        tiny(backbone="dinov2_vits14", weights="none")
    assert len(urls) == 1 and urls[0].endswith(f"facebookresearch/dinov2/zipball/{ref}")
    assert origins("dinov2_vits14", "none")["hub_code"]


def test_code_of_another_repository_needs_the_users_word(hub_cache, monkeypatch):
    code = hub_cache / "hub/facebookresearch_dinov2_main"
    code.rename(code.with_name("someone_dinov2_main"))
    monkeypatch.setenv("DINOSEG_HUB", "someone/dinov2:main")
    for trusted in ("", "another/dinov2"):
        monkeypatch.setenv("DINOSEG_TRUST", trusted)
        with pytest.raises(InputError, match="DINOSEG_TRUST=someone/dinov2"):
            tiny(backbone="dinov2_vits14")
    monkeypatch.setenv("DINOSEG_TRUST", "someone/dinov2")
    tiny(backbone="dinov2_vits14")
    for wrong in ("someone", "../../x:main", "a/b:../c", "a/b"):
        monkeypatch.setenv("DINOSEG_HUB", wrong)
        with pytest.raises(InputError, match="DINOSEG_HUB"):
            tiny(backbone="dinov2_vits14")


def test_dinov3_by_name_is_timms_and_says_whose_license_its_weights_have(capsys):
    assert set(DINOV3.values()) <= set(timm.list_models("*dinov3*", pretrained=True))
    assert {name for name in names("backbone") if name.startswith("dinov3")} == set(DINOV3)
    net = tiny(backbone="dinov3_vits16", layers=(10, 11))
    twin = timm.create_model("vit_small_patch16_dinov3", num_classes=0, dynamic_img_size=True)
    twin.load_state_dict(net.backbone.net.state_dict())
    images = random_images(1, 3, 48, 64)
    padded = net.normalized(images, net.geometry((48, 64)))
    expected = twin.eval().forward_intermediates(padded, indices=[10, 11], norm=True, intermediates_only=True)
    maps = net.eval().features(images).maps
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(maps, expected, strict=True))
    assert net.backbone.size_divisor == 16 and not capsys.readouterr().out
    with pytest.raises(InputError, match="dinov3.lvd1689m"):
        build_backbone("dinov3_vits16", "auto")
    assert "dinov3-license" in capsys.readouterr().out


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

    backbone = HubBackbone(Official(), (3,))
    backbone.requires_grad_(False)
    images = torch.randn(1, 3, 42, 70)
    positions = official_interpolation(backbone.net.pos_embed, 3, 5)[:, 1:].transpose(1, 2)
    expected = backbone.net.patch_embed(images) + positions.unflatten(2, (3, 5))
    assert torch.allclose(backbone.maps(images)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("name", "head"), [
    pytest.param("dinov2_vits14_reg", "split", marks=pytest.mark.long), ("dinov2_vits14", "bn")])
def test_a_dinov2_checkpoint_runs_through_timm_without_the_hub_code(name, head, tmp_path, monkeypatch):
    """The keys of an official state dict, made from timm's, come back as the same network."""
    registers = "_reg4" if "reg" in name else ""
    twin = timm.create_model(f"vit_small_patch14{registers}_dinov2", num_classes=0, dynamic_img_size=True)
    state = {f"backbone.net.{key}": value for key, value in twin.state_dict().items()}
    if registers:  # the official model keeps a position for the class token
        state["backbone.net.register_tokens"] = state.pop("backbone.net.reg_token")
        state["backbone.net.pos_embed"] = F.pad(state["backbone.net.pos_embed"], (0, 0, 1, 0))
    state["backbone.net.mask_token"] = torch.zeros(1, 384)
    spec = ModelSpec(backbone=name, num_classes=3, layers=(10, 11), head=head)
    net = build_model(spec, backbone=TimmBackbone(twin, [10, 11]))
    state.update({f"head.{key}": value for key, value in net.head.state_dict().items()})
    state.update(mean=net.mean, std=net.std)
    torch.save(dict(pack_checkpoint(net, CLASSES, (70, 70)), model=state), tmp_path / "model.pth")
    monkeypatch.setattr(torch.hub, "load", refuse_network)
    loaded, _ = load_model(tmp_path / "model.pth")
    images = random_images(1, 3, 518, 518)
    with torch.no_grad():
        assert torch.allclose(loaded(images), net.eval()(images), atol=1e-5)
    assert loaded.backbone.positions.offset == (0.0 if registers else 0.1)


@pytest.mark.parametrize("name", ["hf-hub:evil/x", "local-dir:/etc", "hf_hub:a/b", "../x", "", "no_such_net",
                                  "vit_tiny_patch16_224 ", "A" * 500])
def test_only_names_of_timms_own_models_are_models(tmp_path, name, monkeypatch):
    """From flags and from checkpoints: a name must not reach a hub or a folder."""
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(InputError, match="--backbone timm/"):
        create_timm(name)
    packed = pack_checkpoint(tiny(), [("a", (0, 0, 0)), ("b", (1, 1, 1))], (28, 28))
    packed["spec"] = {**packed["spec"], "backbone": f"timm/{name}"}
    torch.save(packed, tmp_path / "model.pth")
    with pytest.raises(InputError):
        load_model(tmp_path / "model.pth")
