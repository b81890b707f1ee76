"""An image and all its targets stay aligned through every transform that is registered."""
import colorsys
import dataclasses
import importlib
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import blocks
from PIL import Image

from dataio.dataloader import SegmentationDataset
from dataio.readers import Sample, index_table
from dataio.resizing import PADDING_COLOR, resize_image, resize_map, resize_mask, resize_targets
from dataio.transforms import AUGMENTS, CopyPaste, ScaleCrop, augment, fingerprint, is_mixed


def shaded(height=120, width=170, seed=3):
    """Return an image whose red channel is 40 times its mask, and the mask: any misalignment shows."""
    mask = torch.from_numpy(blocks(height, width, (1, 2, 3, 4, 5), seed=seed))
    return (mask * 40).expand(3, -1, -1).clone(), mask


def augmented(image, mask, size, names, seed=0):
    """Return image and mask after augment() with this seed."""
    torch.manual_seed(seed)
    image, targets = augment(image, {"mask": mask}, size, names)
    return image, targets["mask"]


# --- every registered augmentation, alone and all together ------------------------------------------------
COMBINATIONS = [(name,) for name in AUGMENTS] + [(), tuple(AUGMENTS)]


@pytest.mark.parametrize("names", COMBINATIONS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (97, 211), (301, 75)], ids=str)
def test_targets_keep_their_values_and_their_place(names, size):
    """Class ids far apart, so that mixing two gives a third, and never 0, so that a wrong fill shows. The map
    has the ids as its numbers, the labels are another size.
    """
    ids = (3, 60, 117, 174, 231)
    mask = torch.from_numpy(np.array(ids, np.uint8)[blocks(120, 170, (0, 1, 2, 3, 4), seed=3)])
    image = mask.expand(3, -1, -1).clone()
    targets = {"mask": mask, "labels": resize_mask(mask, (240, 340)), "map": mask.float()}
    for seed in range(4):
        torch.manual_seed(seed)
        out, moved = augment(image, targets, size, names)
        assert out.shape == (3, *size) and out.dtype == torch.uint8 and list(moved) == list(targets)
        labels, numbers = moved["mask"], moved["map"]
        assert all(target.shape == size for target in moved.values())
        assert labels.dtype == moved["labels"].dtype == torch.uint8 and numbers.dtype == torch.float32
        assert {*labels.unique().tolist(), *moved["labels"].unique().tolist()} <= {*ids, 255}
        counted = labels != 255
        for other, known in ((moved["labels"].float(), moved["labels"] != 255), (numbers, ~numbers.isnan())):
            differs = (known != counted).float().mean()  # crops of crops resize what was made up, too
            assert differs < 0.05 if len(names) > 1 else differs == 0
            assert ((other > ids[0] - 0.01) & (other < ids[-1] + 0.01))[known].all()
            apart = ((other - labels.float()).abs() > 20)[known & counted]
            if len(names) < 2:  # several crops blur a map
                assert apart.float().mean() < 0.12, "a target is not where the mask is"
        plain = resize_mask(mask, size)
        if len(names) > 1 or torch.equal(labels, plain):
            continue  # those that leave pixels where they are may do with them what they like
        gray = out.float().mean(0)
        shades = torch.stack([gray[labels == id].median() for id in ids if (labels == id).any()])
        assert (shades.diff() > 15).all(), "the classes' shades are no longer in their order"
        nearest = (gray[..., None] - shades).abs().argmin(-1)
        rank = torch.searchsorted(labels[counted].unique(), labels[counted])
        wrong = (nearest[counted] != rank).float().mean()
        assert wrong < 0.12, f"{wrong:.3f} of the pixels are not where their mask is"


@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentations_depend_on_torchs_generator_alone_and_do_something(name):
    generator = np.random.default_rng(0)
    mask = torch.from_numpy(blocks(48, 56, (1, 2, 3), seed=1))
    image = torch.from_numpy(generator.integers(0, 256, (3, 48, 56), dtype=np.uint8))
    before, results = image.clone(), []
    for seed in (*range(20), *range(20)):
        np.random.seed(len(results))
        out, labels = augmented(image, mask, (48, 56), (name,), seed)
        results.append(torch.cat([out.flatten(), labels.flatten()]))
    for first, second in zip(results[:20], results[20:], strict=True):
        assert torch.equal(first, second)
    assert any(not torch.equal(results[0], other) for other in results[1:20])
    assert torch.equal(image, before)  # what came in is left as it was


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_fingerprint_holds_every_parameter_of_an_augmentation(name, monkeypatch):
    step, fields = AUGMENTS[name], dataclasses.fields(AUGMENTS[name])
    fingerprints = {fingerprint(()), fingerprint((name,)), fingerprint((name,))}
    for field in fields:
        value = getattr(step, field.name)
        other = (*value, 1) if isinstance(value, tuple) else repr(value)
        monkeypatch.setitem(AUGMENTS, name, dataclasses.replace(step, **{field.name: other}))
        fingerprints.add(fingerprint((name,)))
    assert len(fingerprints) == 2 + len(fields)


def test_a_fingerprint_is_of_the_module_that_defines_an_augmentation(tmp_path, monkeypatch):
    """Where that is another than dataio/transforms.py."""
    fingerprints = set()
    for factor in (2, 3):
        path = tmp_path / f"version{factor}/mine.py"
        path.parent.mkdir()
        path.write_text(f"from dataio.transforms import Flip\n\nclass Mine(Flip):\n    factor = {factor}\n")
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        monkeypatch.setitem(AUGMENTS, "mine", importlib.import_module("mine").Mine())
        fingerprints.add(fingerprint(("mine",)))
    assert len(fingerprints) == 2


@pytest.mark.parametrize("wrong", ["size", "type", "target"])
def test_an_augmentation_that_returns_something_else_is_stopped(wrong, monkeypatch):
    """It would train at another size, or on images that are almost black."""
    def step(image, targets, size):
        return {"size": (image[:, ::2, ::2], {"mask": targets["mask"][::2, ::2]}),
                "type": (image / 255, targets), "target": (image, {})}[wrong]

    step.resizes, step.zoom = False, 1.0
    monkeypatch.setitem(AUGMENTS, "new", step)
    with pytest.raises(ValueError, match="--augment new"):
        augmented(*shaded(60, 80), (48, 56), ("new",))


# --- each of them -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "low", "high"), [
    ("crop", 0.5, 2), ("crop-linear", 0.5, 2), ("crop-ms", 1, 3),
])
@pytest.mark.parametrize("shape", [(60, 200), (200, 60)], ids=str)
def test_crops_have_the_scale_that_they_say(name, low, high, shape):
    """The image's values are its columns (rows): their slope is 1 / the factor of the scale."""
    size, long = (90, 100), max(shape)
    ramp = torch.arange(long, dtype=torch.uint8)
    plane = ramp.expand(shape) if shape[1] == long else ramp[:, None].expand(shape)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    base = (min if name == "crop" else max)(size[0] / shape[0], size[1] / shape[1])
    factors = []
    for seed in range(40):
        out, labels = augmented(plane.expand(3, -1, -1).contiguous(), mask, size, (name,), seed)
        rows, counted = (out[0], labels) if shape[1] == long else (out[0].T, labels.T)
        line = rows[counted[:, 50] != 255]
        line = line[len(line) // 2].double()
        inside = line[(line > 5) & (line < long - 5) & (line != 124)]
        factors.append((len(inside) - 1) / (inside.max() - inside.min()).item() / base)
    assert low * 0.9 <= min(factors) < low * 1.3 and high * 0.8 < max(factors) <= high * 1.1, sorted(factors)
    assert len(set(factors)) > 10


def test_crops_with_a_limit_avoid_one_class_alone():
    """A mask with a small second class: with max_share most crops show both, without it few do."""
    mask = torch.ones(200, 200, dtype=torch.uint8)
    mask[:70, :70] = 2
    image, mixed = mask.expand(3, -1, -1) * 50, []
    for max_share in (0.75, 1.0):
        step, both = ScaleCrop(scale=(2.0, 2.0), max_share=max_share), 0
        for seed in range(40):
            torch.manual_seed(seed)
            both += step(image, {"mask": mask}, (100, 100))[1]["mask"].unique().numel() > 1
        mixed.append(both)
    assert mixed[0] > 1.5 * mixed[1] > 0
    nothing = {"mask": torch.full_like(mask, 255)}
    assert step(image, nothing, (100, 100))[1]["mask"].unique().tolist() == [255]


def test_ignored_pixels_are_no_class_of_a_crop_with_a_limit():
    """Neither a second class beside the only one, nor the most of what counts."""
    mask = torch.full((10, 10), 255, dtype=torch.uint8)
    mask[:6] = 1
    assert not is_mixed(mask, 0.75)
    mask[0, :4], mask[1:] = 2, 255
    assert is_mixed(mask, 0.75) and not is_mixed(mask, 0.5)


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.9])
def test_crops_lie_where_those_of_torchvision_do(scale):
    """The same random numbers, the same windows, the same padding."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    (image, mask), step = shaded(60, 100), ScaleCrop(scale=(scale, scale))
    for seed, size in enumerate([(60, 100), (33, 120), (91, 40), (7, 200)]):
        torch.manual_seed(seed)
        out, targets = step(image, {"mask": mask}, size)
        torch.manual_seed(seed)
        factor = min(size[0] / 60, size[1] / 100) * torch.empty(1).uniform_(scale, scale).item()
        scaled = max(1, round(60 * factor)), max(1, round(100 * factor))
        crop = v2.RandomCrop(size, pad_if_needed=True,
                             fill={tv_tensors.Image: PADDING_COLOR, tv_tensors.Mask: 255})
        want, labels = crop(tv_tensors.Image(resize_image(image, scaled)),
                            tv_tensors.Mask(resize_mask(mask, scaled)))
        assert torch.equal(out, want.as_subclass(torch.Tensor))
        assert torch.equal(targets["mask"], labels.as_subclass(torch.Tensor))


def test_half_of_the_images_are_flipped_and_nothing_is_padded():
    image, mask = shaded()
    plain = resize_mask(mask, (64, 64))
    results = [augmented(image, mask, (64, 64), ("flip",), seed)[1] for seed in range(40)]
    assert 8 <= sum(torch.equal(labels, plain.flip(1)) for labels in results) <= 32
    assert all(torch.equal(labels, plain) or torch.equal(labels, plain.flip(1)) for labels in results)


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue", "none"])
def test_photometric_distortion_follows_its_formulas(change, drawn, monkeypatch):
    """Each change alone, with chosen random numbers."""
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    chosen = [0.0 if name == change else 0.9 for name in ("brightness", "contrast", "saturation", "hue")]
    numbers = [torch.full((4,), drawn), torch.tensor([*chosen, 0.9])]
    monkeypatch.setattr(torch, "rand", lambda _: numbers.pop(0))
    out, _ = AUGMENTS["photometric"](image, {}, None)
    share = 2 * drawn - 1  # the numbers are drawn from -1 to 1
    want, tolerance = image.double(), 1.0
    if change == "brightness":
        want = want + 32 * share
    elif change == "contrast":
        want = want * (1 + 0.5 * share)
    elif change in ("saturation", "hue"):
        hsv = cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2HSV).astype(float)
        if change == "saturation":
            hsv[..., 1] = np.clip(hsv[..., 1] * (1 + 0.5 * share), 0, 255)
        else:
            hsv[..., 0] = (hsv[..., 0] + round(18 * share)) % 180
        rgb = [colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.reshape(-1, 3)]
        want = 255 * torch.tensor(rgb).T.reshape(3, 20, 30).double()
        tolerance = 2.0  # of 8-bit HSV
    assert (out.double() - want.clamp(0, 255)).abs().max() <= tolerance


@pytest.mark.parametrize("early", [True, False])
def test_photometric_distortion_changes_contrast_before_or_after_the_hue(early, monkeypatch):
    """A contrast of 1.5 clips red; a hue of 60 degrees more before or after it gives other colors."""
    image = torch.tensor([250, 150, 20], dtype=torch.uint8).view(3, 1, 1)
    step = dataclasses.replace(AUGMENTS["photometric"], hue=30)
    numbers = [torch.tensor([0.5, 1.0, 0.5, 1.0]), torch.tensor([0.9, 0.0, 0.9, 0.0, 0.0 if early else 0.9])]
    monkeypatch.setattr(torch, "rand", lambda _: numbers.pop(0))
    color = step(image, {}, None)[0].flatten().tolist()

    def turned(color):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
        return [255 * channel for channel in colorsys.hsv_to_rgb((hue + 60 / 360) % 1, saturation, value)]

    def contrasted(color):
        return [min(255, 1.5 * channel) for channel in color]

    before, after = turned(contrasted((250, 150, 20))), contrasted(turned((250, 150, 20)))
    assert np.abs(np.subtract(before, after)).max() > 20
    assert color == pytest.approx(before if early else after, abs=6)  # 8-bit HSV


# --- resizing ---------------------------------------------------------------------------------------------
def test_targets_are_resized_without_a_shift():
    """A centered disc must keep its center; torch's plain `nearest` would move it by two source pixels."""
    rows, columns = np.mgrid[:500, :500] - 249.5
    disc = torch.from_numpy(((rows**2 + columns**2) < 150**2).astype(np.uint8))
    targets = resize_targets({"mask": disc, "map": disc.float()}, (100, 100))
    for small in targets.values():
        center = (small.float().sum(1) @ torch.arange(100.0) / small.sum()).item()
        assert abs(center - 49.5) < 0.05
    soft = resize_image((disc * 255).expand(3, -1, -1), (100, 100))[0]
    assert ((soft > 127) != (targets["mask"] > 0)).float().mean() < 0.01
    assert (soft / 255 - targets["map"]).abs().max() < 0.01


@pytest.mark.parametrize("size", [(20, 30), (80, 120), (40, 60), (13, 200)])
def test_an_unknown_pixel_of_a_map_reaches_its_neighbors_alone(size):
    values = torch.linspace(2, 5, 40 * 60).view(40, 60)
    values[10, 20] = values[30:, 50:] = torch.nan
    small = resize_map(values, size)
    ys = ((torch.arange(size[0]) + 0.5) * 40 / size[0]).long()
    xs = ((torch.arange(size[1]) + 0.5) * 60 / size[1]).long()
    around = torch.nn.functional.max_pool2d(values.isnan().float()[None], 7, 1, 3)[0][ys][:, xs] > 0
    assert not small[~around].isnan().any() and small[ys >= 34][:, xs >= 54].isnan().all()
    assert small[~small.isnan()].min() >= 2 and small[~small.isnan()].max() <= 5  # no zeros are mixed in
    assert (small - values[ys][:, xs])[~around].abs().max() < 0.1


@pytest.mark.parametrize("able", ["AVX2", "DEFAULT"])
@pytest.mark.parametrize("shape", [(3, 45, 61), (2, 3, 30, 41), (3, 7, 1), (3, 400, 9)])
def test_images_are_resized_as_by_torchvision(monkeypatch, shape, able):
    """With and without the processor's own way for bytes, of which torchvision knows too."""
    from torchvision.transforms.v2 import functional
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: able)
    planar = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for image in (planar, planar.movedim(-3, -1).contiguous().movedim(-1, -3)):  # as they are decoded
        for size in ((28, 42), (90, 122), shape[-2:], (3, 2), (45, 20)):
            want, resized = functional.resize(image, list(size), antialias=True), resize_image(image, size)
            assert torch.equal(resized, want) and resized.dtype == torch.uint8
            assert resized.stride() == want.stride()


# --- copy-paste -------------------------------------------------------------------------------------------
def test_rare_classes_are_pasted_where_they_lie_and_nothing_else_changes(tmp_path):
    """Images are gray, 10 x their class and 1 for each file: where a pixel comes from shows."""
    counts = np.zeros((5, 4), np.int64)  # class 2 is rare, class 3 is nowhere
    samples = []
    for number in range(5):
        mask = np.random.default_rng(number).integers(0, 2, (40, 56), dtype=np.uint8)
        if number in (1, 3):
            mask[5 * number:5 * number + 4, 7:19] = 2
        mask[:2] = 255
        counts[number] = np.bincount(mask.ravel(), minlength=256)[:4]
        image = np.where(mask == 255, 250, 10 * mask + number).astype(np.uint8)
        sample = Sample(tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png")
        Image.fromarray(image).save(sample.image)
        Image.fromarray(mask).save(sample.mask)
        samples.append(sample)
    copy_paste = CopyPaste.of(counts, 0.6)
    assert copy_paste.images == {2: [1, 3]}
    plain = SegmentationDataset(samples, index_table(4), (40, 56), ())
    pasting = SegmentationDataset(samples, index_table(4), (40, 56), (), copy_paste=copy_paste)
    pasted_from = []
    for item in range(200):
        (image, targets, _), (before, mask) = pasting[item], plain[item][:2]
        assert torch.equal(pasting[item][0], image)  # drawn by seed, epoch and image alone
        changed = (image != before).any(0)
        assert (targets["mask"][changed] == 2).all() and torch.equal(targets["mask"][~changed],
                                                                     mask["mask"][~changed])
        if changed.any():
            (value,) = image[:, changed].unique().tolist()
            other = plain[value - 20]
            assert torch.equal(changed, (other[1]["mask"] == 2) & (before != other[0]).any(0))
            pasted_from.append(value - 20)
    assert {*pasted_from} == {1, 3} and 60 < len(pasted_from) < 130  # 120, without those of their own
    assert CopyPaste.of(np.array([[50, 50]]), 0.6).draw() is None  # nothing is rare


def test_each_rare_class_is_drawn_as_often_as_the_others():
    counts = np.array([[1000, 1, 0, 900]] * 90 + [[1000, 0, 1, 900]] * 3)
    torch.manual_seed(0)
    drawn = [CopyPaste.of(counts, 1.0).draw() for _ in range(2000)]
    assert np.mean([index >= 90 for index in drawn]) == pytest.approx(0.5, abs=0.05)
    assert len({*drawn}) == 93
