"""The mask head: equal to EoMT of transformers on the same weights, its loss to theirs at the same points."""
import pytest
import torch
import torch.nn.functional as F
from conftest import loss_of, random_images, tiny
from torch import nn
from transformers import EomtConfig, EomtForUniversalSegmentation
from transformers.models.eomt import modeling_eomt

from losses import mask_classification
from models.heads import QUERIES
from models.upsampling import geometry_of, label_maps

CLASSES = 5


def reference(net, grid):
    """Return transformers' EoMT of the blocks and head of a Segmenter with a mask head, on its tokens."""
    head, width = net.head, net.backbone.channels[-1]
    config = EomtConfig(hidden_size=width, num_hidden_layers=len(head.tail.blocks), num_attention_heads=3,
                        num_blocks=len(head.tail.blocks), num_queries=QUERIES, num_labels=CLASSES,
                        patch_size=14, image_size=14 * grid[0], num_upscale_blocks=2, num_register_tokens=0,
                        mlp_ratio=4, attn_implementation="eager")
    model = EomtForUniversalSegmentation(config).eval()
    model.grid_size, state = grid, {"query.weight": head.queries[0], "attn_mask_probs": torch.zeros(3)}
    for number, block in enumerate(head.tail.blocks):
        here = f"layers.{number}."
        for kind in ("weight", "bias"):
            for name, values in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                state[f"{here}attention.{name}_proj.{kind}"] = values
            layers = {"attention.out_proj": block.attn.proj, "mlp.fc1": block.mlp.fc1,
                     "mlp.fc2": block.mlp.fc2, "norm1": block.norm1, "norm2": block.norm2}
            for theirs, ours in layers.items():
                state[f"{here}{theirs}.{kind}"] = getattr(ours, kind)
        state.update({f"{here}layer_scale{number}.lambda1": torch.ones(width) for number in (1, 2)})
    for kind in ("weight", "bias"):
        state[f"layernorm.{kind}"] = getattr(head.tail.norm, kind)
        state[f"class_predictor.{kind}"] = getattr(head.conv_seg, kind)
        for index in range(3):
            state[f"mask_head.fc{index + 1}.{kind}"] = getattr(head.mask[2 * index], kind)
        for number, layer in enumerate(head.up):
            here = f"upscale_block.block.{number}."
            state[f"{here}conv1.{kind}"] = getattr(layer[0], kind)
            state[f"{here}layernorm2d.{kind}"] = getattr(layer[3], kind)
            state[f"{here}conv2.weight"] = layer[2].weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("embeddings", "criterion")) for name in missing)
    model.embeddings = Tokens()
    return model


class Tokens(nn.Module):
    """Stands in for the embeddings of EoMT: what it is given are the tokens that enter the first block."""

    num_prefix_tokens = 1

    def forward(self, tokens):
        return tokens


def test_it_equals_eomt_of_transformers_on_the_same_weights():
    torch.manual_seed(0)
    net = tiny(head="mask", num_classes=CLASSES).eval()
    for parameter in net.head.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    model, images = reference(net, (4, 6)), random_images(2, 3, 56, 84)
    with torch.no_grad():
        features = net.features(images)
        ((masks, classes),) = net.head(features)["predictions"]
        theirs = model(features.tokens[net.head.tail.first])
        pixels = net(images)
    assert masks.shape == (2, QUERIES, 16, 24) and classes.shape == (2, QUERIES, CLASSES + 1)
    torch.testing.assert_close(masks, theirs.masks_queries_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(classes, theirs.class_queries_logits, atol=1e-4, rtol=1e-4)
    shares = theirs.class_queries_logits.softmax(-1)[..., :-1]
    expected = torch.einsum("bqhw,bqk->bkhw", theirs.masks_queries_logits.sigmoid(), shares)
    expected = F.interpolate(expected.log(), size=(56, 84), mode="bilinear")
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=1e-3)


def random_case():
    """Return masks (2, 7, 6, 9), classes (2, 7, 6) and truth (2, 6, 9) with 4 classes in each image."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, 4, (2, 6, 9), generator=generator)
    shapes = (2, 7, 6, 9), (2, 7, CLASSES + 1)
    return *(2 * torch.randn(shape, generator=generator) for shape in shapes), truth


def test_its_loss_equals_that_of_transformers_at_all_pixels(monkeypatch):
    masks, classes, truth = random_case()
    every = lambda values, *_, **__: values.flatten(2) if values.dim() == 4 else values  # noqa: E731
    monkeypatch.setattr(modeling_eomt, "sample_point", every)
    monkeypatch.setattr(modeling_eomt.EomtLoss, "sample_points_using_uncertainty", lambda *_: None)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    criterion = modeling_eomt.EomtLoss(EomtConfig(num_labels=CLASSES), weights)
    present = [image.unique() for image in truth]
    shapes = [(image == ids[:, None, None]).float() for image, ids in zip(truth, present, strict=True)]
    theirs = criterion(masks_queries_logits=masks, mask_labels=shapes, class_queries_logits=classes,
                       class_labels=present)
    ours = mask_classification(masks, classes, truth)
    for name, key in (("class", "loss_cross_entropy"), ("mask", "loss_mask"), ("dice", "loss_dice")):
        torch.testing.assert_close(ours[name], weights[key] * theirs[key])


def test_ignored_pixels_have_no_part_in_it():
    masks, classes, truth = random_case()
    without = mask_classification(masks[:, :, 2:], classes, truth[:, 2:])
    masks[:, :, :2], truth[:, :2] = 50.0, 255
    for name, term in mask_classification(masks, classes, truth).items():
        torch.testing.assert_close(term, without[name])


@pytest.mark.parametrize("size", [(56, 84), (61, 90)], ids=str)
def test_masks_and_loss_lie_where_the_image_does_in_its_padding(size):
    """Masks that end where the classes do have no loss and give every pixel its class, but at the seam."""
    geometry, seam = geometry_of(size, 14), 0.6 * size[1]
    grid = tuple(side // 14 * 4 for side in geometry.padded)
    columns = (torch.arange(grid[1]) + 0.5) * 3.5 - geometry.left  # centers, in pixels of the image
    masks = torch.full((1, QUERIES, *grid), -30.0)
    masks[0, 4], masks[0, 9] = 30 * (seam - columns).sign(), 30 * (columns - seam).sign()
    classes = torch.zeros(1, QUERIES, 4)
    classes[..., 3] = 30.0
    classes[0, 4, 1] = classes[0, 9, 2] = 60.0
    truth = torch.where(torch.arange(size[1]) + 0.5 < seam, 1, 2).expand(1, *size).clone()
    truth[:, :5] = 255
    head = tiny(head="mask", num_classes=3).head
    terms = head.loss(dict(predictions=[(masks, classes)]), {"mask": truth}, geometry)
    (pred,) = label_maps(head.class_logits(masks, classes), geometry, [size])
    wrong = (pred != truth[0]) & (truth[0] != 255)
    wrong[..., abs(torch.arange(size[1]) + 0.5 - seam) < 3] = False
    assert sum(terms.values()) < 0.01 and not wrong.any()


def test_the_loss_of_a_step_is_its_own_and_that_of_all_copied_blocks():
    net = tiny(head="mask", split_blocks=2).train()
    images, masks = random_images(2, 3, 30, 45), torch.randint(0, 3, (2, 30, 45))
    loss, terms, preds = loss_of(net, images, masks, "dice")
    output, geometry = net.output(images)
    expected = [mask_classification(*prediction, truth_on_grid(masks, geometry, prediction[0].shape[-2:]))
                for prediction in output["predictions"]]
    assert len(expected) == 2 and terms.keys() == {"class", "mask", "dice"} and preds.shape == masks.shape
    for name, term in terms.items():
        torch.testing.assert_close(term, (expected[0][name] + expected[1][name]) / 2)
    torch.testing.assert_close(loss, sum(terms.values()))


def truth_on_grid(masks, geometry, grid):
    """Return masks (B, H, W) at the centers of a grid (h, w) over the padded images, 255 in the padding."""
    padded = torch.full((len(masks), *geometry.padded), 255)
    bottom, right = geometry.top + masks.shape[1], geometry.left + masks.shape[2]
    padded[:, geometry.top:bottom, geometry.left:right] = masks
    rows, columns = (((torch.arange(count) + 0.5) * side / count).long()
                     for count, side in zip(grid, geometry.padded, strict=True))
    return padded[:, rows][:, :, columns]
