"""FCN, DeepLabV3 and SegFormer: equal to their libraries, any size, pretrained weights from caches."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_images
from conftest import build as build_segmenter
from torchvision.models import resnet50, segmentation

from models.baselines import SEGFORMER, build_baseline
from config import InputError
from checkpoint import load_model, pack_checkpoint
from losses import Criterion
from model import ModelSpec

ARCHS = ["fcn_resnet50", "deeplabv3_resnet101", "segformer_b0"]
CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("dog", (0, 255, 0))]


def build(arch, **options):
    """Return the Segmenter of a baseline with three classes."""
    return build_segmenter(arch=arch, **{"unfreeze": "all", **options})


@pytest.mark.parametrize("arch", ["fcn_resnet50", "deeplabv3_resnet101"])
@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.long), (45, 71)], ids=str)
def test_torchvision_networks_give_torchvisions_logits(arch, size):
    net = build(arch).eval()
    plain = getattr(segmentation, arch)(weights=None, weights_backbone=None, num_classes=3).eval()
    plain.backbone.load_state_dict(net.backbone.net.state_dict())
    plain.classifier.load_state_dict(net.head.net.state_dict())
    images = random_images(2, 3, *size)
    with torch.no_grad():
        want = plain((images - net.mean) / net.std)["out"]
        assert torch.allclose(net(images), want, atol=1e-5 * want.abs().max())


def test_the_auxiliary_loss_is_torchvisions():
    """Loss and gradients of out + 0.5 x aux, as in torchvision's references/segmentation/train.py."""
    net = build("fcn_resnet50", aux_weight=0.5)
    plain = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    plain.backbone.load_state_dict(net.backbone.net.state_dict())
    plain.classifier.load_state_dict(net.head.net.state_dict())
    plain.aux_classifier.load_state_dict(net.head.aux.state_dict())
    for model in (net, plain):  # dropout draws other numbers for the two
        model.train()
        [part.eval() for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    images, masks = random_images(2, 3, 33, 46), torch.randint(3, (2, 33, 46))
    masks[0, :9] = 255
    loss, terms, _ = net.loss(images, masks, Criterion("ce"))
    out = plain((images - net.mean) / net.std)
    parts = [F.cross_entropy(out[key], masks, ignore_index=255) for key in ("out", "aux")]
    want = parts[0] + 0.5 * parts[1]
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert terms["aux"].item() == pytest.approx(parts[1].item(), rel=1e-4)
    loss.backward()
    want.backward()
    stages = (net.backbone.net.layer3, plain.backbone.layer3), (net.head.aux, plain.aux_classifier)
    for own, other in stages:
        grads = [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in (own, other)]
        assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()
    net.eval()
    loss, terms, _ = net.loss(images, masks, Criterion("ce"))  # of validation: as without the classifier
    assert terms.keys() == {"ce"} and loss.item() == pytest.approx(terms["ce"].item())


def test_segformer_gives_the_logits_of_transformers():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    net = build("segformer_b0").eval()
    plain = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3)).eval()
    plain.segformer.load_state_dict(net.backbone.net.state_dict())
    plain.decode_head.load_state_dict(net.head.net.state_dict())
    images = random_images(2, 3, 64, 96)
    with torch.no_grad():
        want = plain(pixel_values=(images - net.mean) / net.std).logits  # (B, K, H/4, W/4)
        want = F.interpolate(want, size=(64, 96), mode="bilinear", align_corners=False)
        assert torch.allclose(net(images), want, atol=1e-4)


def test_segformers_have_the_parameters_of_the_paper():
    """Table 1 of the paper: encoder and decoder in millions, 150 classes."""
    paper = dict(zip(SEGFORMER, (3.8, 13.7, 27.5, 47.3, 64.1, 84.7), strict=True))
    for arch, millions in paper.items():
        with torch.device("meta"):
            parts = build_baseline(ModelSpec(arch=arch, num_classes=150))
        count = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.02), arch


@pytest.mark.parametrize("arch", ARCHS)
def test_any_size_and_a_last_batch_of_one(arch):
    net = build(arch).train()
    for size in ((1, 1), (33, 20)):
        logits = net(random_images(1, 3, *size))
        assert logits.shape == (1, 3, *size) and logits.dtype == torch.float32 and logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.head.parameters())


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=pytest.mark.long if arch == "deeplabv3_resnet101" else ()) for arch in ARCHS],
)
def test_checkpoints_need_no_other_file(arch, tmp_path):
    net = build(arch, normalize="none").eval()
    torch.save(pack_checkpoint(net, CLASSES, (32, 32)), tmp_path / "model.pth")
    loaded, checkpoint = load_model(tmp_path / "model.pth")
    images = random_images(1, 3, 40, 37)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    assert checkpoint["spec"].arch == arch and loaded.std.flatten().tolist() == [255.0] * 3


def test_all_of_it_trains_or_the_decoder_alone_with_its_dropout():
    net = build("segformer_b0").train()
    assert net.parameter_counts()[0] == net.parameter_counts()[1]
    kinds = {type(part).__name__: part.training for part in net.backbone.modules()}
    assert kinds["SegformerDropPath"]
    frozen = build("segformer_b0", unfreeze=0).train()
    assert not any(part.training for part in frozen.backbone.net.modules()) and frozen.head.training
    with pytest.raises(InputError, match="--unfreeze 2: the backbone has 0 blocks; give 0 or all"):
        build("segformer_b0", unfreeze=2)


# --- pretrained weights, offline --------------------------------------------------------------------------
@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """A TORCH_HOME with the ResNet-50 file as torchvision leaves it; the network may not be asked."""
    place = tmp_path / "home/hub/checkpoints"
    place.mkdir(parents=True)
    torch.manual_seed(3)
    torch.save(resnet50().state_dict(), place / "resnet50-0676ba61.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return place


def test_resnet_weights_come_from_torchvisions_cache(torch_home):
    weights = torch.load(torch_home / "resnet50-0676ba61.pth")
    state = build("fcn_resnet50", weights="auto").backbone.net.state_dict()
    assert state.keys() == weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in state.items())
    with pytest.raises(InputError, match="put https://download.pytorch.org/models/resnet101-.* into .*"):
        build("deeplabv3_resnet101", weights="auto")


def test_the_encoder_of_a_whole_network_file_is_read(torch_home, tmp_path):
    whole = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(whole.state_dict(), tmp_path / "coco.pth")
    net = build("fcn_resnet50", weights=str(tmp_path / "coco.pth"))
    for name, value in net.backbone.net.state_dict().items():
        assert torch.equal(value, whole.state_dict()[f"backbone.{name}"])
    with pytest.raises(InputError, match="coco.pth does not fit the model"):
        build("deeplabv3_resnet101", weights=str(tmp_path / "coco.pth"))


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
want = file["segformer.encoder.block.0.0.attention.self.query.weight"]
for weights in ("auto", sys.argv[1] + "/model.safetensors"):
    state = build_model(ModelSpec(arch="segformer_b0", num_classes=3), weights).backbone.net.state_dict()
    assert any(value.shape == want.shape and torch.equal(value, want) for value in state.values()), weights
    assert sum(value.numel() for value in state.values()) + 2 * 257 == sum(v.numel() for v in file.values())
for arch, weights in (("segformer_b1", "auto"), ("segformer_b1", sys.argv[1] + "/model.safetensors")):
    try:
        build_model(ModelSpec(arch=arch, num_classes=3), weights)
    except InputError as error:
        print(error)
"""


@pytest.mark.long
def test_segformer_weights_come_from_the_hugging_face_cache(tmp_path):
    """The cache as the hub client lays it out; transformers reads its place when it is imported."""
    repo = tmp_path / "hf/hub/models--nvidia--mit-b0"
    snapshot = repo / "snapshots/0123456789abcdef"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0123456789abcdef")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    code = [sys.executable, "-c", HUGGING_FACE + FROM_CACHE, str(snapshot)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    missing, misfit = done.stdout.splitlines()
    assert missing.startswith("the pretrained weights of nvidia/mit-b1 are not in the Hugging Face cache")
    assert "https://huggingface.co/nvidia/mit-b1/resolve/main/pytorch_model.bin" in missing
    assert "does not fit segformer_b1" in misfit and json.loads((snapshot / "config.json").read_text())


BESIDE_OUR_FILES = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "first":
    import datasets, evaluate
import torch
from transformers import SegformerForSemanticSegmentation, SegformerConfig, Trainer
from model import ModelSpec, build_model
net = build_model(ModelSpec(arch="segformer_b0", num_classes=3), unfreeze="all").train()
net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).sum().backward()
import datasets, evaluate
assert datasets.__file__.startswith(sys.argv[2]) and datasets.DATASETS and evaluate.__file__
"""


@pytest.mark.long
@pytest.mark.parametrize("order", ["first", "last"])
def test_files_of_ours_named_like_packages_do_not_confuse_transformers(order, tmp_path):
    if not (ROOT / "evaluate.py").exists():
        (tmp_path / "evaluate.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_OUR_FILES, str(tmp_path), str(ROOT), order],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
