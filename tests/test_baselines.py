"""FCN, DeepLabV3 and SegFormer: equal to their libraries, any size, pretrained weights from caches."""

import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, loss_of, random_images
from conftest import build as build_segmenter
from timm.layers import convert_sync_batchnorm
from torch import nn
from torchvision.models import mobilenet_v3_large, resnet50, segmentation

from config import InputError
from model import ModelSpec
from models.baselines import BASELINES, SEGFORMER, build_baseline


LARGE = {"deeplabv3_resnet101", *SEGFORMER} - {"segformer_b0"}


def build(arch, **options):
    """Return the Segmenter of a baseline with three classes."""
    return build_segmenter(arch=arch, **{"unfreeze": "all", **options})


@pytest.mark.parametrize("arch", ["fcn_resnet50", "deeplabv3_resnet101", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.long), (45, 71)], ids=str)
def test_torchvision_networks_give_torchvisions_logits(arch, size):
    net = build(arch).eval()
    plain = getattr(segmentation, arch)(weights=None, weights_backbone=None, num_classes=3).eval()
    plain.backbone.load_state_dict(net.backbone.net.state_dict())
    plain.classifier.load_state_dict(net.head.net.state_dict())
    images = random_images(2, 3, *size)
    with torch.no_grad():
        expected = plain((images - net.mean) / net.std)["out"]
        assert torch.allclose(net(images), expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(("arch", "encoder"), [("fpn_mobilenetv4_small", "mobilenetv4_conv_small"),
                                               ("fpn_efficientnet_lite0", "tf_efficientnet_lite0")])
def test_the_pyramid_reads_timms_maps(arch, encoder):
    """The maps are those of timm, of strides 4 to 32, and none of its weights is left without a use."""
    net = build(arch).eval()
    plain = timm.create_model(encoder, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), net.backbone.net.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(net.backbone.maps(images), plain(images), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max())
    net(random_images(2, 3, 64, 96)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("options", [dict(arch="fpn_mobilenetv4_small"), dict(arch="fcn_resnet50"),
                                     dict(backbone="timm/mobilenetv4_conv_small")], ids=str)
def test_norms_of_several_processes_keep_their_activations(options):
    """As train.py converts them for several GPUs."""
    net = build_segmenter(unfreeze="all", **options).eval()
    images = random_images(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        converted = convert_sync_batchnorm(net)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        assert torch.allclose(converted(images), expected, atol=1e-5 * expected.abs().max())


def test_the_auxiliary_loss_is_torchvisions():
    """Loss and gradients of out + 0.5 x aux, as in torchvision's references/segmentation/train.py."""
    net = build("fcn_resnet50", aux_weight=0.5)
    plain = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    plain.backbone.load_state_dict(net.backbone.net.state_dict())
    plain.classifier.load_state_dict(net.head.net.state_dict())
    plain.aux_classifier.load_state_dict(net.head.aux.state_dict())
    for model in (net, plain):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # draws other numbers for the two
                module.eval()
    images, masks = random_images(2, 3, 33, 46), torch.randint(3, (2, 33, 46))
    masks[0, :9] = 255
    loss, terms, _ = loss_of(net, images, masks)
    outputs = plain((images - net.mean) / net.std)
    expected = {key: F.cross_entropy(outputs[key], masks, ignore_index=255) for key in ("out", "aux")}
    total = expected["out"] + 0.5 * expected["aux"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert terms["aux"].item() == pytest.approx(expected["aux"].item(), rel=1e-4)
    loss.backward()
    total.backward()
    stages = (net.backbone.net.layer3, plain.backbone.layer3), (net.head.aux, plain.aux_classifier)
    for ours, theirs in stages:
        grads = [torch.cat([p.grad.flatten() for p in module.parameters()]) for module in (ours, theirs)]
        assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()
    loss, terms, _ = loss_of(net.eval(), images, masks)  # of validation: without the classifier
    assert terms.keys() == {"ce"} and loss.item() == pytest.approx(terms["ce"].item())


def test_segformer_gives_the_logits_of_transformers():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    net = build("segformer_b0").eval()
    plain = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3)).eval()
    plain.segformer.load_state_dict(net.backbone.net.state_dict())
    plain.decode_head.load_state_dict(net.head.net.state_dict())
    images = random_images(2, 3, 64, 96)
    with torch.no_grad():
        logits = plain(pixel_values=(images - net.mean) / net.std).logits  # (B, K, H/4, W/4)
        logits = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
        assert torch.allclose(net(images), logits, atol=1e-4)


def test_segformers_have_the_parameters_of_the_paper():
    """Table 1 of the paper: encoder and decoder in millions, 150 classes."""
    paper = dict(zip(SEGFORMER, (3.8, 13.7, 27.5, 47.3, 64.1, 84.7), strict=True))
    for arch, millions in paper.items():
        with torch.device("meta"):
            network = nn.ModuleList(build_baseline(ModelSpec(arch=arch, num_classes=150)))
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.02), arch


@pytest.mark.parametrize("arch", [
    pytest.param(arch, marks=pytest.mark.long if arch in LARGE else ())
    for arch in BASELINES])
def test_any_size_and_a_last_batch_of_one(arch):
    net = build(arch).train()
    for size in ((1, 1), (33, 20)):
        logits = net(random_images(1, 3, *size))
        assert logits.shape == (1, 3, *size) and logits.dtype == torch.float32 and logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.head.parameters())


def test_all_of_it_trains_or_the_decoder_alone_with_its_dropout():
    net = build("segformer_b0").train()
    assert net.parameter_counts()[0] == net.parameter_counts()[1]
    kinds = {type(module).__name__: module.training for module in net.backbone.modules()}
    assert kinds["SegformerDropPath"]
    frozen = build("segformer_b0", unfreeze=0).train()
    assert not any(module.training for module in frozen.backbone.net.modules()) and frozen.head.training
    with pytest.raises(InputError, match="--unfreeze 2: .* 0 "):
        build("segformer_b0", unfreeze=2)


# --- pretrained weights, offline --------------------------------------------------------------------------
@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """A TORCH_HOME with the ResNet-50 file as torchvision leaves it; the network may not be asked."""
    folder = tmp_path / "home/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    torch.save(resnet50().state_dict(), folder / "resnet50-0676ba61.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return folder


def test_resnet_weights_come_from_torchvisions_cache(torch_home):
    weights = torch.load(torch_home / "resnet50-0676ba61.pth")
    state = build("fcn_resnet50", weights="auto").backbone.net.state_dict()
    assert state.keys() == weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in state.items())
    with pytest.raises(InputError, match="https://download.pytorch.org/models/resnet101-.*hub/checkpoints"):
        build("deeplabv3_resnet101", weights="auto")


def test_mobilenet_weights_come_from_torchvisions_cache(torch_home, tmp_path):
    weights = mobilenet_v3_large().state_dict()
    torch.save(weights, torch_home / "mobilenet_v3_large-8738ca79.pth")
    state = build("lraspp_mobilenet_v3_large", weights="auto").backbone.net.state_dict()
    assert {f"features.{name}" for name in state} == {name for name in weights if "classifier" not in name}
    assert all(torch.equal(value, weights[f"features.{name}"]) for name, value in state.items())
    whole = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    torch.save(whole.state_dict(), tmp_path / "coco.pth")
    state = build("lraspp_mobilenet_v3_large", weights=str(tmp_path / "coco.pth")).backbone.net.state_dict()
    assert all(torch.equal(value, whole.state_dict()[f"backbone.{name}"]) for name, value in state.items())


@pytest.mark.parametrize(("arch", "encoder", "mean"), [
    ("fpn_mobilenetv4_small", "mobilenetv4_conv_small", (0.485, 0.456, 0.406)),
    ("fpn_efficientnet_lite0", "tf_efficientnet_lite0", (0.5, 0.5, 0.5))])
def test_timm_weights_of_the_pyramid_come_from_a_file(arch, encoder, mean, tmp_path):
    net = timm.create_model(encoder)
    torch.save(net.state_dict(), tmp_path / "imagenet.pth")
    model = build(arch, weights=str(tmp_path / "imagenet.pth"))
    assert torch.allclose(model.mean.flatten(), 255 * torch.tensor(mean))
    state = model.backbone.net.state_dict()
    for value, expected in zip(state.values(), net.state_dict().values(), strict=False):  # it has more behind
        assert torch.equal(value, expected)
    with pytest.raises(InputError, match=f"{encoder}.*--weights none"):
        build(arch, weights="auto")


def test_the_encoder_of_a_whole_network_file_is_read(torch_home, tmp_path):
    network = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(network.state_dict(), tmp_path / "coco.pth")
    net = build("fcn_resnet50", weights=str(tmp_path / "coco.pth"))
    for name, value in net.backbone.net.state_dict().items():
        assert torch.equal(value, network.state_dict()[f"backbone.{name}"])
    with pytest.raises(InputError, match="coco.pth"):
        build("deeplabv3_resnet101", weights=str(tmp_path / "coco.pth"))


def run_python(code, *arguments, **options):
    """Run code in a process of its own, from the folder of the project."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


HUGGING_FACE = """
import sys, torch
from transformers import SegformerConfig, SegformerForImageClassification
torch.manual_seed(4)
SegformerForImageClassification(SegformerConfig()).save_pretrained(sys.argv[1])
"""

FROM_CACHE = """
import sys, torch
from safetensors.torch import load_file
from config import InputError
from model import ModelSpec, build_model
file = load_file(sys.argv[1] + "/model.safetensors")
query = file["segformer.encoder.block.0.0.attention.self.query.weight"]
for weights in ("auto", sys.argv[1] + "/model.safetensors"):
    state = build_model(ModelSpec(arch="segformer_b0", num_classes=3), weights).backbone.net.state_dict()
    assert any(value.shape == query.shape and torch.equal(value, query) for value in state.values()), weights
    assert sum(value.numel() for value in state.values()) + 2 * 257 == sum(v.numel() for v in file.values())
for arch, weights in (("segformer_b1", "auto"), ("segformer_b1", sys.argv[1] + "/model.safetensors")):
    try:
        build_model(ModelSpec(arch=arch, num_classes=3), weights)
    except InputError as error:
        print(error)
"""


@pytest.mark.long
def test_segformer_weights_come_from_the_hugging_face_cache(tmp_path):
    """The cache as the hub client lays it out; transformers reads where it is when it is imported."""
    repo = tmp_path / "hf/hub/models--nvidia--mit-b0"
    snapshot = repo / "snapshots/0123456789abcdef"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0123456789abcdef")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = run_python(HUGGING_FACE + FROM_CACHE, snapshot, env=environment)
    assert done.returncode == 0, done.stderr
    missing, misfit = done.stdout.splitlines()
    assert "https://huggingface.co/nvidia/mit-b1/resolve/main/pytorch_model.bin" in missing
    assert "segformer_b1" in misfit and str(snapshot) in misfit


BESIDE_OUR_FILES = """
import sys
if sys.argv[2] == "first":
    import datasets, evaluate
import torch
from transformers import SegformerForSemanticSegmentation, SegformerConfig, Trainer
from model import ModelSpec, build_model
net = build_model(ModelSpec(arch="segformer_b0", num_classes=3), unfreeze="all").train()
net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).sum().backward()
import datasets, evaluate
assert datasets.__file__.startswith(sys.argv[1]) and datasets.DATASETS and evaluate.__file__
"""


@pytest.mark.long
@pytest.mark.parametrize("order", ["first", "last"])
def test_files_of_ours_named_like_packages_do_not_confuse_transformers(order):
    done = run_python(BESIDE_OUR_FILES, ROOT, order)
    assert done.returncode == 0, done.stderr
