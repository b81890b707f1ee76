"""Heads at any size and width; the sizes inside the U-Net and the transposed convolutions at 518x518."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import build, loss_of, random_images, tiny
from torch import nn

from config import InputError
from models.backbones import Features
from models.heads import HEADS, PROJECTED, BatchNorm2d, BNHead, DeconvHead, DetailHead, UNetHead, UNetSkipHead
from models.heads import logits_of
from models.upsampling import geometry_of, pad, pixels


def features_of(maps, size, image=None, tokens=None):
    """Return Features of images of `size`, which need no padding."""
    return Features(maps, tokens or {}, image, geometry_of(size))


def random_maps(*channels, grid=(5, 7), batch=2):
    """Return random maps (batch, C, *grid) of these channels."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, width, *grid, generator=generator) for width in channels]


def sizes_of(module, kind):
    """Return a list that fills with (channels, side) of the outputs of every `kind` inside `module`."""
    sizes = []
    for layer in module.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda _, args, out: sizes.append((out.shape[1], out.shape[-1])))
    return sizes


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize(
    "size", [pytest.param((70, 98), marks=pytest.mark.long), (61, 90), (14, 14), (1, 1)], ids=str
)
def test_every_head_gives_logits_of_any_image_and_gradients_to_all_it_holds(head, size):
    net, images = tiny(head=head, unfreeze="all").train(), random_images(2, 3, *size)
    logits = net(images)
    assert logits.shape == (2, 3, *size) and logits.dtype == torch.float32
    loss_of(net, images, torch.randint(0, 3, (2, *size)))[0].backward()
    without = [name for name, p in net.head.named_parameters() if p.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in net.head.parameters())


@pytest.mark.parametrize("head", list(HEADS))
def test_pixels_that_do_not_count_give_no_loss_and_no_gradient(head):
    net = tiny(head=head).train()
    images, masks = random_images(2, 3, 30, 45), torch.full((2, 30, 45), 255)
    loss, terms, preds = loss_of(net, images, masks, "ce+dice")
    loss.backward()
    assert loss.item() == 0 and preds.shape == masks.shape and all(term == 0 for term in terms.values())
    assert all(p.grad is None or p.grad.eq(0).all() for p in net.parameters())
    masks[0, :9] = 1  # of what counts, the loss is as usual
    assert loss_of(net, images, masks, "ce+dice")[0].item() > 0


@pytest.mark.parametrize("head", list(HEADS))
def test_254_classes(head):
    net = tiny(head=head, num_classes=254).eval()
    loss, _, preds = loss_of(net, random_images(1, 3, 30, 45), torch.full((1, 30, 45), 253))
    assert loss.isfinite() and preds.max() < 254
    assert hasattr(net.head, "loss") or 3 < loss.item() < 9  # ln 254 = 5.5


# --- where things lie, for whatever head is registered ----------------------------------------------------
GRID = (7, 9)  # patches of 14 pixels


def make_symmetric(module):
    """Make every convolution symmetric, so that what comes of a symmetric blob is symmetric around it."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = layer.weight.data
            layer.weight.data = sum(weight.flip(axes) for axes in ((), (-1,), (-2,), (-2, -1))) / 4


def blob_features(net, kind, row, column, height):
    """Return Features, constant but for a blob of `height` at a patch in what is `kind` of them."""
    size, generator = tuple(14 * side for side in GRID), torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    blob = torch.exp(-((rows - 14 * row - 7) ** 2 + (columns - 14 * column - 7) ** 2) / 30)
    image = height * blob.expand(1, 3, -1, -1) * (kind == "image")
    width, prefix = net.backbone.channels[-1], net.backbone.prefix_tokens
    peak = torch.zeros(GRID)
    peak[row, column] = height
    maps = []
    for channels in net.backbone.channels:
        level = torch.randn(1, channels, 1, 1, generator=generator)
        maps.append(level.expand(-1, -1, *GRID) + level.roll(3, 1) * peak * (kind == "maps"))
    level = torch.randn(1, 1, width, generator=generator)
    tokens = level.expand(1, prefix + peak.numel(), width).clone()
    tokens[:, prefix:] += level.roll(3, 2) * peak.flatten()[:, None] * (kind == "tokens")
    return Features(maps, dict.fromkeys(net.head.reads.tokens, tokens), image, net.geometry(size))


@pytest.mark.parametrize("patch", [(3, 4), (2, 5), (4, 2)], ids=["center", "above", "left"])
@pytest.mark.parametrize("head", list(HEADS))
def test_a_blob_in_what_a_head_reads_is_in_its_place_in_the_logits(head, patch):
    """In each of maps, tokens and image. (The center crop of `deconv` moves what lies off the center.)"""
    net = tiny(head=head).eval()
    make_symmetric(net.head)
    reads, moved = net.head.reads, 0
    kinds = ["maps"] * bool(reads.maps) + ["tokens"] * bool(reads.tokens) + ["image"] * reads.image
    rows, columns = torch.meshgrid(*(torch.arange(14 * side) + 0.5 for side in GRID), indexing="ij")
    center = [7 * side for side in GRID]
    for kind in kinds:
        with torch.no_grad():
            outputs = [net.head(blob_features(net, kind, *patch, height)) for height in (0.0, 0.5)]
            plain, changed = (pixels(logits_of(output), net.geometry([14 * side for side in GRID]))
                              for output in outputs)
        change = (changed - plain)[0, 0]
        change = (change - change.median()).abs()
        change = torch.where(change > 0.2 * change.max(), change, 0)
        moved += bool(change.any())
        if not change.any():  # of the mask head, the maps are there for their size alone
            continue
        for axis, (positions, index) in enumerate(zip((rows, columns), patch, strict=True)):
            expected = 14 * index + 7
            centroid = ((positions * change).sum() / change.sum()).item()
            assert abs(centroid - expected) < 0.8 + 0.2 * abs(expected - center[axis]), kind
    assert moved


@pytest.mark.parametrize("options", [
    *(dict(head=head) for head in HEADS),
    *(dict(arch=arch, unfreeze="all") for arch in ("fcn_resnet50", "segformer_b0")),
    dict(head="bn", backbone="timm/convnext_atto"),
], ids=str)
def test_what_an_image_shows_changes_the_logits_there_and_in_no_other_image(options):
    """Logits do not depend on the other images of a batch, and change most where the image does."""
    net = (build if "arch" in options else tiny)(**options).eval()
    image = random_images(1, 3, 96, 128)
    changed = image.clone()
    changed[..., 16:48, 24:56] = 255 - changed[..., 16:48, 24:56]  # above and left of the center
    with torch.no_grad():
        plain, other = net(image), net(changed)
        together = net(torch.cat([image, changed, random_images(1, 3, 96, 128, seed=1)]))
    scale = plain.abs().max()
    torch.testing.assert_close(together[:1], plain, atol=1e-4 * scale, rtol=1e-4)
    torch.testing.assert_close(together[1:2], other, atol=1e-4 * scale, rtol=1e-4)
    change = (other - plain)[0].abs().sum(0)
    change = (change - change.quantile(0.5)).clamp(min=0)
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in change.shape), indexing="ij")
    center = [((positions * change).sum() / change.sum()).item() for positions in (rows, columns)]
    assert abs(center[0] - 32) < 12 and abs(center[1] - 40) < 16, center


@pytest.mark.parametrize("head", list(HEADS))
def test_maps_matter_in_their_order(head):
    net = tiny(head=head).eval()
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 192, 3, 4, generator=generator) for _ in net.backbone.layers]
    tokens = dict.fromkeys(net.head.reads.tokens, torch.randn(1, 13, 192, generator=generator))
    image = torch.randn(1, 3, 42, 56, generator=generator)
    with torch.no_grad():
        outputs = [logits_of(net.head(features_of(order, (42, 56), image, tokens)))
                   for order in (maps, maps[::-1])]
    assert len(maps) == 1 or not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("layers", [(0, 2, 5), (1, 4)])
def test_the_maps_and_tokens_of_a_backbone_are_those_of_its_blocks(layers):
    """Map by map, deepest last: what hooks on the blocks see, normed."""
    net = tiny(head="bn", layers=layers).eval()
    entered, left = {}, {}

    def note(index, _, args, output):
        entered[index], left[index] = args[0], output

    for index, block in enumerate(net.backbone.blocks):
        block.register_forward_hook(partial(note, index))
    with torch.no_grad():
        maps, tokens = net.backbone(torch.randn(2, 3, 42, 56), (0, 3, -1))
    for layer, values in zip(layers, maps, strict=True):
        normed = net.backbone.net.norm(left[layer])[:, 1:].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(values, normed)
    for block in (0, 3, -1):
        torch.testing.assert_close(tokens[block], entered[block % 6])


@pytest.mark.parametrize("head", list(HEADS))
def test_a_batch_of_one_trains(head):
    net = tiny(head=head).train()
    assert net(random_images(1, 3, 14, 14)).isfinite().all()
    assert net(random_images(1, 3, 30, 30)).isfinite().all()


def test_batch_norm_with_one_value_a_channel_uses_its_running_statistics():
    ours, plain = BatchNorm2d(3), nn.BatchNorm2d(3)
    ours.running_mean += 1.5
    value = torch.randn(1, 3, 1, 1)
    assert torch.allclose(ours(value), (value - 1.5) / (1 + 1e-5) ** 0.5) and ours.num_batches_tracked == 0
    several = torch.randn(2, 3, 4, 5)
    ours.running_mean.zero_()
    assert torch.equal(ours(several), plain(several)) and torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(several), plain.eval()(several))


@pytest.mark.long
@pytest.mark.parametrize("channels", [8, 768])
def test_unet_has_the_sizes_of_its_paper_figure_at_518(channels):
    head = UNetHead([channels], 21).eval()
    ups, outputs = [], sizes_of(head.blocks, nn.ReLU)
    for block in head.blocks:
        block.register_forward_pre_hook(lambda _, args: ups.append((args[0].shape[1], args[0].shape[-1])))
    with torch.no_grad():
        logits = head(features_of([torch.randn(1, channels, 37, 37)], (518, 518)))
    assert ups == [(channels, 74), (512, 148), (256, 296), (128, 518)]
    assert outputs == [(512, 74)] * 2 + [(256, 148)] * 2 + [(128, 296)] * 2 + [(64, 518)] * 2
    assert logits.shape == (1, 21, 518, 518)


def test_deconv_doubles_four_times_and_crops_the_center_at_518():
    head = DeconvHead([768], 12).eval()
    sizes, uncropped = sizes_of(head.up, nn.ConvTranspose2d), []
    head.conv_seg.register_forward_hook(lambda _, args, out: uncropped.append(out))
    with torch.no_grad():
        logits = head(features_of([torch.randn(1, 768, 37, 37)], (518, 518)))
    assert [side for _, side in sizes] == [74, 148, 296, 592]
    assert torch.equal(logits, uncropped[0][..., 37:555, 37:555])


def test_unet_equals_its_steps_written_out():
    torch.manual_seed(0)
    head = UNetHead([24], 3).eval()
    (features,) = random_maps(24, grid=(3, 5))
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
        assert torch.allclose(head(features_of([features], (42, 70))), want, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_skip_connections_join_the_latest_block_first(count):
    head = UNetSkipHead([16, 20, 24, 28][-count:], 3).eval()
    assert [skip.in_channels for skip in head.skips] == [24, 20, 16][: count - 1]
    maps = [torch.randn(1, c, 4, 4, requires_grad=True) for c in [16, 20, 24, 28][-count:]]
    head(features_of(maps, (56, 56))).sum().backward()
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
        logits = head(features_of([early, late, deep], (42, 70)))
        assert torch.allclose(logits, head.conv_seg(want), atol=1e-4)


def test_deconv_resize_is_a_bilinear_resize_of_the_uncropped_logits():
    torch.manual_seed(0)
    plain, resized = (HEADS[name]([24], 3).eval() for name in ("deconv", "deconv-resize"))
    resized.load_state_dict(plain.state_dict())
    maps = random_maps(24)
    with torch.no_grad():
        uncropped = plain(features_of(maps, (80, 112)))
        want = F.interpolate(uncropped, size=(70, 98), mode="bilinear")
        assert torch.equal(resized(features_of(maps, (70, 98))), want)


@pytest.mark.parametrize("layers", [(5,), (1, 2, 3, 4, 5)])
def test_skip_connections_need_two_to_four_blocks(layers):
    with pytest.raises(InputError, match="--head unet-skip"):
        tiny(head="unet-skip", layers=layers)


def test_deconv_fits_patches_of_16_and_says_why_it_does_not_fit_others():
    net = tiny(head="deconv", backbone="timm/vit_tiny_patch16_224").eval()
    assert net(random_images(1, 3, 50, 70)).shape == (1, 3, 50, 70)
    for name in ("vit_small_patch8_224", "convnext_atto"):
        with pytest.raises(InputError, match="--head deconv"):
            tiny(head="deconv", backbone=f"timm/{name}")


@pytest.mark.parametrize("head", ["unet", "deconv-resize", "unet-skip"])
@pytest.mark.parametrize("name", ["vit_small_patch8_224", "convnext_atto"])
def test_decoders_on_other_patches_and_pyramids(head, name):
    net = tiny(head=head, backbone=f"timm/{name}").eval()
    assert net(random_images(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_bn_head_is_batchnorm_then_1x1_convolution():
    head = BNHead([8, 8], 5)
    assert [name for name, _ in head.named_children()] == ["bn", "conv_seg"]  # the official names
    assert head(features_of(random_maps(8, 8, grid=(3, 4)), (42, 56))).shape == (2, 5, 3, 4)


# --- detail -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(98, 112), (98, 70), (91, 105), (85, 77)], ids=str)
def test_the_detail_head_keeps_what_it_sees_in_its_place(size):
    """With weights that hand on brightness, a blob has its center in the logits where it was in the image, at
    sizes that are padded to patches and continued to multiples of 4.
    """
    head, geometry = DetailHead([8], 2).eval(), geometry_of(size, 7, DetailHead.logits_multiple)
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
    center = 0.55 * size[0] + 0.3, 0.45 * size[1] - 0.2
    blob = torch.exp(-((rows - center[0]) ** 2 + (columns - center[1]) ** 2) / 50)
    images = pad(blob.expand(1, 3, *size), geometry)
    maps = torch.zeros(1, 8, geometry.padded[0] // 7, geometry.padded[1] // 7)
    with torch.no_grad():
        values = pixels(head(Features([maps], {}, images, geometry)), geometry)[0, 0]
    centroid = [((positions * values).sum() / values.sum()).item() for positions in (rows, columns)]
    assert values.shape == size and centroid == pytest.approx(center, abs=0.1)


def test_the_detail_head_starts_as_the_bn_head_and_corrects_it():
    """Before the first step its logits are those of its BatchNorm and 1x1 convolution; all of it learns."""
    torch.manual_seed(0)
    head, maps = DetailHead([8, 8], 3), list(torch.randn(2, 2, 8, 6, 7))
    output = head(features_of(maps, (84, 98), torch.randn(2, 3, 84, 98)))
    expected = F.interpolate(head.direct(features_of(maps, (84, 98))), size=(21, 25), mode="bilinear")
    assert output.shape == (2, 3, 21, 25)
    torch.testing.assert_close(output, expected)
    nn.init.normal_(head.conv_seg.weight)
    head(features_of(maps, (84, 98), torch.randn(2, 3, 84, 98))).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_detail_head_sees_the_same_in_an_image_of_less_contrast():
    """What the stem sees does not change with the exposure, which differs from one day to the next."""
    torch.manual_seed(0)
    head, images = DetailHead([8], 3).eval(), torch.randn(2, 3, 84, 98)
    nn.init.normal_(head.conv_seg.weight)
    maps = [torch.randn(2, 8, 6, 7)]
    bright, dark = (head(features_of(maps, (84, 98), factor * images)) for factor in (1.0, 0.3))
    torch.testing.assert_close(dark, bright, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(bright, head(features_of(maps, (84, 98), images.flip(-1))), atol=0.1)
