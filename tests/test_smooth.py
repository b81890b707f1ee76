"""infer_video.py --smooth: against the truth of moving patterns, cuts, what was hidden, odd sizes."""

import cv2
import numpy as np
import pytest
import torch
from conftest import random_images, tiny

from benchmark import flicker
from checkpoint import pack_checkpoint
from inference.predictor import Predictor
from inference.smooth import Smoother

SIZE = 96, 128


class Noisy:
    """Stands for a predictor: probabilities of two classes, the truth's and as much noise as given."""

    def __init__(self, masks, noise=0.4):
        self.masks, self.noise = iter(masks), noise
        self.rng = np.random.default_rng(5)

    def probabilities(self, images, size):
        shares = []
        for _ in images:
            mask = cv2.resize(next(self.masks), size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
            share = np.clip(0.25 + mask / 2 + self.rng.normal(0, self.noise, size), 0.01, 0.99)
            shares.append(np.stack([1 - share, share]))
        return torch.from_numpy(np.stack(shares)).float()


def texture(height, width, seed=0):
    """Return gray patterns (height, width, 3) uint8 of several scales, that motion can be seen of."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.uniform(0, 255, (height // step, width // step)), (width, height))
              for step in (4, 9)]
    return np.repeat(np.mean(layers, 0).astype(np.uint8)[..., None], 3, 2)


def moving(count, step=3):
    """Return (images (n, 3, H, W), masks (n, H, W)): a pattern with a square that both move to the right."""
    wide = texture(SIZE[0], SIZE[1] + count * step)
    mask = np.zeros(wide.shape[:2], np.uint8)
    mask[30:66, 40:80] = 1
    starts = range((count - 1) * step, -1, -step)
    images = [wide[:, start:start + SIZE[1]] for start in starts]
    masks = [mask[:, start:start + SIZE[1]] for start in starts]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), np.stack(masks)


def alone(images, masks, **options):
    """Return what the same predictor says of every frame alone."""
    smoother = Smoother(Noisy(masks, **options))
    preds = []
    for image in images:
        smoother.gray = None
        preds.append(smoother(image[None])[0])
    return np.stack(preds)


def error(preds, masks):
    """Return the share of wrong pixels."""
    return float((preds != masks).mean())


def test_noise_is_averaged_along_the_motion():
    images, masks = moving(12)
    plain, smooth = alone(images, masks), Smoother(Noisy(masks))(images)
    assert error(smooth[4:], masks[4:]) < 0.6 * error(plain[4:], masks[4:])
    assert flicker(smooth[4:], masks[4:]) < 0.65 * flicker(plain[4:], masks[4:])


def test_it_neither_lags_nor_leads():
    """Without noise the square is where it is: an average without motion would trail behind."""
    images, masks = moving(12)
    smooth, trail = Smoother(Noisy(masks, noise=0))(images), Smoother(Noisy(masks, noise=0))
    still = np.zeros((*SIZE, 2), np.float32)
    trail.flow = type("Still", (), {"calc": lambda *_: still})()
    trail.gray = None
    assert error(smooth, masks) < 0.004
    lagging = trail(torch.full_like(images, 128))
    assert error(lagging[2:], masks[2:]) > 3 * error(smooth[2:], masks[2:])


def test_batches_give_what_single_frames_give():
    images, masks = moving(6)
    whole = Smoother(Noisy(masks))(images)
    one = Smoother(Noisy(masks))
    assert (np.concatenate([one(image[None]) for image in images]) == whole).all()


@pytest.mark.parametrize("light", [1.0, 0.12])
def test_a_cut_forgets_what_was_before(light):
    """Another scene, another truth: no pixel of the old one is left, in the dark neither."""
    before, after = (texture(*SIZE, seed=seed) * light for seed in (1, 2))
    images = torch.from_numpy(np.stack([before] * 5 + [after] * 2)).byte().permute(0, 3, 1, 2)
    masks = np.stack([np.ones(SIZE, np.uint8)] * 5 + [np.zeros(SIZE, np.uint8)] * 2)
    assert error(Smoother(Noisy(masks, noise=0))(images), masks) == 0


def test_a_frame_of_no_numbers_is_forgotten():
    class Broken(Noisy):
        def probabilities(self, images, size):
            shares = super().probabilities(images, size)
            shares[1] = float("nan")
            return shares

    images, masks = moving(4)
    smoother = Smoother(Broken(masks, noise=0))
    assert error(smoother(images)[2:], masks[2:]) < 0.004


@pytest.mark.parametrize("size", [(97, 131), (15, 40), (1, 1), (700, 333), (40, 700), (20, 700)])
def test_a_first_frame_is_what_the_predictor_gives(size):
    checkpoint = pack_checkpoint(tiny(), [(name, (0, 0, 0)) for name in "abc"], (56, 56))
    predictor = Predictor(tiny().eval(), checkpoint, "cpu")
    predictor.precision = type(predictor.precision)("off", predictor.device)
    images = random_images(2, 3, *size)
    preds = Smoother(predictor)(images)
    assert preds.shape == (2, *size) and preds.dtype == np.uint8
    assert (preds[0] == predictor(images)[0]).mean() > (0.999 if max(size) <= 320 else 0.9)
    assert Smoother(predictor)(images.flip(0)).shape == preds.shape


def test_probabilities_are_of_the_views():
    """Mean softmax at the asked size: against a loop by torch."""
    checkpoint = pack_checkpoint(tiny(), [(name, (0, 0, 0)) for name in "abc"], (56, 56))
    predictor = Predictor(tiny().eval(), checkpoint, "cpu")
    predictor.precision = type(predictor.precision)("off", predictor.device)
    predictor.protocol = predictor.protocol._replace(flip=True)
    images = random_images(1, 3, 56, 56)
    with torch.inference_mode():
        both = [predictor.model(images), predictor.model(images.flip(-1)).flip(-1)]
        want = sum(part.softmax(1) for part in both) / 2
    torch.testing.assert_close(predictor.probabilities(images, (56, 56)), want, atol=1e-5, rtol=1e-4)
