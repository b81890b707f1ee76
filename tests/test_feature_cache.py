"""The feature cache: the same features, the same training, nothing computed twice, damage noticed."""
import dataclasses
import errno
import importlib.util
import linecache
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build, random_images, refused, tiny, write_folder
from PIL import Image
from test_scripts import history_of

import config
import engine
import model
import train
from dataio import feature_cache as cache
from dataio.dataloader import SegmentationDataset, TileDataset, WindowDataset, collate
from dataio.feature_cache import EntryFile, cache_features
from dataio.image_rule import PICTURES
from dataio.readers import Sample, Target, index_table, value_table
from dataio.transforms import AUGMENTS, CopyPaste, ScaleCrop
from dataio.windows import WindowReader
from losses import Criterion
from models.backbones import Part
from models.weights import hash_state
from utils import Precision

FLOAT32 = Precision("off", torch.device("cpu"))
SIZE = 28, 42  # of windows


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


@pytest.fixture
def fill(samples, tmp_path, passes):
    """Return a function that fills a cache and returns how many images went through the backbone."""
    def call(net=None, dataset=None, precision=FLOAT32, views=1):
        passes.clear()
        cache_features(net or tiny(), dataset or training_set(samples), tmp_path / "cache", precision, views)
        return sum(passes)

    return call


def maps_of(values):
    """Return the maps of a cached item side by side: (h, w, D) bfloat16."""
    return torch.cat([value for part, value in values.items() if part.kind == "map"], dim=-1)


def maps_of_model(net, image):
    """Return what the cache should hold of one image: (h, w, D) bfloat16."""
    with torch.inference_mode():
        maps = net.features(image[None]).maps
    return torch.cat([values[0].permute(1, 2, 0) for values in maps], dim=-1).bfloat16()


def is_close(values, net, image):
    """Return whether the maps of a cached item are those of an image."""
    return torch.allclose(maps_of(values).float(), maps_of_model(net, image).float(), atol=2e-2, rtol=2e-2)


def files_of(net, dataset, folder, part=Part("map", 5)):  # noqa: B008 - a tuple
    """Return the path of the file of a Part."""
    return cache.plan_files(net, [part], dataset, folder, FLOAT32, 1)[0][part].path


# --- what it holds ------------------------------------------------------------------------------------------
def test_features_and_masks_are_those_of_the_images(samples, tmp_path):
    net = tiny()
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path / "cache", FLOAT32)
    for index in range(len(samples)):
        values, targets, name = cached[len(samples) * 5 + index]  # of whatever epoch
        image, want, title = dataset[index]
        assert is_close(values, net, image)  # batches of other sizes round the last bit otherwise
        assert (maps_of(values) == maps_of_model(net, image)).float().mean() > 0.9
        assert torch.equal(targets["mask"], want["mask"]) and name == title
    with torch.no_grad():
        got = net.eval()(cached.collate([cached[3]])[0])
        assert torch.allclose(got, net(dataset[3][0][None]), atol=0.05)
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(maps_of(again[2][0]), maps_of(cached[2][0]))
    assert torch.equal(again[2][1]["mask"], cached[2][1]["mask"])
    dataset = training_set(samples, None)
    values, targets, _ = cache_features(net, dataset, tmp_path / "cache", FLOAT32)[1]
    assert targets["mask"].shape == (45, 61) and is_close(values, net, dataset[1][0])


@pytest.mark.parametrize("copy_paste", [None, CopyPaste(0.9, {1: [0, 2], 2: [1]})], ids=["", "copy-paste"])
def test_views_are_the_first_epochs_of_the_augmented_training(samples, tmp_path, copy_paste):
    """Tokens, images, the mask and every other target, in the type that training has without a cache."""
    generator, with_targets = np.random.default_rng(0), []
    for sample in samples[:3]:
        depth, edges = tmp_path / f"depth_{sample.image.stem}.npy", tmp_path / f"edges_{sample.image.name}"
        np.save(depth, np.where(generator.random((45, 61)) < 0.1, np.nan, generator.normal(size=(45, 61))))
        Image.fromarray(generator.integers(0, 3, (45, 61), dtype=np.uint8)).save(edges)
        targets = Target("depth", depth), Target("edges", edges, "labels")
        with_targets.append(sample._replace(targets=targets))
    net, count = tiny(head="split-detail"), len(with_targets)
    (block,) = net.head.reads.tokens
    dataset = training_set(with_targets, ("crop", "flip", "color"), seed=3, copy_paste=copy_paste)
    cached = cache_features(net, dataset, tmp_path / "cache", FLOAT32, views=3)
    different = 0
    for item in range(4 * count):
        epoch, index = divmod(item, count)
        values, targets, _ = cached[item]
        image, want, _ = dataset[epoch % 3 * count + index]
        assert torch.equal(values[Part("image")], image.permute(1, 2, 0))
        with torch.inference_mode():
            tokens = net.features(image[None]).tokens[block][0]
        assert torch.allclose(values[Part("tokens", block)].float(), tokens, atol=2e-2, rtol=2e-2)
        assert targets.keys() == want.keys() == {"mask", "depth", "edges"}
        for name, target in targets.items():
            torch.testing.assert_close(target, want[name], rtol=0, atol=0, equal_nan=True)
        different += not torch.equal(targets["mask"], dataset[index][1]["mask"])
    assert different > count  # the views differ
    assert targets["depth"].dtype == torch.float32
    assert targets["edges"].dtype == values[Part("image")].dtype == torch.uint8


@pytest.mark.parametrize("value", [torch.full((2, 3), 300, dtype=torch.int16), torch.full((2, 3), 0.5),
                                   torch.ones(3, dtype=torch.uint8)], ids=str)
def test_what_an_entry_cannot_hold_is_refused(tmp_path, value):
    """torch would wrap 300 to 44, cut 0.5 to 0 and repeat a row."""
    file = EntryFile(tmp_path / "mask_0.bin", 2, (2, 3), torch.uint8)
    file.create({})
    with refused("--cache-features", file.path):
        file.write(1, value)
    assert not file.has(1)
    file.write(1, torch.full((2, 3), 200, dtype=torch.uint8))
    assert file.has(1) and not file.has(0) and (file.open()[0][1] == 200).all()


@pytest.mark.parametrize(("unfreeze", "block"), [(0, -1), (0, 5), (0, 2), (2, -1), (2, -4), (2, 2), (2, 0)])
def test_a_head_gets_the_tokens_it_asks_for(samples, tmp_path, unfreeze, block):
    net, inputs = tiny(unfreeze=unfreeze), []
    net.head.reads = dataclasses.replace(net.head.reads, tokens=(block,))
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path, FLOAT32)
    want = net.features(dataset[1][0][None]).tokens
    net.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].tokens))
    net.output(cached.collate([cached[1]])[0])
    assert list(want) == list(inputs[0]) == [block]
    assert torch.allclose(inputs[0][block], want[block], atol=2e-2, rtol=2e-2)


def test_a_frozen_batch_norm_learns_nothing(samples, tmp_path):
    net = tiny(backbone="timm/resnet18", head="linear").train()
    before = hash_state(net.backbone.state_dict())
    first = cache_features(net, training_set(samples), tmp_path, FLOAT32)
    second = cache_features(net.train(), training_set(samples), tmp_path, FLOAT32)
    assert hash_state(net.backbone.state_dict()) == before
    assert first.parts[Part("map", 4)].path == second.parts[Part("map", 4)].path


def test_features_train_in_half_precision(samples, tmp_path):
    net, half = tiny(), Precision("fp16", torch.device("cpu"))
    cached = cache_features(net, training_set(samples), tmp_path, half)
    features, _, _ = cached.collate([cached[0], cached[1]])
    with half.autocast():
        logits, _ = net.logits(features)
    assert logits.isfinite().all()


# --- what it depends on -------------------------------------------------------------------------------------
def test_later_heads_and_runs_need_no_pass(fill):
    assert fill(tiny(head="bn")) == 7
    for options in (dict(head="bn"), dict(head="unet"), dict(head="linear"), dict(layers=(3, 4))):
        assert fill(tiny(**options)) == 0
    assert fill(tiny(layers=(1, 5))) == 7  # block 1 is new


@pytest.mark.parametrize("other", ["weights", "network", "normalization", "size", "precision"])
def test_whatever_the_features_depend_on_makes_another_cache(samples, fill, other):
    fill()
    net = tiny(normalize="none" if other == "normalization" else "auto")
    if other == "weights":
        net.backbone.net.blocks[0].mlp.fc1.weight.data[0, 0] += 1
    if other == "network":
        net.spec.backbone = "timm/the_same_with_another_activation"
    dataset = training_set(samples)
    if other == "size":
        dataset.size = (30, 44)
    precision = Precision("bf16" if other == "precision" else "off", torch.device("cpu"))
    assert fill(net, dataset, precision) == 7
    assert fill() == 0  # the first one is still there


def test_another_list_of_images_needs_passes_for_the_new_ones_alone(samples, tmp_path, passes):
    """Copied from whichever cache has them, and what they hold; not of cut or mirrored images."""
    def filled(some, augments=(), **options):
        passes.clear()
        return cache_features(net, training_set(some, augments, **options), tmp_path, FLOAT32), sum(passes)

    net, new = tiny(), Sample(samples[0].image.with_name("new.png"), samples[0].mask)
    Image.fromarray(random_images(3, 45, 61, seed=9).permute(1, 2, 0).numpy()).save(new.image)
    for some, count in ((samples[:3], 3), (samples[2:5], 2), ([*samples[5::-1], new, samples[6]], 3),
                        ([new, samples[1]], 0)):
        cached, passed = filled(some)
        assert passed == count
        for index in range(len(some)):
            image, targets, _ = training_set(some)[index]
            assert is_close(cached[index][0], net, image)
            assert torch.equal(cached[index][1]["mask"], targets["mask"])
    assert filled(samples[:3], ["flip"])[1] == 3
    assert filled(samples[:2], ["flip"])[1] == 2
    for some in (samples[:3], [samples[0], samples[3], samples[2]]):  # other images are pasted from
        assert filled(some, copy_paste=CopyPaste(1.0, {1: [1]}))[1] == 3


@pytest.mark.parametrize("where", ["dataio.dataloader.code_hash", "utils.code_hash", "model.origin_code"])
def test_changed_code_makes_another_cache_beside_the_old_one(tmp_path, fill, where, monkeypatch, capsys):
    """Of what reads images, of the backbone, of torch.hub's DINOv2; the old code may come back."""
    fill()
    before = set(tmp_path.glob("cache/map_*"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda *modules: "changed")
        assert fill() == 7
    text = capsys.readouterr().out  # they can be deleted
    assert all(str(path) in text for path in before if path.suffix == ".bin")
    assert fill() == 0 and before < set(tmp_path.glob("cache/map_*"))


SOURCE = '''from models.backbones import TimmBackbone


class Doubled(TimmBackbone):
    """Doubled maps."""

    def maps(self, images):
        return [FACTOR * values for values in super().maps(images)]  # doubled


FACTOR = 2
'''


def test_the_code_of_a_cache_is_that_of_the_module_of_its_backbone_without_comments(samples, tmp_path,
                                                                                   monkeypatch):
    def path(source):
        file = tmp_path / "doubled.py"
        file.write_text(source)
        linecache.checkcache(str(file))
        spec = importlib.util.spec_from_file_location("doubled", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "doubled", module)
        spec.loader.exec_module(module)
        net = tiny()
        net.backbone.__class__ = module.Doubled
        return files_of(net, training_set(samples), tmp_path)

    first = path(SOURCE)
    assert first != files_of(tiny(), training_set(samples), tmp_path)
    commented = SOURCE.replace("  # doubled", "").replace("Doubled maps.", "Maps.\n\n    Times two.\n    ")
    assert path(commented.replace("FACTOR = 2", "\n# of the maps\nFACTOR = (\n    2)")) == first
    assert path(SOURCE.replace("FACTOR = 2", "FACTOR = 3")) != first  # though not within the class


@pytest.mark.parametrize("part", [Part("map", 5), Part("tokens", 3)], ids=str)
def test_a_new_option_that_affects_features_makes_another_cache_unless_it_has_its_default(
        samples, tmp_path, part, monkeypatch):
    def path(scale, affects):
        field = "scale", float, config.setting(1.0, "model", "", affects=affects)
        monkeypatch.setattr(model, "ModelOptions",
                            dataclasses.make_dataclass("Options", [field], bases=(config.ModelOptions,)))
        net = tiny()
        net.spec.scale = scale
        return files_of(net, training_set(samples), tmp_path, part)

    plain = files_of(tiny(), training_set(samples), tmp_path, part)
    assert path(1.0, "features") == path(8.0, "head") == plain != path(8.0, "features")


def test_other_parameters_of_an_augmentation_are_another_cache(samples, fill, monkeypatch):
    def views(names=("crop", "flip"), **options):
        return fill(dataset=training_set(samples, names, **options), views=2)

    assert views() == 14 and views() == 0
    monkeypatch.setitem(AUGMENTS, "crop", ScaleCrop(scale=(0.9, 1.1)))
    assert views() == 14 and views() == 0
    assert views(("crop",)) == 14 and views(seed=1) == 14
    for images in ([0], [2]):
        assert views(copy_paste=CopyPaste(0.5, {1: images})) == 14


def test_another_table_of_classes_is_another_cache_of_masks(samples, tmp_path):
    for values in ({0: 0, 1: 1, 2: 2}, {0: 2, 1: 0, 2: 255}):
        dataset = SegmentationDataset(samples, value_table({**values, 255: 255}), (30, 43), ())
        cached = cache_features(tiny(), dataset, tmp_path, FLOAT32)
        assert torch.equal(cached[0][1]["mask"], dataset[0][1]["mask"])


def test_what_trains_is_not_in_the_key_of_what_enters_it(fill):
    """Else --resume would compute the cache again, on weights that have moved on."""
    def fill_with(changed):
        net = tiny(unfreeze=2)
        net.backbone.net.get_parameter(changed).data.add_(1)
        return fill(net)

    assert fill(tiny(unfreeze=2)) == 7 and fill(tiny(unfreeze=2, head="unet")) == 0
    assert fill_with("blocks.4.mlp.fc1.weight") == fill_with("norm.weight") == 0
    assert fill_with("blocks.3.mlp.fc1.weight") == 7
    assert fill(tiny(unfreeze=3)) == 0  # the head read what left block 2 before
    assert fill(tiny(unfreeze=4)) == 7


# --- interrupted, damaged, outdated -------------------------------------------------------------------------
def test_an_interrupted_cache_is_completed(samples, tmp_path, monkeypatch, passes):
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
        assert is_close(cached[index][0], net, training_set(samples)[index][0])


@pytest.mark.parametrize(("pattern", "cut"), [("map_*.bin", False), ("map_*.bin", True),
                                              ("mask_*.bin", False), ("map_*.sums", False)], ids=str)
def test_a_damaged_cache_is_mended(samples, tmp_path, passes, pattern, cut):
    cached = cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    want = [(maps_of(cached[index][0]), cached[index][1]["mask"].clone()) for index in range(7)]
    passes.clear()
    path = sorted(tmp_path.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content[:len(content) // 2] if cut else content)
    del cached
    again = cache_features(tiny(), training_set(samples), tmp_path, FLOAT32)
    assert sum(passes) == (7 if cut else 0 if pattern.startswith("mask") else 1)
    for index, (maps, mask) in enumerate(want):
        assert torch.allclose(maps_of(again[index][0]).float(), maps.float(), atol=2e-2, rtol=2e-2)
        assert torch.equal(again[index][1]["mask"], mask)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_changed_data_set_is_noticed_and_the_old_cache_removed(samples, tmp_path, passes, kind, capsys):
    folder = tmp_path / "cache"
    old = cache_features(tiny(), training_set(samples), folder, FLOAT32).parts[Part("map", 5)].path
    before = set(folder.glob("*_*"))
    passes.clear()
    capsys.readouterr()
    path = getattr(samples[2], kind)
    pixels = np.array(Image.open(path))
    Image.fromarray(255 - pixels if kind == "image" else 2 - pixels).save(path)
    os.utime(path, ns=(1, 1))
    net = tiny()
    cached = cache_features(net, training_set(samples), folder, FLOAT32)
    assert sum(passes) == (kind == "image") and str(old) in capsys.readouterr().out
    after = set(folder.glob("*_*"))
    assert not before & after and len(before) == len(after) == 15  # four maps and the mask, three files each
    image, targets, _ = training_set(samples)[2]
    assert is_close(cached[2][0], net, image) and torch.equal(cached[2][1]["mask"], targets["mask"])


def test_a_file_with_another_content_of_the_same_size_is_noticed(tmp_path):
    sample, net = Sample(tmp_path / "photo.bmp", tmp_path / "mask.bmp"), tiny()
    for seed in (0, 1):
        pixels = random_images(3, 45, 61, seed=seed)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(sample.image)
        Image.fromarray(pixels[0].numpy() % 3).save(sample.mask)
        dataset = training_set([sample])
        values, targets, _ = cache_features(net, dataset, tmp_path, FLOAT32)[0]
        image, want, _ = dataset[0]
        assert is_close(values, net, image) and torch.equal(targets["mask"], want["mask"])


def test_a_file_that_changes_while_features_are_computed_leaves_none(samples, tmp_path, monkeypatch, passes):
    """Even where the run is stopped at once and the file is restored."""
    fill, content = cache.fill, samples[0].image.read_bytes()

    def change_and_fill(*args):
        pixels = np.array(Image.open(samples[0].image))
        Image.fromarray(255 - pixels).save(samples[0].image)
        fill(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, refused("--cache-features", samples[0].image):
        patch.setattr(cache, "fill", change_and_fill)
        cache_features(tiny(), training_set(samples), tmp_path / "cache", FLOAT32)
    samples[0].image.write_bytes(content)
    net, dataset = tiny(), training_set(samples)
    cached = cache_features(net, dataset, tmp_path / "cache", FLOAT32)
    for index in range(len(samples)):
        assert is_close(cached[index][0], net, dataset[index][0])


def test_a_cache_that_cannot_be_written_can_be_read(samples, tmp_path, monkeypatch):
    folder, part = tmp_path / "cache", Part("map", 2)
    folder.mkdir()
    (folder / "notes.json").write_text("[1]")  # somebody else's
    want = cache_features(tiny(), training_set(samples), folder, FLOAT32)[3][0][part].clone()
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    again = cache_features(tiny(), training_set(samples), folder, FLOAT32)
    assert torch.equal(again[3][0][part], want)
    content = bytearray(again.parts[part].path.read_bytes())
    content[100] ^= 1
    again.parts[part].path.write_bytes(content)
    with refused("--cache-features", folder):
        cache_features(tiny(), training_set(samples), folder, FLOAT32)


def test_a_complete_cache_needs_no_lock_and_an_incomplete_one_says_what_is_missing(samples, tmp_path,
                                                                                    monkeypatch):
    def of_another_user(lock, *args):
        raise PermissionError(errno.EACCES, "Permission denied", lock.lock_file)

    folder, dataset = tmp_path / "cache", training_set(samples)
    cache_features(tiny(), dataset, folder, FLOAT32)
    monkeypatch.setattr(cache.FileLock, "_acquire", of_another_user)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    cache_features(tiny(), dataset, folder, FLOAT32)
    for missing in folder.glob("*.bin"):
        missing.unlink()
    with refused("--cache-features", folder / ".cache.lock", "Permission denied", "another folder"):
        cache_features(tiny(), dataset, folder, FLOAT32)
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    with refused("--cache-features", folder, "cannot be written"):
        cache_features(tiny(), dataset, folder, FLOAT32)
    assert not list(folder.glob("*.bin"))


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


# --- training on it -----------------------------------------------------------------------------------------
def gradients(net, inputs, targets):
    """Return (loss, {name: gradient}) of a training step of a model on images or on cached features."""
    net.zero_grad()
    loss, _, _, _ = engine.Objective(net, Criterion("ce")).train()(inputs, targets)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in net.named_parameters()
                         if parameter.grad is not None}


QUICK = {"bn", "detail", "split-detail", "mask"}  # what the others read, these read too


@pytest.mark.parametrize(("backbone", "options", "unfreeze"), [
    *(pytest.param("vit_tiny", dict(head=head), unfreeze, marks=() if head in QUICK else pytest.mark.long)
      for head in config.names("head") for unfreeze in (0, 4 if head == "mask" else 2)),
    ("vit_tiny", dict(layers=(1, 3, 5)), 1),
    ("vit_tiny", dict(), 6),
    ("dinov2_vits14", dict(head="split"), 1),
    ("timm/vit_small_patch16_dinov3", dict(layers=(1, 10, 11)), 1),
    ("timm/vit_small_patch16_rope_mixed_224", dict(), 2),
    ("timm/vit_small_patch16_dinov3", dict(head="split", split_blocks=1), 0),
    ("timm/vit_small_patch16_dinov3", dict(head="mask", split_blocks=2), 0),
], ids=str)
def test_a_cached_step_is_a_step_on_the_images(samples, tmp_path, hub_cache, backbone, options, unfreeze):
    net = build(backbone=backbone, unfreeze=unfreeze, **options)
    with torch.no_grad():  # LayerScale begins near 0, where blocks do next to nothing
        for name, value in net.named_parameters():
            if ".gamma" in name:
                value.fill_(1.0)
    dataset = training_set(samples)
    cached = cache_features(net, dataset, tmp_path, FLOAT32)
    images, targets, _ = collate([dataset[index] for index in range(5)])
    features, _, _ = cached.collate([cached[index] for index in range(5)])
    want_loss, want = gradients(net, images, targets)
    loss, got = gradients(net, features, targets)
    assert loss == pytest.approx(want_loss, rel=5e-3) and got.keys() == want.keys() and len(got) >= 2
    assert unfreeze == 0 or any(name.startswith("backbone") for name in got)
    largest = max(gradient.norm() for gradient in want.values())
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 0.1 or gradient.norm() < 1e-4 * largest, (name, error)


# --- as a user calls it -------------------------------------------------------------------------------------
def flags(root, out, *more):
    base = ["--dataset", "folder", "--data-root", root, "--backbone", "vit_tiny", "--imgsz", 30, 43]
    base += ["--epochs", 1, "--batch-size", 3, "--workers", 0, "--device", "cpu"]
    return [*base, "--out-dir", out, *more]


def test_one_view_trains_as_without_a_cache(samples, tmp_path, run):
    rows = {}
    more = dict(plain=["--augment", "none"], cached=["--cache-features", tmp_path / "cache"])
    for name in more:
        base = flags(tmp_path / "data", tmp_path / name, "--epochs", 3, "--amp", "bf16")
        code, _, err = run(train, *base, *more[name])
        assert code == 0, err
        rows[name] = history_of(tmp_path / name)
    for a, b in zip(rows["plain"], rows["cached"], strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], rel=0.01)
        assert a["val_accuracy"] == pytest.approx(b["val_accuracy"], abs=0.02)
    assert rows["plain"][0]["train_loss"] != rows["plain"][2]["train_loss"]


def test_a_cached_run_with_views_and_workers(samples, tmp_path, run):
    more = ["--cache-features", tmp_path / "cache", "--cache-views", 2, "--augment", "crop", "flip"]
    more += ["--head", "deconv-resize", "--workers", 2, "--loss", "ce+dice"]
    code, out, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *more))
    assert code == 0 and "12 train views" in out and str(tmp_path / "cache") in out, err
    assert (tmp_path / "out/valid_preds/epoch_001.png").exists()


def test_no_room_on_the_disk_ends_before_anything_is_written(samples, tmp_path, monkeypatch, run):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    for folder in (tmp_path / "cache", tmp_path / "file"):  # no folder can be made where a file is
        (tmp_path / "file").write_text("")
        more = ["--cache-features", folder]
        code, _, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *more))
        assert code == 2 and err.count("\n") == 1 and "--cache-features" in err and str(folder) in err
        assert not list((tmp_path / "cache").glob("*_*")) and not (tmp_path / "out/config.json").exists()


def test_files_of_another_user_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def denied(path, **_):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(cache.Path, "unlink", denied)  # of their files, in a folder with the sticky bit
    with refused("--cache-features", tmp_path / "a.sums", "another user"):
        cache.EntryFile(tmp_path / "a.bin", 1, (1,), torch.float32).create({})


TINY = ("--backbone", "vit_tiny")


@pytest.mark.parametrize(("more", "named"), [
    (["--cache-features", "--unfreeze", "all", *TINY], "--cache-features"),
    (["--cache-features", "--backbone", "timm/resnet18", "--weights", "none", "--unfreeze", "all"],
     "--cache-features"),
    (["--cache-features", "--arch", "segformer_b0", "--weights", "none"], "segformer_b0"),
    (["--cache-features", "--arch", "segformer_b0", "--weights", "none", "--unfreeze", 0], "segformer_b0"),
    (["--cache-views", 2], "--cache-features"),
    (["--cache-features", "--epochs", 1, "--augment", "flip"], "--cache-views"),
    (["--cache-features", "--epochs", 1, "--copy-paste"], "--copy-paste"),
    (["--copy-paste", "--train-scale", "native"], "--copy-paste"),
    (["--backbone-lr-scale", 0.5, *TINY], "--backbone-lr-scale"),
    (["--split-blocks", 2, *TINY], "--split-blocks"),
    (["--head", "mask", "--loss", "dice", *TINY], "--head mask"),
    (["--head", "mask", "--class-weights", "enet", *TINY], "--head mask"),
    (["--augment", "crop", "--train-scale", "native", *TINY], "--augment crop"),
    (["--augment", "crop", "crop-ms", *TINY], "--augment crop crop-ms"),
    (["--head", "mask", "--unfreeze", 3, *TINY], "--unfreeze 3"),  # of no effect: the last 3 are copied
    (["--head", "mask", "--split-blocks", 2, "--unfreeze", 2, *TINY], "--unfreeze 2"),
    (["--layers", 2, "--unfreeze", 1, *TINY], "--unfreeze 1"),
    (["--layers", 2, "--unfreeze", 3, "--cache-features", *TINY], "--unfreeze 3"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_flags_that_contradict_each_other_or_have_no_effect_are_refused_before_a_file_is_written(
        tmp_path, run, more, named):
    write_folder(tmp_path / "data")
    flags = ["--dataset", "folder", "--data-root", tmp_path / "data", "--out-dir", tmp_path / "out"]
    code, _, err = run(train, *flags, *more)
    assert code == 2 and named in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--head", "mask", "--unfreeze", 4], ["--layers", 2, "--unfreeze", 4],
                                  ["--head", "split", "--split-blocks", 2, "--unfreeze", 1]], ids=str)
def test_blocks_that_a_gradient_reaches_train(samples, tmp_path, run, more):
    code, _, err = run(train, *flags(tmp_path / "data", tmp_path / "out", *TINY, *more))
    assert code == 0, err


@pytest.mark.parametrize("kind", ["windows", "tiles"])
def test_windows_of_an_image_are_not_taken_for_each_other(samples, tmp_path, kind):
    """Where images are added, a cache copies what it knows of the others, by what their files hold."""
    net = tiny(head="detail")

    def cached(some):
        reader = WindowReader(some, index_table(3), "", PICTURES)
        dataset = WindowDataset(reader, SIZE, (), 3) if kind == "windows" else TileDataset(reader, SIZE)
        return dataset, cache_features(net, dataset, tmp_path / "cache", FLOAT32)

    cached(samples[2:6])
    dataset, features = cached(samples)
    for number in range(len(dataset)):
        image = dataset[number][0].permute(1, 2, 0)
        assert torch.equal(features[number][0][Part("image")], image), number
