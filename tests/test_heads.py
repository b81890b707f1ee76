"""Heads at any size and width; the sizes inside the U-Net and the transposed convolutions at 518x518."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, tiny
from torch import nn

from config import InputError
from losses import Criterion
from models.backbones import Features
from models.heads import (HEADS, PROJECTED, BatchNorm2d, BNHead, DeconvHead, DetailHead, UNetHead,
                          UNetSkipHead)
from models.logits import geometry_of, pad


def maps_of(head, channels=24, grid=(5, 7), batch=2):
    """Return as many random maps as a head class reads by default."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *grid, generator=generator) for _ in range(HEADS[head].reads)]


def sizes_of(module, kind):
    """Return a list that fills with (channels, side) of the outputs of every `kind` inside `module`."""
    seen = []
    for part in module.modules():
        if isinstance(part, kind):
            part.register_forward_hook(lambda _, args, out: seen.append((out.shape[1], out.shape[-1])))
    return seen


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize(
    "size", [pytest.param((70, 98), marks=pytest.mark.long), (61, 90), (14, 14), (1, 1)], ids=str
)
def test_every_head_gives_logits_of_any_image_and_gradients_to_all_it_holds(head, size):
    net = tiny(head=head, unfreeze="all").train()
    logits = net(random_images(2, 3, *size))
    assert logits.shape == (2, 3, *size) and logits.dtype == torch.float32
    F.cross_entropy(logits, torch.randint(0, 3, (2, *size))).backward()
    without = [name for name, p in net.head.named_parameters() if p.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in net.head.parameters())


@pytest.mark.parametrize("head", list(HEADS))
def test_pixels_that_do_not_count_give_no_loss_and_no_gradient(head):
    net = tiny(head=head).train()
    images, masks = random_images(2, 3, 30, 45), torch.full((2, 30, 45), 255)
    loss, terms, preds = net.loss(images, masks, Criterion("ce+dice"))
    loss.backward()
    assert loss.item() == 0 and preds.shape == masks.shape and all(term == 0 for term in terms.values())
    assert all(p.grad is None or p.grad.eq(0).all() for p in net.parameters())
    masks[0, :9] = 1  # of what counts, the loss is as usual
    assert net.loss(images, masks, Criterion("ce+dice"))[0].item() > 0


@pytest.mark.parametrize("head", list(HEADS))
def test_254_classes(head):
    net = tiny(head=head, num_classes=254).eval()
    loss, _, preds = net.loss(random_images(1, 3, 30, 45), torch.full((1, 30, 45), 253), Criterion("ce"))
    assert loss.isfinite() and preds.max() < 254
    assert net.head.own_loss or 3 < loss.item() < 9  # ln 254 = 5.5


@pytest.mark.parametrize("head", list(HEADS))
def test_a_batch_of_one_trains(head):
    net = tiny(head=head).train()
    assert net(random_images(1, 3, 14, 14)).isfinite().all()
    assert net(random_images(1, 3, 30, 30)).isfinite().all()


def test_batch_norm_with_one_value_a_channel_uses_its_running_statistics():
    ours, plain = BatchNorm2d(3), nn.BatchNorm2d(3)
    ours.running_mean += 1.5
    one = torch.randn(1, 3, 1, 1)
    assert torch.allclose(ours(one), (one - 1.5) / (1 + 1e-5) ** 0.5) and ours.num_batches_tracked == 0
    several = torch.randn(2, 3, 4, 5)
    ours.running_mean.zero_()
    assert torch.equal(ours(several), plain(several)) and torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(several), plain.eval()(several))


@pytest.mark.long
@pytest.mark.parametrize("channels", [8, 768])
def test_unet_has_the_sizes_of_its_paper_figure_at_518(channels):
    head = UNetHead([channels], 21).eval()
    ups, seen = [], sizes_of(head.blocks, nn.ReLU)
    for block in head.blocks:
        block.register_forward_pre_hook(lambda _, args: ups.append((args[0].shape[1], args[0].shape[-1])))
    with torch.no_grad():
        logits = head([torch.randn(1, channels, 37, 37)], (518, 518))
    assert ups == [(channels, 74), (512, 148), (256, 296), (128, 518)]
    assert seen == [(512, 74)] * 2 + [(256, 148)] * 2 + [(128, 296)] * 2 + [(64, 518)] * 2
    assert logits.shape == (1, 21, 518, 518)


def test_deconv_doubles_four_times_and_crops_the_center_at_518():
    head = DeconvHead([768], 12).eval()
    seen, whole = sizes_of(head.up, nn.ConvTranspose2d), []
    head.conv_seg.register_forward_hook(lambda _, args, out: whole.append(out))
    with torch.no_grad():
        logits = head([torch.randn(1, 768, 37, 37)], (518, 518))
    assert [side for _, side in seen] == [74, 148, 296, 592]
    assert torch.equal(logits, whole[0][..., 37:555, 37:555])


def test_unet_equals_its_steps_written_out():
    torch.manual_seed(0)
    head = UNetHead([24], 3).eval()
    (features,) = maps_of("unet", grid=(3, 5))
    want = features
    with torch.no_grad():
        for block, size in zip(head.blocks, [(6, 10), (12, 20), (24, 40), (42, 70)], strict=True):
            want = F.interpolate(want, size=size, mode="bilinear", align_corners=False)
            for conv, norm in ((block[0], block[1]), (block[3], block[4])):
                want = F.conv2d(want, conv.weight, padding=1)
                mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
                want = ((want - mean) / (var + norm.eps).sqrt()).relu()
        weight, bias = head.conv_seg.weight[:, :, 0, 0], head.conv_seg.bias
        want = torch.einsum("bdhw,kd->bkhw", want, weight) + bias.view(1, -1, 1, 1)
        assert torch.allclose(head([features], (42, 70)), want, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_skip_connections_join_the_latest_block_first(count):
    head = UNetSkipHead([16, 20, 24, 28][-count:], 3).eval()
    assert [skip.in_channels for skip in head.skips] == [24, 20, 16][: count - 1]
    maps = [torch.randn(1, c, 4, 4, requires_grad=True) for c in [16, 20, 24, 28][-count:]]
    head(maps, (56, 56)).sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


def test_skip_connections_equal_their_steps_written_out():
    torch.manual_seed(0)
    head = UNetSkipHead([16, 20, 24], 3).eval()
    early, late, deep = torch.randn(1, 16, 3, 5), torch.randn(1, 20, 3, 5), torch.randn(1, 24, 3, 5)
    want = deep
    with torch.no_grad():
        for number, size in enumerate([(6, 10), (12, 20), (24, 40), (42, 70)]):
            want = F.interpolate(want, size=size, mode="bilinear")
            if number < 2:
                skip = F.interpolate((late, early)[number], size=size, mode="bilinear")
                want = torch.cat([want, head.skips[number](skip)], 1)  # a 1x1 convolution commutes with it
            want = head.blocks[number](want)
        assert torch.allclose(head([early, late, deep], (42, 70)), head.conv_seg(want), atol=1e-4)


def test_deconv_resize_is_a_bilinear_resize_of_the_uncropped_logits():
    torch.manual_seed(0)
    plain, resized = (HEADS[name]([24], 3).eval() for name in ("deconv", "deconv-resize"))
    resized.load_state_dict(plain.state_dict())
    maps = maps_of("deconv")
    with torch.no_grad():
        whole = plain(maps, (80, 112))
        want = F.interpolate(whole, size=(70, 98), mode="bilinear")
        assert torch.equal(resized(maps, (70, 98)), want)


@pytest.mark.parametrize("layers", [(5,), (1, 2, 3, 4, 5)])
def test_skip_connections_need_two_to_four_blocks(layers):
    with pytest.raises(InputError, match="--head unet-skip reads two to four blocks"):
        tiny(head="unet-skip", layers=layers)


def test_deconv_fits_patches_of_16_and_says_why_it_does_not_fit_others():
    net = tiny(head="deconv", backbone="timm/vit_tiny_patch16_224").eval()
    assert net(random_images(1, 3, 50, 70)).shape == (1, 3, 50, 70)
    for name in ("vit_small_patch8_224", "convnext_atto"):
        with pytest.raises(
            InputError, match="--head deconv makes 16 pixels of a patch.*deconv-resize or unet"
        ):
            tiny(head="deconv", backbone=f"timm/{name}")


@pytest.mark.parametrize("head", ["unet", "deconv-resize", "unet-skip"])
@pytest.mark.parametrize("name", ["vit_small_patch8_224", "convnext_atto"])
def test_decoders_on_other_patches_and_pyramids(head, name):
    net = tiny(head=head, backbone=f"timm/{name}").eval()
    assert net(random_images(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_bn_head_is_batchnorm_then_1x1_convolution():
    head = BNHead([8, 8], 5)
    assert [name for name, _ in head.named_children()] == ["bn", "conv_seg"]  # the official names
    assert head([torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4)], (42, 56)).shape == (2, 5, 3, 4)


# --- detail -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(98, 112), (98, 70), (91, 105), (85, 77)], ids=str)
def test_the_detail_head_keeps_what_it_sees_in_its_place(size):
    """With weights that hand on brightness, a blob has its center in the logits where it was in the image."""
    head, geometry = DetailHead([8], 2).eval(), geometry_of(size, 7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        for block in head.stem:
            block[0].weight[0, 0] = 1.0
        for norm in (*(block[1] for block in head.stem), head.join[1], head.join[4]):
            norm.weight.fill_(1.0)
        head.join[0].weight[0, PROJECTED, 1, 1] = head.join[3].weight[0, 0, 1, 1] = 1.0
        head.conv_seg.weight[0, 0] = 1.0
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in size), indexing="ij")
    place = 0.55 * size[0] + 0.3, 0.45 * size[1] - 0.2
    blob = torch.exp(-((rows - place[0]) ** 2 + (columns - place[1]) ** 2) / 50)
    images = pad(blob.expand(1, 3, *size), geometry)
    maps = torch.zeros(1, 8, geometry.padded[0] // 7, geometry.padded[1] // 7)
    with torch.no_grad():
        seen = head.logits(head(Features([maps], images=images), geometry.padded), geometry).pixels()[0, 0]
    center = [((where * seen).sum() / seen.sum()).item() for where in (rows, columns)]
    assert seen.shape == size and center == pytest.approx(place, abs=0.1)


def test_the_detail_head_starts_as_the_bn_head_and_corrects_it():
    """Before the first step its logits are those of its BatchNorm and 1x1 convolution; every part learns."""
    torch.manual_seed(0)
    head, maps = DetailHead([8, 8], 3), list(torch.randn(2, 2, 8, 6, 7))
    output = head(Features(maps, images=torch.randn(2, 3, 84, 98)), (84, 98))
    expected = F.interpolate(head.direct(maps, (84, 98)), size=(21, 25), mode="bilinear")
    assert output.shape == (2, 3, 21, 25)
    torch.testing.assert_close(output, expected)
    nn.init.normal_(head.conv_seg.weight)
    head(Features(maps, images=torch.randn(2, 3, 84, 98)), (84, 98)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_detail_head_sees_the_same_in_an_image_of_less_contrast():
    """What the stem sees does not change with the exposure, which differs from one day to the next."""
    torch.manual_seed(0)
    head, images = DetailHead([8], 3).eval(), torch.randn(2, 3, 84, 98)
    nn.init.normal_(head.conv_seg.weight)
    maps = [torch.randn(2, 8, 6, 7)]
    bright, dark = (head(Features(maps, images=factor * images), (84, 98)) for factor in (1.0, 0.3))
    torch.testing.assert_close(dark, bright, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(bright, head(Features(maps, images=images.flip(-1)), (84, 98)), atol=0.1)
