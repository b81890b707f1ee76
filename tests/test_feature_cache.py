"""The feature cache: the same features, the same training, nothing computed twice, damage noticed."""

import dataclasses
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build, tiny, write_folder
from PIL import Image
from torch.utils.data import default_collate

from dataio import feature_cache as cache
import engine
import train
from dataio.dataloader import SegmentationDataset, collate, make_loader
from losses import Criterion
from dataio.feature_cache import cache_features
from dataio.transforms import AUGMENTS, ScaleCrop
from config import InputError
from model import CachedSegmenter, ModelSpec
from models.weights import hash_state
from dataio.readers import Sample, index_table
from utils import Precision

FLOAT32 = Precision("off", torch.device("cpu"))


@pytest.fixture
def samples(tmp_path):
    root = write_folder(tmp_path / "data", count=7)
    return [Sample(path, root / "masks" / path.name) for path in sorted((root / "images").iterdir())]


def training_set(samples, augments=(), **options):
    return SegmentationDataset(samples, index_table(3), (30, 43), augments, **options)


@pytest.fixture
def passes(monkeypatch):
    """A list that gets the number of images of every pass through a backbone."""
    counts, forward = [], cache.parts_that_fit

    def counted(model, parts, images, precision, size):
        counts.append(len(images))
        return forward(model, parts, images, precision, size)

    monkeypatch.setattr(cache, "parts_that_fit", counted)
    return counts


def side_by_side(inputs):
    """Return the maps of a cached item as one: (h, w, D) bfloat16."""
    return torch.cat(list(inputs.values()), dim=-1)


def is_close(inputs, net, image):
    """Return whether the maps of a cached item are those of an image."""
    return torch.allclose(side_by_side(inputs).float(), of_model(net, image).float(), atol=2e-2, rtol=2e-2)


def of_model(net, image):
    """Return what the cache should hold of one image: (h, w, D) bfloat16."""
    with torch.inference_mode():
        maps = net.features(image[None])
    return torch.cat([m[0].permute(1, 2, 0) for m in maps], dim=-1).bfloat16()


@pytest.mark.parametrize("head", ["bn", "linear", "unet", "deconv"])
def test_features_and_masks_are_those_of_the_images(samples, tmp_path, head):
    net = tiny(head=head)
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path / "cache", FLOAT32)
    for index in range(len(samples)):
        inputs, targets, name = cached[len(samples) * 5 + index]  # of whatever epoch
        image, want, title = dataset[index]
        assert is_close(inputs, net, image)  # batches of other sizes round the last bit otherwise
        assert (side_by_side(inputs) == of_model(net, image)).float().mean() > 0.9
        assert torch.equal(targets["mask"], want["mask"]) and name == title
    with torch.no_grad():
        got = CachedSegmenter(net, dataset.size).eval().logits(default_collate([cached[3][0]])).pixels()
        assert torch.allclose(got, net.eval()(dataset[3][0][None]), atol=0.05)
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(side_by_side(again[2][0]), side_by_side(cached[2][0]))
    assert torch.equal(again[2][1]["mask"], cached[2][1]["mask"])


def test_validation_masks_keep_their_size(samples, tmp_path):
    cached = cache_features(tiny(), training_set(samples, None), tmp_path, FLOAT32)
    assert cached[1][1]["mask"].shape == (45, 61) and side_by_side(cached[1][0]).shape == (3, 4, 4 * 192)


def test_views_are_the_first_epochs_of_the_augmented_training(samples, tmp_path):
    net, count = tiny(layers=(5,)), len(samples)
    dataset = training_set(samples, ("crop", "flip", "color"), seed=3)
    cached = cache_features(net, dataset, tmp_path, FLOAT32, views=3)
    different = 0
    for epoch in range(4):
        for index in range(count):
            inputs, targets, _ = cached[epoch * count + index]
            image, want, _ = dataset[epoch % 3 * count + index]
            assert torch.equal(targets["mask"], want["mask"]) and is_close(inputs, net, image)
            different += not torch.equal(targets["mask"], dataset[index][1]["mask"])
    assert different > count  # the views differ


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_one_view_trains_as_without_a_cache(samples, tmp_path, amp, run):
    base = ["--dataset", "folder", "--data-root", tmp_path / "data", "--backbone", "vit_tiny"]
    base += ["--imgsz", 30, 43, "--epochs", 3, "--batch-size", 3, "--workers", 0]
    base += ["--device", "cpu", "--amp", amp]
    rows = {}
    more = dict(plain=["--augment", "none"], cached=["--cache-features", tmp_path / "cache"])
    for name in more:
        code, out, err = run(train, *base, *more[name], "--out-dir", tmp_path / name)
        assert code == 0, err
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert "augmentation is off" in out and "feature cache of" in out
    for a, b in zip(rows["plain"], rows["cached"], strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], rel=0.01)
        assert a["val_accuracy"] == pytest.approx(b["val_accuracy"], abs=0.02)
    assert rows["plain"][0]["train_loss"] != rows["plain"][2]["train_loss"]


def test_later_heads_and_runs_need_no_pass(samples, tmp_path, passes):
    cache_features(tiny(head="bn"), training_set(samples), tmp_path, FLOAT32)
    assert sum(passes) == 7
    for options in (dict(head="bn"), dict(head="unet"), dict(head="linear"), dict(layers=(3, 4))):
        cache_features(tiny(**options), training_set(samples), tmp_path, FLOAT32)
    assert sum(passes) == 7
    cache_features(tiny(layers=(1, 5)), training_set(samples), tmp_path, FLOAT32)  # block 1 is new
    assert sum(passes) == 14


def other_weights(samples):
    net = tiny()
    net.backbone.net.blocks[0].mlp.fc1.weight.data[0, 0] += 1
    return net, training_set(samples), FLOAT32


@pytest.mark.parametrize(
    "other",
    [
        other_weights,
        lambda samples: (tiny(normalize="none"), training_set(samples), FLOAT32),
        lambda samples: (tiny(), SegmentationDataset(samples, index_table(3), (30, 44), ()), FLOAT32),
        lambda samples: (tiny(), training_set(samples[1:]), FLOAT32),
        lambda samples: (tiny(), training_set(samples), Precision("bf16", torch.device("cpu"))),
    ],
    ids=["weights", "normalization", "size", "files", "precision"],
)
def test_whatever_the_features_depend_on_makes_another_cache(samples, tmp_path, passes, other):
    cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    passes.clear()
    net, dataset, precision = other(samples)
    cache_features(net, dataset, tmp_path, precision)
    assert sum(passes) == len(dataset)
    passes.clear()
    cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)  # the first one is still there
    assert not passes


@pytest.mark.parametrize("where", ["dataio.dataloader.code_hash", "utils.hash_code", "model.origin_code"])
def test_changed_code_makes_another_cache_beside_the_old_one(
    samples, tmp_path, passes, where, monkeypatch, capsys
):
    """Of what reads images, of the backbone, of torch.hub's DINOv2; the old code may come back."""
    folder = tmp_path / "cache"
    cache_features(tiny(), training_set(samples), folder, FLOAT32)
    before = set(folder.glob("map_*"))
    passes.clear()
    monkeypatch.setattr(where, lambda *files: "changed")
    cache_features(tiny(), training_set(samples), folder, FLOAT32)
    assert sum(passes) == 7 and "the code has changed" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(cache, "fill", None)  # computing would fail
    cache_features(tiny(), training_set(samples), folder, FLOAT32)
    assert before < set(folder.glob("map_*"))


@pytest.mark.parametrize("part", ["map 5", "tokens 3"])
def test_a_new_option_of_a_model_makes_another_cache_unless_it_has_its_default(samples, tmp_path, part):
    def path(**options):
        fields = [("scale", float, dataclasses.field(default=1.0))]
        spec = dataclasses.make_dataclass("Spec", fields, bases=(ModelSpec,))
        net = tiny()
        if options:
            net.spec = spec(**dataclasses.asdict(net.spec), **options)
        return cache.plan_files(net, [part], training_set(samples), tmp_path, FLOAT32, 1)[0][0].path

    assert path() == path(scale=1.0) != path(scale=8.0)


def test_an_interrupted_cache_is_gone_on_with(samples, tmp_path, monkeypatch, passes):
    monkeypatch.setitem(cache.BATCH, "cpu", 2)
    counted = cache.parts_that_fit

    def dies(*args):
        if len(passes) == 2:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(cache, "parts_that_fit", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    monkeypatch.setattr(cache, "parts_that_fit", counted)
    passes.clear()
    net = tiny()
    cached = cache_features(net, training_set(samples), tmp_path, FLOAT32)
    assert sum(passes) == 3
    for index in range(7):
        image = training_set(samples)[index][0]
        assert is_close(cached[index][0], net, image)


@pytest.mark.parametrize("damage", ["bit", "truncated", "masks", "sums"])
def test_a_damaged_cache_is_mended(samples, tmp_path, passes, damage):
    whole = cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    want = [(side_by_side(whole[index][0]), whole[index][1]["mask"].clone()) for index in range(7)]
    passes.clear()
    pattern = {"masks": "masks_*.bin", "sums": "map_*.sums"}.get(damage, "map_*.bin")
    path = sorted(tmp_path.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    del whole
    again = cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    assert sum(passes) == (7 if damage == "truncated" else 1)
    for index in range(7):
        mended = side_by_side(again[index][0]).float()
        assert torch.allclose(mended, want[index][0].float(), atol=2e-2, rtol=2e-2)
        assert torch.equal(again[index][1]["mask"], want[index][1])


def test_a_changed_data_set_is_noticed_and_the_old_cache_removed(samples, tmp_path, passes, capsys):
    folder = tmp_path / "cache"
    cache_features(tiny(), training_set(samples), folder, FLOAT32)
    before = set(folder.glob("*_*"))
    passes.clear()
    pixels = np.array(Image.open(samples[2].image))
    Image.fromarray(255 - pixels).save(samples[2].image)
    os.utime(samples[2].image, ns=(1, 1))
    net = tiny()
    cached = cache_features(net, training_set(samples), folder, FLOAT32)
    assert sum(passes) == 7 and "the data set has changed" in capsys.readouterr().out
    after = set(folder.glob("*_*"))
    assert not before & after and len(before) == len(after) == 15
    image = training_set(samples)[2][0]
    assert is_close(cached[2][0], net, image)


def test_a_frozen_batch_norm_learns_nothing(samples, tmp_path):
    net = tiny(backbone="timm/resnet18", head="linear").train()
    before = hash_state(net.backbone.state_dict())
    first = cache_features(net, training_set(samples), tmp_path, FLOAT32)
    second = cache_features(net.train(), training_set(samples), tmp_path, FLOAT32)
    assert hash_state(net.backbone.state_dict()) == before
    assert first.parts["map 4"].path == second.parts["map 4"].path


def test_the_same_weights_in_another_network_are_another_cache(samples, tmp_path):
    net = tiny()
    files, _ = cache.plan_files(net, ["map 5"], training_set(samples), tmp_path, FLOAT32, 1)
    net.spec.backbone = "timm/the_same_with_another_activation"
    others, _ = cache.plan_files(net, ["map 5"], training_set(samples), tmp_path, FLOAT32, 1)
    assert not {file.path for file in files[:-1]} & {file.path for file in others[:-1]}


def test_a_cache_that_cannot_be_written_can_be_read(samples, tmp_path, monkeypatch, passes):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.json").write_text("[1]")  # somebody else's
    want = cache_features(tiny(), training_set(samples), tmp_path / "cache", FLOAT32)[3][0]["map 5"].clone()
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    again = cache_features(tiny(), training_set(samples), tmp_path / "cache", FLOAT32)
    assert torch.equal(again[3][0]["map 5"], want)
    content = bytearray(again.parts["map 2"].path.read_bytes())
    content[100] ^= 1
    again.parts["map 2"].path.write_bytes(content)
    with pytest.raises(InputError, match="features of 1 view are missing or damaged"):
        cache_features(tiny(), training_set(samples), tmp_path / "cache", FLOAT32)


@pytest.mark.parametrize("head", ["bn", "linear"])
def test_features_train_in_half_precision(samples, tmp_path, head):
    net, half = tiny(head=head), Precision("fp16", torch.device("cpu"))
    cached = cache_features(net, training_set(samples), tmp_path, half)
    features = default_collate([cached[0][0], cached[1][0]])
    with half.autocast():
        logits = CachedSegmenter(net, (30, 43)).logits(features)
    assert logits.values.isfinite().all()


def test_batches_shrink_until_they_fit(samples, tmp_path, monkeypatch):
    net, sizes = tiny(), []
    compute = net.compute_parts

    def small_machine(parts, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return compute(parts, images)

    monkeypatch.setattr(net, "compute_parts", small_machine)
    cache_features(net, training_set(samples), tmp_path, FLOAT32)
    assert sizes == [1, 7, 4, 2, 2, 2, 1]  # the first one asks for the shape
    monkeypatch.setattr(net, "compute_parts", lambda parts, images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache_features(net, training_set(samples), tmp_path / "other", FLOAT32)


# --- blocks that train, heads that read more -------------------------------------------------------------
def gradients(module, inputs, masks):
    """Return (loss, {name: gradient}) of a training step of a model on inputs."""
    module.zero_grad()
    loss, _, _ = module.train().loss(inputs, masks, Criterion("ce"))
    loss.backward()
    return loss.item(), {name.removeprefix("model."): p.grad.clone() for name, p in module.named_parameters()
                         if p.grad is not None}


QUICK = {"bn", "detail", "split-detail", "mask"}  # what the others read, these read too


@pytest.mark.parametrize(
    ("backbone", "options", "unfreeze"),
    [pytest.param("vit_tiny", dict(head=head), unfreeze, marks=() if head in QUICK else pytest.mark.long)
     for head in ("bn", "unet-skip", "split", "detail", "split-detail", "mask")
     for unfreeze in (0, 4 if head == "mask" else 2)]
    + [("vit_tiny", dict(layers=(1, 3, 5)), 1), ("vit_tiny", dict(), 6),
       ("dinov2_vits14", dict(head="split"), 1),
       ("timm/vit_small_patch16_dinov3", dict(layers=(1, 10, 11)), 1),
       ("timm/vit_small_patch16_rope_mixed_224", dict(), 2),
       ("timm/vit_small_patch16_dinov3", dict(head="split", split_blocks=1), 0),
       ("timm/vit_small_patch16_dinov3", dict(head="mask", split_blocks=2), 0)],
    ids=str,
)
def test_a_cached_step_is_a_step_on_the_images(samples, tmp_path, hub_cache, backbone, options, unfreeze):
    net = build(backbone=backbone, unfreeze=unfreeze, **options)
    with torch.no_grad():  # LayerScale begins near 0, where blocks do next to nothing
        for name, value in net.named_parameters():
            if ".gamma" in name:
                value.fill_(1.0)
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path, FLOAT32)
    images, targets, _ = collate([dataset[index] for index in range(5)])
    inputs, _, _ = collate([cached[index] for index in range(5)])
    want, wanted = gradients(net, images, targets["mask"].long())
    got, found = gradients(CachedSegmenter(net, dataset.size), inputs, targets["mask"].long())
    assert got == pytest.approx(want, rel=5e-3) and found.keys() == wanted.keys() and len(found) >= 3
    assert unfreeze == 0 or any(name.startswith("backbone") for name in found)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.1 or gradient.norm() < 1e-4 * max(g.norm() for g in wanted.values()), (name, error)


def test_what_trains_is_not_in_the_key_of_what_enters_it(samples, tmp_path, passes):
    """Else --resume would compute the cache again, on weights that have moved on."""
    def fill(change=lambda net: None, unfreeze=2, **options):
        net = tiny(unfreeze=unfreeze, **options)
        change(net.backbone.net)
        passes.clear()
        cache_features(net, training_set(samples), tmp_path, FLOAT32)
        return sum(passes)

    assert fill() == 7 and fill() == 0 and fill(head="unet") == 0
    assert fill(lambda net: net.blocks[4].mlp.fc1.weight.data.add_(1)) == 0
    assert fill(lambda net: net.norm.weight.data.add_(1)) == 0
    assert fill(lambda net: net.blocks[3].mlp.fc1.weight.data.add_(1)) == 7
    assert fill(unfreeze=3) == 0  # the head read what left block 2 before
    assert fill(unfreeze=4) == 7


@pytest.mark.parametrize("unfreeze", [0, 2])
@pytest.mark.parametrize("block", [-1, 5, -4, 2, 0])
def test_a_head_gets_the_tokens_it_asks_for(samples, tmp_path, unfreeze, block):
    net, seen = tiny(unfreeze=unfreeze), []
    net.head.token_blocks = (block,)
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path, FLOAT32)
    want = net.features(dataset[1][0][None]).tokens
    net.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tokens))
    CachedSegmenter(net, dataset.size).output(default_collate([cached[1][0]]))
    assert list(want) == list(seen[0]) == [block]
    assert torch.allclose(seen[0][block], want[block], atol=2e-2, rtol=2e-2)


def test_tokens_and_images_of_views_are_those_of_the_epochs(samples, tmp_path):
    net, count = tiny(head="split-detail"), len(samples)
    dataset = training_set(samples, ("crop", "flip", "color"), seed=3)
    cached = cache_features(net, dataset, tmp_path, FLOAT32, views=2)
    for item in (count - 1, 2 * count - 1):
        image, inputs = dataset[item][0], cached[item][0]
        assert torch.equal(inputs["image"], image.permute(1, 2, 0)) and inputs["image"].dtype == torch.uint8
        with torch.inference_mode():
            (block,) = net.head.token_blocks
            tokens = net.features(image[None]).tokens[block][0]
        assert torch.allclose(inputs[f"tokens {block}"].float(), tokens, atol=2e-2, rtol=2e-2)
    assert not torch.equal(cached[0][0]["image"], cached[count][0]["image"])


# --- as a user calls it -----------------------------------------------------------------------------------
def flags(root, out, *more):
    base = ["--dataset", "folder", "--data-root", root, "--backbone", "vit_tiny", "--imgsz", 42, 56]
    base += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    return [*base, "--out-dir", out, *more]


def test_no_room_on_the_disk_ends_before_anything_is_written(samples, tmp_path, monkeypatch, run):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    more = ["--cache-features", tmp_path / "cache"]
    code, out, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *more))
    assert code == 2 and err.startswith("error: --cache-features needs 0.00 GB in") and err.count("\n") == 1
    assert not list((tmp_path / "cache").glob("*_*")) and not (tmp_path / "out/config.json").exists()
    (tmp_path / "file").write_text("")
    code, _, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *more[:1], tmp_path / "file"))
    assert code == 2 and "cannot create" in err and err.count("\n") == 1


@pytest.mark.parametrize("head", [pytest.param("unet-skip", marks=pytest.mark.long), "deconv-resize"])
def test_a_cached_run_with_views_and_workers(samples, tmp_path, run, head):
    more = ["--cache-features", tmp_path / "cache", "--cache-views", 2, "--augment", "crop", "flip"]
    more += ["--head", head, "--workers", 2, "--loss", "ce+dice", "--batch-size", 3]
    code, out, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *more))
    assert code == 0 and "feature cache of 12 train views" in out and "augmentation is off" not in out, err
    assert (tmp_path / "out/valid_preds/epoch_001.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cache-features", "--unfreeze", "all", "--backbone", "vit_tiny"], "before the blocks train too"),
        (["--cache-features", "--backbone", "timm/resnet18", "--weights", "none", "--unfreeze", "all"],
         "the blocks train too"),
        (["--cache-features", "--arch", "segformer_b0", "--weights", "none"], "has none"),
        (["--cache-features", "--arch", "segformer_b0", "--weights", "none", "--unfreeze", 0], "has none"),
        (["--cache-views", 2], "without --cache-features"),
        (["--backbone-lr-scale", 0.5, "--backbone", "vit_tiny"], "has no effect on a frozen backbone"),
        (["--cache-features", "--augment", "flip"], "--cache-views K"),
        (["--split-blocks", 2, "--backbone", "vit_tiny"], "copies no blocks"),
        (["--head", "mask", "--loss", "dice", "--backbone", "vit_tiny"], "has a loss of its own"),
        (["--head", "mask", "--unfreeze", 3, "--backbone", "vit_tiny"], "trains copies of the last 3 blocks"),
    ],
)
def test_flags_that_contradict_the_cache_or_the_head(tmp_path, run, more, message):
    write_folder(tmp_path / "data")
    flags = ["--dataset", "folder", "--data-root", tmp_path / "data", "--out-dir", tmp_path / "out"]
    code, _, err = run(train, *flags, *more)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("views", [1, 2])
def test_other_parameters_of_an_augmentation_are_another_cache(samples, tmp_path, passes, views, monkeypatch):
    def fill(names=("crop", "flip"), seed=0):
        passes.clear()
        cache_features(tiny(), training_set(samples, names, seed=seed), tmp_path, FLOAT32, views)
        return sum(passes)

    count = 7 * views
    assert fill() == count and fill() == 0
    monkeypatch.setitem(AUGMENTS, "crop", ScaleCrop(scale=(0.9, 1.1)))
    assert fill() == count and fill() == 0
    assert fill(("crop",)) == count and fill(seed=1) == count


def test_an_epoch_on_features_leaves_the_backbone_alone(samples, tmp_path):
    net = tiny()
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    cached = cache_features(net, training_set(samples), tmp_path, FLOAT32)
    batches = make_loader(cached, 3, 0)
    objective = engine.Objective(CachedSegmenter(net, (30, 43)), Criterion("ce"))
    optimizer = engine.OPTIMIZERS["adamw"](engine.parameter_groups(net, 1e-2, 0.0))
    bar = train.tqdm(batches, disable=True)
    done = engine.train_one_epoch(objective, bar, engine.Optimization(optimizer, FLOAT32), 0)
    assert done["step"] == 3 and 0 <= done["data_wait"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())
