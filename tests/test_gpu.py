"""What runs on a GPU keeps its tensors there: on torch's fake tensors, which have a device and no values.

An operation on tensors of two devices raises, as on a GPU. A real one is needed for what depends on values
(lovasz, the matching of the mask head, printed losses), for gradients, autocast and torch.compile.
"""
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import build, targets_of, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import Distillation, Objective
from inference.predictor import Predictor, make_protocol
from inference.video import Paint
from losses import LOSSES, Criterion
from metrics import ConfusionMatrix
from models.backbones import Part, features_of_parts
from models.baselines import BASELINES
from models.heads import HEADS
from models.teacher import Teacher, WithTeacher
from visualize import color_table

CUDA = torch.device("cuda")
FAKE = FakeTensorMode()  # one for all: some functions keep tensors that they made
SIZE = 57, 71
CLASSES = [["sky", [0, 0, 9]], ["tar", [9, 0, 0]], ["crack", [0, 9, 0]]]


def on_gpu(net):
    """Return a copy of a module on the GPU, without values."""
    net = copy.deepcopy(net)
    with FAKE:
        for module in net.modules():
            for tensors in (module._parameters, module._buffers):
                for name, values in tensors.items():
                    if values is not None:
                        moved = torch.empty(values.shape, dtype=values.dtype, device=CUDA)
                        tensors[name] = nn.Parameter(moved, values.requires_grad)
    return net


def fake_images(size=SIZE):
    return torch.zeros(2, 3, *size, dtype=torch.uint8, device=CUDA)


@pytest.fixture
def no_engine(monkeypatch):
    """The gradients that a loss takes on its way are taken for 0: those of a GPU need one."""
    monkeypatch.setattr(torch.autograd, "grad", lambda total, values: (torch.zeros_like(values),))


NETS = {**{head: dict(backbone="vit_tiny", head=head) for head in HEADS if head != "mask"},
        **{arch: dict(arch=arch) for arch in BASELINES if arch[-1] not in "2345"}}  # the larger SegFormers


@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_every_network_takes_a_loss_and_a_confusion_matrix_on_the_gpu(options, no_engine):
    net = on_gpu(build(unfreeze="all", **options)).train()
    with FAKE:
        images, masks = fake_images(), fake_images()[:, 0]
        loss, terms, preds, weight = Objective(net, Criterion("ce"))(
            images, {"mask": masks, **targets_of(net.head, masks)})
        matrix = ConfusionMatrix(3, CUDA)
        matrix.update(preds, masks)
    devices = {value.device.type for value in (loss, preds, weight, matrix.counts, *terms.values())}
    assert devices == {"cuda"} and preds.shape == masks.shape


@pytest.mark.parametrize("cached", [False, True])
def test_a_student_learns_from_its_teacher_on_the_gpu(cached, no_engine):
    student = on_gpu(build(arch="fpn_mobilenetv4_small", unfreeze="all")).train()
    teacher = Teacher(on_gpu(tiny(head="detail").eval()), (42, 56))
    with FAKE:
        images = fake_images()
        targets = {"mask": images[:, 0]}
        if cached:
            both = WithTeacher(student.eval(), teacher)
            parts = both.compute_parts(both.cached_parts(), images)
            targets["teacher"] = parts[Part("teacher")]
            images = features_of_parts({Part("image"): parts[Part("image")]}, both.geometry(SIZE))
        objective = Distillation(student, Criterion("ce"), 1.0, 2.0, None if cached else teacher)
        loss, terms, preds, weight = objective(images, targets)
    assert {value.device.type for value in (loss, preds, weight, *terms.values())} == {"cuda"}
    assert preds.shape == (2, *SIZE)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "lovasz"])
def test_losses_stay_on_the_gpu(loss, no_engine):
    with FAKE:
        masks, weights = fake_images()[:, 0].long(), torch.ones(3, device=CUDA)
        value, terms = Criterion(loss, weights)(torch.zeros(2, 3, *SIZE, device=CUDA), masks)
    assert value.device.type == "cuda" and all(term.device.type == "cuda" for term in terms.values())


@pytest.mark.parametrize("head, kind, tta", [("bn", "whole", ""), ("detail", "whole", "ms,flip"),
                                             ("mask", "slide", "flip"), ("unet-skip", "tile", "")])
def test_label_maps_are_made_and_painted_on_the_gpu(head, kind, tta):
    net, protocol = tiny(head=head).eval(), make_protocol(kind, tta, (28, 42))
    predictor = Predictor(net, dict(classes=CLASSES, imgsz=(28, 42)), "cpu", protocol)
    predictor.device, predictor.model = CUDA, on_gpu(net)
    predictor.precision = SimpleNamespace(autocast=nullcontext)
    with FAKE:
        images = fake_images()
        preds = [predictor.label_maps(images), *predictor.predict_at(images, [SIZE, (30, 20)])]
        painted = Paint(color_table(CLASSES), 0.5, 0, CUDA)(images.permute(0, 2, 3, 1), preds[0])
    assert all(values.device.type == "cuda" for values in (*preds, painted))
    assert [tuple(pred.shape) for pred in preds] == [(2, *SIZE), SIZE, (30, 20)]


@pytest.mark.parametrize("unfreeze", [0, 2])
def test_what_a_cache_keeps_is_computed_on_the_gpu_and_taken_up_there(unfreeze):
    net = on_gpu(tiny(head="detail", unfreeze=unfreeze).eval())
    with FAKE:
        values = net.compute_parts(net.cached_parts(), fake_images((56, 70)))
    assert values and all(part.device.type == "cuda" for part in values.values())


def test_tensors_of_two_devices_are_noticed():
    net = on_gpu(tiny().eval())
    with FAKE:
        net.mean = torch.zeros(1, 3, 1, 1)  # as one that was forgotten
        with pytest.raises(RuntimeError):
            net(fake_images())
