"""Image and mask stay aligned through every transform that is registered."""

import colorsys
import dataclasses

import cv2
import numpy as np
import pytest
import torch
from conftest import blocks

from dataio import transforms
from dataio.transforms import (AUGMENTS, ScaleCrop, augment, fingerprint, resize_image,
                               resize_mask)


def shaded_pair(height=120, width=170, seed=3):
    """Return an image whose red channel is 40 times its mask: any misalignment shows."""
    mask = torch.from_numpy(blocks(height, width, (1, 2, 3, 4, 5), seed=seed))
    return (mask * 40).expand(3, -1, -1).clone(), mask


# --- every registered augmentation, alone and all together ------------------------------------------------
COMBINATIONS = [(name,) for name in AUGMENTS] + [(), tuple(AUGMENTS)]


@pytest.mark.parametrize("names", COMBINATIONS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (97, 211), (301, 75)], ids=str)
def test_masks_keep_their_ids_their_place_and_255(names, size):
    """Class ids far apart, so that mixing two gives a third, and never 0, so that a wrong fill shows."""
    ids = (3, 60, 117, 174, 231)
    mask = torch.from_numpy(np.array(ids, np.uint8)[blocks(120, 170, (0, 1, 2, 3, 4), seed=3)])
    image = mask.expand(3, -1, -1).clone()
    for seed in range(8):
        torch.manual_seed(seed)
        out, labels = augment(image, mask, size, names)
        assert out.shape == (3, *size) and labels.shape == size
        assert out.dtype == labels.dtype == torch.uint8
        assert set(labels.unique().tolist()) <= {*ids, 255}
        plain = augment(image, mask, size, ())[1]
        if len(names) > 1 or torch.equal(labels, plain):
            continue  # those that leave pixels where they are may do with them what they like
        counted = labels != 255
        gray = out.float().mean(0)
        shades = torch.stack([gray[labels == id].median() for id in ids if (labels == id).any()])
        assert (shades.diff() > 15).all(), "the classes' shades are no longer in their order"
        nearest = (gray[..., None] - shades).abs().argmin(-1)
        wanted = torch.searchsorted(labels[counted].unique(), labels[counted])
        wrong = (nearest[counted] != wanted).float().mean()
        assert wrong < 0.12, f"{wrong:.3f} of the pixels are not where their mask is"


@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentations_depend_on_torchs_generator_alone_and_do_something(name):
    generator = np.random.default_rng(0)
    mask = torch.from_numpy(blocks(60, 80, (1, 2, 3), seed=1))
    image = torch.from_numpy(generator.integers(0, 256, (3, 60, 80), dtype=np.uint8))
    image, mask = resize_image(image, (48, 56)), resize_mask(mask, (48, 56))
    kept, results = image.clone(), []
    for seed in (*range(20), *range(20)):
        torch.manual_seed(seed)
        np.random.seed(len(results))
        results.append(torch.cat([part.flatten() for part in augment(image, mask, (48, 56), (name,))]))
    for first, second in zip(results[:20], results[20:], strict=True):
        assert torch.equal(first, second)
    assert any(not torch.equal(results[0], other) for other in results[1:20])
    assert torch.equal(image, kept)  # what came in is left as it was


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_fingerprint_holds_every_parameter_of_an_augmentation(name, monkeypatch):
    before, step = fingerprint((name,)), AUGMENTS[name]
    assert before != fingerprint(()) and before == fingerprint((name,))
    seen = {before}
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        other = (*value, 1) if isinstance(value, tuple) else repr(value)
        monkeypatch.setitem(AUGMENTS, name, dataclasses.replace(step, **{field.name: other}))
        seen.add(fingerprint((name,)))
    assert len(seen) == 1 + len(dataclasses.fields(step))


@pytest.mark.parametrize("wrong", ["size", "type"])
def test_an_augmentation_that_returns_something_else_is_stopped(wrong, monkeypatch):
    """It would train at another size, or on images that are almost black."""
    def step(image, mask, size):
        return (image[:, ::2, ::2], mask[::2, ::2]) if wrong == "size" else (image / 255, mask)

    step.resizes, step.zoom = False, 1.0
    monkeypatch.setitem(AUGMENTS, "new", step)
    with pytest.raises(ValueError, match="--augment new made image and mask .*have to be uint8"):
        augment(torch.zeros(3, 60, 80, dtype=torch.uint8), torch.zeros(60, 80, dtype=torch.uint8), (48, 56),
                ("new",))


# --- each of them -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "low", "high"), [
    ("crop", 0.5, 2), ("crop-linear", 0.5, 2), ("crop-ms", 1, 3),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(60, 200), (200, 60)], ids=str)
def test_crops_have_the_scale_that_they_say(name, low, high, shape):
    """The image's values are its columns (rows): their slope is 1 / the factor of the scale."""
    size, long = (90, 100), max(shape)
    ramp = torch.arange(long, dtype=torch.uint8)
    plane = ramp.expand(shape) if shape[1] == long else ramp[:, None].expand(shape)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    base = (min if name == "crop" else max)(size[0] / shape[0], size[1] / shape[1])
    factors = []
    for seed in range(60):
        torch.manual_seed(seed)
        out, labels = augment(plane.expand(3, -1, -1).contiguous(), mask, size, (name,))
        rows, counted = (out[0], labels) if shape[1] == long else (out[0].T, labels.T)
        line = rows[counted[:, 50] != 255]
        line = line[len(line) // 2].double()
        inside = line[(line > 5) & (line < long - 5) & (line != 124)]
        factors.append((len(inside) - 1) / (inside.max() - inside.min()).item() / base)
    assert low * 0.9 <= min(factors) < low * 1.3 and high * 0.8 < max(factors) <= high * 1.1, sorted(factors)


def test_crops_with_a_limit_avoid_one_class_alone():
    """A mask with a small second class: with max_share most crops show both, without it few do."""
    mask = torch.ones(200, 200, dtype=torch.uint8)
    mask[:70, :70] = 2
    image, shown = mask.expand(3, -1, -1) * 50, []
    for max_share in (0.75, 1.0):
        step, both = ScaleCrop(scale=(2.0, 2.0), max_share=max_share), 0
        for seed in range(40):
            torch.manual_seed(seed)
            _, labels = step(image, mask, (100, 100))
            both += labels.unique().numel() > 1
        shown.append(both)
    assert shown[0] > 1.5 * shown[1] > 0
    assert step(image, torch.full_like(mask, 255), (100, 100))[1].unique().tolist() == [255]


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue", "none"])
def test_photometric_distortion_follows_its_formulas(part, drawn, monkeypatch):
    """Each part alone, with chosen random numbers."""
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    chosen = [0.0 if one == part else 0.9 for one in ("brightness", "contrast", "saturation", "hue")]
    numbers = [torch.full((4,), drawn), torch.tensor([*chosen, 0.9])]
    monkeypatch.setattr(torch, "rand", lambda _: numbers.pop(0))
    out, _ = AUGMENTS["photometric"](image, None, None)
    share = 2 * drawn - 1  # the numbers are drawn from -1 to 1
    wanted, tolerance = image.double(), 1.0
    if part == "brightness":
        wanted = wanted + 32 * share
    elif part == "contrast":
        wanted = wanted * (1 + 0.5 * share)
    elif part in ("saturation", "hue"):
        hsv = cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2HSV).astype(float)
        if part == "saturation":
            hsv[..., 1] = np.clip(hsv[..., 1] * (1 + 0.5 * share), 0, 255)
        else:
            hsv[..., 0] = (hsv[..., 0] + round(18 * share)) % 180
        rgb = [colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.reshape(-1, 3)]
        wanted = 255 * torch.tensor(rgb).T.reshape(3, 20, 30).double()
        tolerance = 2.0  # of 8-bit HSV
    assert (out.double() - wanted.clamp(0, 255)).abs().max() <= tolerance


@pytest.mark.parametrize("early", [True, False])
def test_photometric_distortion_changes_contrast_before_or_after_the_hue(early, monkeypatch):
    """A contrast of 1.5 clips red; a hue of 60 degrees more before or after it gives other colors."""
    image = torch.tensor([250, 150, 20], dtype=torch.uint8).view(3, 1, 1)
    step = dataclasses.replace(AUGMENTS["photometric"], hue=30)
    numbers = [torch.tensor([0.5, 1.0, 0.5, 1.0]), torch.tensor([0.9, 0.0, 0.9, 0.0, 0.0 if early else 0.9])]
    monkeypatch.setattr(torch, "rand", lambda _: numbers.pop(0))
    found = step(image, None, None)[0].flatten().tolist()

    def turned(color):
        hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in color))
        return [255 * part for part in colorsys.hsv_to_rgb((hue + 60 / 360) % 1, saturation, value)]

    def contrasted(color):
        return [min(255, 1.5 * part) for part in color]

    before, after = turned(contrasted((250, 150, 20))), contrasted(turned((250, 150, 20)))
    assert np.abs(np.subtract(before, after)).max() > 20
    assert found == pytest.approx(before if early else after, abs=6)  # 8-bit HSV


def test_crops_pad_beyond_the_image_and_nothing_else_does():
    image, mask = shaded_pair()
    for names in ((), ("flip",), ("crop",), ("crop", "flip")):
        padded = 0
        for seed in range(8):
            torch.manual_seed(seed)
            out, labels = augment(image, mask, (97, 211), names)
            assert (out[0][labels == 255] == transforms.PADDING_COLOR[0]).all()
            padded += (labels == 255).any().item()
        assert bool(padded) == ("crop" in names)


def test_color_jitter_changes_the_image_and_leaves_the_mask():
    image, mask = shaded_pair()
    torch.manual_seed(0)
    out, labels = augment(image, mask, image.shape[1:], ("color",))
    assert torch.equal(labels, mask) and not torch.equal(out, image)


def test_mask_resize_has_no_half_pixel_shift():
    # A centerd disc must keep its center; torch's plain `nearest` would move it by two pixels of the source.
    rows, columns = np.mgrid[:500, :500] - 249.5
    disc = torch.from_numpy(((rows**2 + columns**2) < 150**2).astype(np.uint8))
    small = resize_mask(disc, (100, 100)).float()
    center = (small.sum(1) @ torch.arange(100.0) / small.sum()).item()
    assert abs(center - 49.5) < 0.05
    soft = resize_image((disc * 255).expand(3, -1, -1), (100, 100))[0]
    assert ((soft > 127) != (small > 0)).float().mean() < 0.01


def test_images_are_averaged_when_they_shrink():
    board = torch.zeros(3, 80, 80, dtype=torch.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 200  # plain bilinear would see only some of the squares
    assert (resize_image(board, (11, 13)).float() - 100).abs().max() < 12


def test_crops_come_in_many_scales():
    image, mask = torch.zeros(3, 100, 100, dtype=torch.uint8), torch.zeros(100, 100, dtype=torch.uint8)
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        shares.append((augment(image, mask, (80, 80), ("crop",))[1] == 0).float().mean().item())
    # scale uniform in 0.5-2: a third of the crops is padded, down to a quarter of the area
    assert min(shares) < 0.4 and 25 < sum(share == 1 for share in shares) < 55 and len(set(shares)) > 10


def test_flip_and_crop_really_happen():
    image, mask = shaded_pair()
    plain = resize_mask(mask, (64, 64))
    flipped = sum(torch.equal(augment(image, mask, (64, 64), ("flip",))[1], plain.flip(1)) for _ in range(40))
    assert 8 <= flipped <= 32
    cropped = [augment(image, mask, (64, 64), ("crop",))[1] for _ in range(5)]
    assert len({crop.numpy().tobytes() for crop in cropped}) == 5


@pytest.mark.parametrize("able", ["AVX2", "DEFAULT"])
@pytest.mark.parametrize("shape", [(3, 45, 61), (2, 3, 30, 41), (3, 7, 1), (3, 400, 9)])
def test_images_are_resized_as_by_torchvision(monkeypatch, shape, able):
    """With and without the processor's own way for bytes, of which torchvision knows too."""
    from torchvision.transforms.v2 import functional
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: able)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for given in (image, image.movedim(-3, -1).contiguous().movedim(-1, -3)):  # as they are decoded
        for size in ((28, 42), (90, 122), shape[-2:], (3, 2), (45, 20)):
            want, found = functional.resize(given, list(size), antialias=True), resize_image(given, size)
            assert torch.equal(found, want) and found.dtype == torch.uint8
            assert found.stride() == want.stride()
