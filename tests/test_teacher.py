"""--teacher: a student learns from the logits of a trained model, the same by every path."""
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import build, call, history_of, tiny, train_flags, write_folder
from PIL import Image
from test_engine import FLOAT32, batches_of, random_batch, state_of, weights_of

import train
from dataio.contents import paths_in
from dataio.dataloader import SegmentationDataset
from dataio.feature_cache import cache_features
from dataio.readers import Sample, index_table
from engine import Distillation, train_one_epoch
from losses import Criterion, distillation
from models.teacher import Teacher, WithTeacher, soft_logits
from models.upsampling import geometry_of

STUDENT = "--arch", "fpn_mobilenetv4_small", "--weights", "none"


# --- the loss -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_divergence_of_softened_probabilities(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 3, 4, generator=generator).double() for _ in range(2))
    points = []
    for logits, wanted in zip(student.movedim(1, 3).reshape(-1, 5), teacher.movedim(1, 3).reshape(-1, 5),
                              strict=True):
        p = [math.exp(value / temperature) for value in logits.tolist()]
        q = [math.exp(value / temperature) for value in wanted.tolist()]
        points.append(sum(b / sum(q) * math.log(b * sum(p) / (a * sum(q))) for a, b in
                          zip(p, q, strict=True)))
    expected = temperature ** 2 * np.mean(points)
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)
    assert distillation(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def test_a_certain_teacher_is_a_label():
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    teacher = 1e4 * torch.nn.functional.one_hot(labels, 4).movedim(3, 1).float()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert distillation(logits, teacher, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)


# --- where they are compared --------------------------------------------------------------------------------
class Colors(torch.nn.Module):
    """A network whose logits are the colors of the pixels, or of every second one."""

    def __init__(self, step=1):
        super().__init__()
        self.step, self.sizes = step, []

    def logits(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        size = [side // self.step for side in images.shape[-2:]]
        coarse = torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return coarse, geometry_of(images.shape[-2:])


@pytest.mark.parametrize("size", [(64, 96), (45, 70)], ids=str)
@pytest.mark.parametrize("seen", [None, (128, 192), (90, 100), (32, 48)], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_teacher_and_student_are_compared_at_the_same_points(size, seen, step):
    """Of a picture that gets brighter to the right and to the bottom, both say the same at any size."""
    rows, columns = (torch.linspace(0.5 / side, 1 - 0.5 / side, side) for side in size)
    image = torch.stack([columns.expand(size), rows[:, None].expand(size), columns.expand(size).flip(1)])
    images = (255 * image).round().to(torch.uint8)[None]
    network = Colors(step)
    teacher = Teacher(network, seen)(images)
    student = soft_logits(*Colors(1).logits(images), size)
    assert network.sizes == [seen or size] and teacher.shape == student.shape
    inner = slice(2, -2)  # where no picture is continued beyond its edge
    assert (teacher - student)[..., inner, inner].abs().max() < 2.5


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    net = tiny()
    objective = Distillation(net, Criterion("ce"), 1.0, 2.0, Teacher(net))
    objective.eval()
    images, masks = random_batch(3, 31, 45)
    loss, terms, preds, _ = objective(images, {"mask": masks})
    assert terms["teacher"].item() == pytest.approx(0, abs=1e-5) and preds.shape == masks.shape
    labeled = (masks != 255).float().mean()
    assert loss.item() == pytest.approx((labeled * terms["ce"]).item(), rel=1e-4)


# --- the objective ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "size", "accumulate"), [(8, 2, 4), (7, 2, 2)])
def test_accumulated_steps_equal_the_large_batch(count, size, accumulate):
    """With images of which none, some or all pixels have a label."""
    images, masks = random_batch(count, 21, 33)
    masks[1], masks[4] = 255, 0
    masks[2, :10] = 255
    teacher, weights = Teacher(tiny(head="linear")), []
    for batch, steps in ((size, accumulate), (size * accumulate, 1)):
        student = tiny(head="linear", unfreeze="all")
        with torch.no_grad():
            student.head.conv_seg.weight.mul_(-1)
        student.head.eval()
        objective = Distillation(student, Criterion("ce"), 0.7, 2.0, teacher)
        train_one_epoch(objective, batches_of(images, masks, batch), state_of(student, 0.1),
                        lambda step: 1.0, steps)
        weights.append(weights_of(student))
    assert torch.allclose(*weights, atol=1e-5)


def test_images_without_labels_teach_and_the_teacher_stays_as_it_is():
    images, masks = random_batch(4, 21, 33)
    teacher, student = Teacher(tiny()), tiny(unfreeze="all")
    with torch.no_grad():
        student.head.conv_seg.weight.mul_(-1)
    before, own = weights_of(teacher), weights_of(student)
    objective = Distillation(student, Criterion("ce+lovasz"), 1.0, 1.0, teacher)
    losses = [train_one_epoch(objective, batches_of(images, torch.full_like(masks, 255), 2),
                              state_of(student, 0.05), lambda step: 1.0)["loss"] for _ in range(4)]
    assert losses[-1] < 0.7 * losses[0] and not torch.equal(own, weights_of(student))
    assert torch.equal(before, weights_of(teacher)) and not teacher.training


# --- the cache ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("student", ["whole network", "frozen backbone", "all trains"])
def test_a_cache_gives_the_loss_of_a_live_teacher(student, tmp_path):
    root = write_folder(tmp_path / "data", count=5)
    samples = [Sample(path, root / "masks" / path.name) for path in sorted((root / "images").iterdir())]
    make = {"whole network": lambda: build(arch="fpn_mobilenetv4_small", unfreeze="all"),
            "frozen backbone": lambda: tiny(head="detail"), "all trains": lambda: tiny(unfreeze="all")}
    net = make[student]()
    teacher = Teacher(tiny(head="linear"), (42, 56))
    dataset = SegmentationDataset(samples, index_table(3), (37, 51), ("flip",), seed=3)
    cached = cache_features(WithTeacher(net, teacher), dataset, tmp_path / "cache", FLOAT32, 2)
    criterion = Criterion("ce")
    live, stored = (Distillation(net, criterion, 1.0, 2.0, who).eval() for who in (teacher, None))
    for item in (1, 5 + 3, 5 + 1):
        image, targets, _ = dataset[item]
        expected = live(image[None], {"mask": targets["mask"][None]})
        features, targets, _ = cached.collate([cached[item]])
        loss, terms, *_ = stored(features, targets)
        assert terms["teacher"].item() == pytest.approx(expected[1]["teacher"].item(), rel=0.03)
        assert loss.item() == pytest.approx(expected[0].item(), rel=0.03)
    teacher.model.head.conv_seg.weight.data.mul_(-1)  # another teacher, another file
    other = cache_features(WithTeacher(net, Teacher(teacher.model, (42, 56), "another")), dataset,
                           tmp_path / "cache", FLOAT32, 2)
    first, second = (dataset.collate([dataset[1]])[1]["teacher"] for dataset in (cached, other))
    assert torch.allclose(first, -second, atol=0.3) or not torch.allclose(first, second, atol=0.1)


# --- runs ---------------------------------------------------------------------------------------------------
def flags_of(trained, out, *more):
    """Return the flags of a student of the shared run."""
    data, teacher = trained
    own = ("--dataset", "folder", "--data-root", data, "--imgsz", 42, 56, "--batch-size", 4, "--workers", 0,
           "--amp", "off", "--epochs", 2, "--out-dir", out, "--teacher", teacher / "best_model_iou.pth")
    return (*own, *STUDENT, *more)


def test_cached_and_live_runs_agree_and_a_stop_costs_nothing(trained, tmp_path, run):
    rows = {}
    cache = "--cache-features", tmp_path / "cache", "--cache-views", 2
    for name, more in (("live", ()), ("cached", cache)):
        code, text, err = run(train, *flags_of(trained, tmp_path / name, *more))
        assert code == 0 and "teacher: " in text, err
        rows[name] = history_of(tmp_path / name)
    for live, cached in zip(rows["live"], rows["cached"], strict=True):
        for key in ("train_loss", "train_loss_teacher", "train_loss_ce", "val_loss"):
            if key == "val_loss":
                assert "val_loss_teacher" not in live  # that of labels alone
            assert live[key] == pytest.approx(cached[key], rel=0.05), key
        assert live["train_loss_teacher"] > 0
    call(train, *flags_of(trained, tmp_path / "resumed", "--epochs", 1, "--scheduler", "none"))
    call(train, *flags_of(trained, tmp_path / "straight", "--scheduler", "none"))
    assert not run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path / "resumed")[0]
    last = [history_of(tmp_path / name)[1] for name in ("resumed", "straight")]
    assert last[0]["train_loss"] == pytest.approx(last[1]["train_loss"], rel=1e-4)


def test_an_extra_folder_may_hold_images_alone(trained, tmp_path, run):
    photos = tmp_path / "photos"
    more = write_folder(tmp_path / "more", count=3, values=(0, 2))
    shutil.copytree(more / "images", photos)
    shutil.copy(trained[0] / "images/00.png", photos / "known.png")
    flags = flags_of(trained, tmp_path / "out", "--extra", photos, "--epochs", 1)
    code, text, err = run(train, *flags)
    assert code == 0 and "3 images without labels" in text, err
    assert history_of(tmp_path / "out")[0]["train_loss_teacher"] > 0
    without = [flag for flag in flags if flag not in ("--teacher", trained[1] / "best_model_iou.pth")]
    code, _, err = run(train, *without, "--out-dir", tmp_path / "other")
    assert code == 2 and err.count("\n") == 1 and str(photos) in err


def test_masks_that_do_not_pair_are_no_photos(trained, tmp_path, run):
    """Images alone have no labels; masks of other names, or annotations that are not read, are a mistake."""
    more = write_folder(tmp_path / "more", count=3)
    for number, path in enumerate((more / "masks").iterdir()):
        path.rename(path.with_name(f"x_{chr(97 + number)}.png"))
    photos = shutil.copytree(more / "images", tmp_path / "photos")
    (photos / "labels.xyz").write_text("what is this")
    for folder in (more, photos):
        code, _, err = run(train, *flags_of(trained, tmp_path / "out", "--extra", folder))
        assert code == 2 and err.count("\n") == 1 and str(folder) in err, err


def test_what_does_not_fit_is_refused(trained, tmp_path, run):
    def refusal(*flags):
        code, _, err = run(train, *flags)
        assert code == 2 and err.count("\n") == 1, err
        return err

    data = write_folder(tmp_path / "others", count=6)
    (data / "classes.txt").write_text("ground\nroof\npool\n")
    assert "ground" in refusal(*flags_of((data, trained[1]), tmp_path / "out"))
    assert "--value-range" in refusal(*flags_of(trained, tmp_path / "out", "--value-range", 0, 100))
    assert "--train-scale" in refusal(*flags_of(trained, tmp_path / "out", "--train-scale", "native"))
    assert "--out-dir" in refusal(*flags_of(trained, trained[1]))
    refusal(*flags_of(trained, tmp_path / "out", "--teacher", tmp_path / "out"))
    assert "--teacher" in refusal(*train_flags(trained[0], tmp_path / "out", "--temperature", 3))
    assert "none.pth" in refusal(*train_flags(trained[0], tmp_path / "out", "--teacher", "none.pth"))


def test_another_teacher_under_the_same_name_is_noticed_at_resume(trained, tmp_path, run):
    data, teacher = trained[0], shutil.copytree(trained[1], tmp_path / "teacher")
    call(train, *flags_of((data, teacher), tmp_path / "out", "--epochs", 1))
    shutil.copy(teacher / "last.pth", teacher / "best_model_iou.pth")
    code, _, err = run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path / "out")
    assert code == 2 and "--teacher" in err and err.count("\n") == 1


def test_images_of_a_teachers_training_are_known(trained, tmp_path, run):
    """Also where the student's own training leaves them out."""
    other = write_folder(tmp_path / "other", count=4)
    for path in [*(other / "images").iterdir(), *(other / "masks").iterdir()]:
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    for name in ("images", "masks"):  # one image of the teacher's, to validate on
        (other / "val" / name).mkdir(parents=True)
        (other / "train").mkdir(exist_ok=True)
        shutil.move(other / name, other / "train" / name)
    known = torch.load(trained[1] / "last.pth")["trained_on"]
    assert known
    path = paths_in(known, sorted((trained[0] / "images").iterdir()))[0]
    shutil.copy(path, other / "val/images")
    shutil.copy(trained[0] / "masks" / path.name, other / "val/masks")
    code, text, err = run(train, *flags_of((other, trained[1]), tmp_path / "out", "--epochs", 1))
    assert code == 0 and "warning" in text and "trained on" in text, err
