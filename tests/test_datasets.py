"""Data sets are found where users have them; batches depend on seed and epoch alone."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blocks, load, real_data, refused, write_folder, write_pair, write_tree
from PIL import Image

import datasets
import model
from dataio.classes import ADE20K
from dataio.feature_cache import file_facts
from dataio.dataloader import EpochSampler, SegmentationDataset, collate, make_loader, naming_files
from dataio.readers import DataSource, Sample, Target, index_table, read_image, read_mask
from dataio.resizing import resize_mask


def small_dataset(root, count=6, **options):
    """Return a SegmentationDataset over `count` pairs of the size 45 x 61."""
    write_folder(root, count=count)
    samples = [Sample(path, root / "masks" / path.name) for path in sorted((root / "images").iterdir())]
    return SegmentationDataset(samples, index_table(3), (32, 40), **options)


def test_training_and_validation_items(tmp_path):
    image, targets, name = small_dataset(tmp_path, augments=())[0]
    assert image.shape == (3, 32, 40) and targets["mask"].shape == (32, 40) and name.endswith("00.png")
    image, targets, _ = small_dataset(tmp_path)[0]  # validation: the mask at its own size
    assert image.shape == (3, 32, 40) and targets["mask"].shape == (45, 61)


def test_targets_travel_with_their_images_into_batches(tmp_path):
    """Of images that differ in size, too, and beside images without mask."""
    write_folder(tmp_path, count=3)
    write_pair(tmp_path / "images/02.png", tmp_path / "masks/02.png", blocks(30, 50, (0, 1, 2)))
    samples = []
    for image in sorted((tmp_path / "images").iterdir()):
        mask = tmp_path / "masks" / image.name
        np.save(tmp_path / f"{image.stem}.npy", np.array(Image.open(mask)) / 2)
        depth, teacher = Target("depth", tmp_path / f"{image.stem}.npy"), Target("teacher", mask, "labels")
        samples.append(Sample(image, mask if samples else None, (depth, teacher)))
    train = SegmentationDataset(samples, index_table(3), (32, 40), ("crop", "flip"))
    images, targets, names = next(iter(make_loader(train, 3, 0)))
    assert images.shape == (3, 3, 32, 40) and len(names) == 3
    assert {name: (values.shape, values.dtype) for name, values in targets.items()} == {
        "mask": ((3, 32, 40), torch.uint8), "depth": ((3, 32, 40), torch.float32),
        "teacher": ((3, 32, 40), torch.uint8)}
    without = names.index(str(samples[0].image))
    assert (targets["mask"][without] == 255).all() and (targets["teacher"][without] != 255).any()
    for number in set(range(3)) - {without}:
        assert torch.equal(targets["mask"][number], targets["teacher"][number])
    apart = (2 * targets["depth"] - targets["teacher"])[targets["teacher"] != 255].abs() > 0.5
    assert apart.float().mean() < 0.1 and targets["depth"][targets["teacher"] == 255].isnan().all()
    val = SegmentationDataset(samples, index_table(3), (32, 40))
    images, targets, _ = collate([val[index] for index in range(3)])
    assert images.shape == (3, 3, 32, 40)
    for batch in targets.values():
        assert [values.shape for values in batch] == [(45, 61), (45, 61), (30, 50)]
    with refused("depth"):
        SegmentationDataset([samples[0], Sample(samples[1].image)], index_table(3), (32, 40))
    source = DataSource("x", [], {"train": samples, "val": samples}, index_table(3))
    relabeled = [sample._replace(targets=sample.targets[:1]) for sample in samples]
    other = DataSource("x", [], {"train": relabeled, "val": relabeled}, index_table(3))
    assert source.fingerprints()["data_fingerprint"] != other.fingerprints()["data_fingerprint"]
    assert file_facts(samples) != file_facts(relabeled)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(tmp_path, workers):
    def epochs(numbers, workers):
        dataset = small_dataset(tmp_path, augments=("crop", "flip", "color"), seed=7)
        loader, batches = make_loader(dataset, 2, workers), []
        for epoch in numbers:
            loader.sampler.set_epoch(epoch)
            batches.append(list(loader))
        return batches

    straight, resumed = epochs([0, 1, 2], 0), epochs([2], workers)
    for (images, targets, names), (again, same, titles) in zip(straight[2], resumed[0], strict=True):
        assert names == titles and torch.equal(images, again) and torch.equal(targets["mask"], same["mask"])
    assert [names for *_, names in straight[0]] != [names for *_, names in straight[1]]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("no shared memory")])
def test_where_no_worker_can_be_started_the_data_are_loaded_without(tmp_path, monkeypatch, capsys, error):
    import multiprocessing.process

    def start(self):
        raise error

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    batches = make_loader(small_dataset(tmp_path, augments=()), 2, 2)
    batches.start(1)
    names = [names for *_, names in batches]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "--workers" in out and sum(map(len, names)) == 6
    assert batches.workers == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_may_be_read_in_inference_mode_and_closed_outside(tmp_path, workers):
    batches = make_loader(small_dataset(tmp_path), 2, workers)
    with naming_files(batches), torch.inference_mode():
        assert len(list(batches)) == len(batches) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_an_epoch_early_moves_no_random_numbers(tmp_path, workers):
    batches = make_loader(small_dataset(tmp_path, augments=("flip",)), 2, workers)
    state = torch.get_rng_state()
    batches.start(3)
    first = [names for *_, names in batches]
    batches.sampler.set_epoch(3)
    assert first == [names for *_, names in batches] and torch.equal(torch.get_rng_state(), state)


def test_sampler_sees_every_image_once_an_epoch():
    sampler = EpochSampler(50, seed=3)
    sampler.set_epoch(4)
    items = list(sampler)
    assert sorted(item % 50 for item in items) == list(range(50))
    assert {item // 50 for item in items} == {4} and items != sorted(items)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("length", "per_epoch"), [(5, 12), (7, 3), (6, 6), (1, 4), (50, 33)])
def test_epochs_of_a_number_of_images_go_on_where_the_last_one_ended(length, per_epoch, processes):
    """Together the epochs are whole passes: after n passes every image was seen n times, in new orders."""
    parts = [EpochSampler(length, 3, rank, processes, per_epoch) for rank in range(processes)]
    assert {len(part) for part in parts} == {-(-per_epoch // processes)}
    seen = []
    for epoch in range(length):  # so many images as `per_epoch` passes
        for part in parts:
            part.set_epoch(epoch)
        lists = [list(part) for part in parts]
        together = [item for group in zip(*lists, strict=True) for item in group]
        seen += together[:per_epoch]
        parts[0].set_epoch(epoch, skip=1)
        assert list(parts[0]) == lists[0][1:]
    assert sorted(item % length for item in seen) == sorted(list(range(length)) * per_epoch)
    assert [item // length for item in seen] == sorted(item // length for item in seen)  # pass after pass
    whole = EpochSampler(length, 3)
    whole.set_epoch(1)
    order = list(whole)  # of a pass is that of an epoch
    assert seen[length:2 * length] == order[:len(seen) - length]


def test_dataset_can_be_sent_to_spawned_workers(tmp_path):
    dataset = pickle.loads(pickle.dumps(small_dataset(tmp_path, augments=("flip",))))
    assert dataset[0][0].shape == (3, 32, 40)


def test_mask_of_another_size_is_brought_to_the_image(tmp_path):
    dataset = small_dataset(tmp_path, augments=())
    mask = blocks(45, 61, (0, 1, 2), seed=0)
    Image.fromarray(np.kron(mask, np.ones((3, 3), np.uint8))).save(dataset.samples[0].mask)
    assert torch.equal(dataset[0][1]["mask"], resize_mask(torch.from_numpy(mask), (32, 40)))


def test_mask_drawn_on_the_stored_pixels_of_a_phone_photo_follows_its_image(tmp_path):
    dataset = small_dataset(tmp_path, count=1, augments=())
    upright = dataset[0][1]["mask"]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(dataset.samples[0].image) as image, Image.open(dataset.samples[0].mask) as mask:
        image.rotate(90, expand=True).save(dataset.samples[0].image, exif=exif)
        mask.rotate(90, expand=True).save(dataset.samples[0].mask)
    assert torch.equal(dataset[0][1]["mask"], upright)


# --- finding data sets ------------------------------------------------------------------------------------
def write_voc(base):
    """Write a VOC tree of two images with void pixels."""
    for split, name in (("train", "2007_000001"), ("val", "2007_000002")):
        mask = blocks(40, 50, (0, 15, 20, 255))
        write_pair(base / f"JPEGImages/{name}.jpg", base / f"SegmentationClass/{name}.png", mask)
        lists = base / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_bytes(f"{name}\r\n\r\n{name}\r\n".encode())


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2012", ".", "voc/VOCdevkit/VOC2012"])
def test_voc_is_found_in_every_tree_users_have(tmp_path, place):
    write_voc(tmp_path / place)
    source = load("voc", tmp_path)
    assert len(source.splits["train"]) == len(source.splits["val"]) == 1
    assert len(source.classes) == 21 and source.table[20] == 20 and source.table[255] == 255


@pytest.mark.parametrize(("name", "line"), [
    ("trainaug", "2008_000001"),
    ("train_aug", "/JPEGImages/2008_000001.jpg /SegmentationClassAug/2008_000001.png"),
])  # fmt: skip
def test_the_extra_annotations_of_voc(tmp_path, name, line):
    """More training images with masks of their own; a validation image in the list does not train, though
    its mask there is another file.
    """
    write_voc(tmp_path)
    with refused("ImageSets/Segmentation/trainaug.txt", tmp_path):
        load("voc-aug", tmp_path)
    val = (tmp_path / "ImageSets/Segmentation/val.txt").read_text().split()[0]
    (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text(f"{line}\n{val}\n")
    with refused("SegmentationClassAug", tmp_path):
        load("voc-aug", tmp_path)
    for stem in ("2008_000001", val):
        write_pair(tmp_path / f"JPEGImages/{stem}.jpg", tmp_path / f"SegmentationClassAug/{stem}.png",
                   blocks(45, 61, (0, 7)))  # fmt: skip
    source = load("voc-aug", tmp_path)
    assert [sample.mask.parent.name for sample in source.splits["train"]] == ["SegmentationClassAug"]
    assert [sample.mask.parent.name for sample in source.splits["val"]] == ["SegmentationClass"]
    assert source.name == "voc-aug" and len(source.notes) == 1


def test_voc_offline_says_which_file_goes_where(tmp_path, monkeypatch):
    import torchvision.datasets

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", no_network)
    with refused(datasets.VOC_TAR, tmp_path, "--data-root"):
        load("voc", tmp_path)


def test_voc_download_goes_through_torchvision(tmp_path, monkeypatch):
    """A tar as VOC's own, served from disk: torchvision checks, unpacks, and the tree is found."""
    import tarfile

    import torchvision.datasets.voc as voc_module

    write_voc(tmp_path / "made/VOCdevkit/VOC2012")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / datasets.VOC_TAR, "w") as tar:
        tar.add(tmp_path / "made/VOCdevkit", "VOCdevkit")
    import hashlib

    year = dict(
        voc_module.DATASET_YEAR_DICT["2012"],
        md5=hashlib.md5((root / datasets.VOC_TAR).read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(voc_module.DATASET_YEAR_DICT, "2012", year)
    assert len(load("voc", root).splits["train"]) == 1


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "SegmentationClass/2007_000002.png").unlink()
    with refused("SegmentationClass/2007_000002.png"):
        load("voc", tmp_path)


def test_missing_roots_and_blocked_places(tmp_path):
    with refused("--data-root", "nowhere"):
        load("folder", tmp_path / "nowhere")
    (tmp_path / "streets").mkdir()
    with refused(tmp_path / "streets", "--data-root"):
        load("streets", tmp_path)


def test_fingerprint_follows_the_files(tmp_path):
    write_voc(tmp_path)
    before = load("voc", tmp_path).fingerprints()
    assert before == load("voc", tmp_path).fingerprints()
    write_pair(
        tmp_path / "JPEGImages/2007_000002.jpg",
        tmp_path / "SegmentationClass/2007_000002.png",
        blocks(30, 30, (0, 1)),
    )
    after = load("voc", tmp_path).fingerprints()
    assert before["data_fingerprint"] != after["data_fingerprint"]
    assert before["split_fingerprint"] == after["split_fingerprint"]


# --- every data set, from trees as they are downloaded ----------------------------------------------------
@pytest.mark.parametrize("name", ["voc", "aeroscapes", "pet", "cityscapes", "ade20k"])
def test_trees_of_every_data_set_are_read_with_their_own_values(name, tmp_path):
    values = write_tree(name, tmp_path)
    source = load(name, tmp_path)
    assert source.classes == datasets.DATASETS[name][1] and source.name == name
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 4, "val": 2}
    for samples in source.splits.values():
        for sample in samples:
            stored = np.array(Image.open(sample.mask)).astype(int)
            want = np.vectorize(lambda value: values.get(value, 255))(stored)
            assert (read_mask(sample.mask, source.table) == want).all() and len(np.unique(want)) > 1
            image = read_image(sample.image)
            assert image.shape[1:] == want.shape


def test_cityscapes_takes_train_ids_where_every_image_has_them(tmp_path):
    write_tree("cityscapes", tmp_path)
    raw = load("cityscapes", tmp_path)
    samples = [sample for part in raw.splits.values() for sample in part]
    for count, sample in enumerate(samples, 1):
        trained = sample.mask.with_name(sample.mask.name.replace("labelIds", "labelTrainIds"))
        Image.fromarray(read_mask(sample.mask, raw.table)).save(trained)
        now = load("cityscapes", tmp_path)
        assert ("labelTrainIds" in now.splits["val"][0].mask.name) == (count == len(samples))
    for old, new in zip(samples, [s for part in now.splits.values() for s in part], strict=True):
        assert (read_mask(old.mask, raw.table) == read_mask(new.mask, now.table)).all()


def test_wrong_values_of_every_data_set_are_named(tmp_path):
    for name, wrong in (("aeroscapes", 12), ("pet", 4), ("cityscapes", 34), ("ade20k", 151), ("pet", 0)):
        root = tmp_path / f"{name}{wrong}"
        write_tree(name, root)
        source = load(name, root)
        Image.new("L", (8, 8), wrong).save(source.splits["train"][0].mask)
        path = source.splits["train"][0].mask
        with refused(path, wrong, 64):
            read_mask(path, source.table)


@pytest.mark.parametrize(
    ("name", "size", "place"),
    [
        ("camvid", "180 MB", "trainannot"),
        ("aeroscapes", "750 MB", "ImageSets/trn.txt"),
        ("cityscapes", "11 GB", "gtFine"),
        ("ade20k", "923 MB", "annotations/training"),
        ("pet", "755 MB", "oxford-iiit-pet"),
    ],
)
def test_missing_data_say_what_to_download_how_big_it_is_and_where_it_goes(
    name, size, place, tmp_path, monkeypatch
):
    import torchvision.datasets.utils as downloads

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", no_network)
    for root in (tmp_path, tmp_path / "nowhere"):
        with refused(root, "--data-root", size, place):
            load(name, root)


def test_pet_is_found_where_torchvision_puts_it(tmp_path):
    write_tree("pet", tmp_path / "oxford-iiit-pet")
    assert len(load("pet", tmp_path).splits["train"]) == 4


@pytest.mark.parametrize("name", ["voc", "aeroscapes"])
def test_resplit_pools_all_images_and_shares_no_image(name, tmp_path):
    write_tree(name, tmp_path)
    plain = load(name, tmp_path)
    again = load(name, tmp_path, resplit=True, val_fraction=0.5, cache_dir=tmp_path / "cache")
    train, val = (set(again.splits[split]) for split in ("train", "val"))
    assert len(train) == len(val) == 3 and not train & val
    assert train | val == {sample for part in plain.splits.values() for sample in part}
    assert again.fingerprints()["data_fingerprint"] == plain.fingerprints()["data_fingerprint"]
    assert again.fingerprints()["split_fingerprint"] != plain.fingerprints()["split_fingerprint"]
    assert "3 of 6 images" in again.notes[0] and "background" in "".join(again.notes)
    same = load(name, tmp_path, resplit=True, val_fraction=0.5, cache_dir=tmp_path / "cache")
    assert same.splits == again.splits


def test_a_few_training_images_are_drawn_by_the_seed(tmp_path):
    write_tree("aeroscapes", tmp_path, counts=(9, 3))
    whole, drawn = load("aeroscapes", tmp_path), []
    for seed in range(4):
        few = load("aeroscapes", tmp_path, train_images=5, seed=seed)
        train, unused = few.splits["train"], few.splits["unused"]
        assert len(train) == 5 and sorted([*train, *unused]) == sorted(whole.splits["train"])
        assert few.splits["val"] == whole.splits["val"]
        assert few.fingerprints()["data_fingerprint"] == whole.fingerprints()["data_fingerprint"]
        assert few.splits == load("aeroscapes", tmp_path, train_images=5, seed=seed).splits
        drawn.append(tuple(train))
    assert len(set(drawn)) > 1
    assert load("aeroscapes", tmp_path, train_images=10).splits["train"] == whole.splits["train"]


def test_validation_images_in_the_train_list_do_not_train(tmp_path):
    write_tree("aeroscapes", tmp_path)
    lists = tmp_path / "ImageSets"
    names = (lists / "val.txt").read_text()
    (lists / "trn.txt").write_text((lists / "trn.txt").read_text() + names)
    source = load("aeroscapes", tmp_path)
    assert len(source.splits["train"]) == 4 and not set(source.splits["train"]) & set(source.splits["val"])
    assert len(source.notes) == 1 and "2 training images" in source.notes[0]
    again = load("aeroscapes", tmp_path, resplit=True, cache_dir=tmp_path / "cache")
    assert sum(len(part) for part in again.splits.values()) == 6
    (lists / "trn.txt").write_text(names)
    assert load("aeroscapes", tmp_path).splits["train"] == []  # still good to evaluate on


def test_ade20k_ignores_255_too(tmp_path):
    write_tree("ade20k", tmp_path)
    assert load("ade20k", tmp_path).table[[0, 255, 1, 150]].tolist() == [255, 255, 0, 149]


def test_an_entry_with_the_classes_of_another_data_set_is_refused(tmp_path, monkeypatch):
    write_tree("pet", tmp_path)
    monkeypatch.setitem(datasets.DATASETS, "pet", (datasets.pet, datasets.VOC))
    with refused("--dataset pet", "DATASETS"):
        load("pet", tmp_path)


def test_list_files_that_are_not_utf8_or_hold_comments_alone(tmp_path):
    write_tree("pet", tmp_path)
    (tmp_path / "annotations/test.txt").write_text("#Image CLASS-ID\n")
    with refused("test.txt"):
        load("pet", tmp_path)
    (tmp_path / "annotations/test.txt").write_bytes(b"\xff\xfe1")
    with refused("test.txt", "UTF-8"):
        load("pet", tmp_path)


def test_fingerprints_tell_folders_and_decoding_apart(tmp_path):
    for part in ("s1", "s2"):
        write_pair(tmp_path / part / "a.png", tmp_path / part / "m/a.png", blocks(8, 8, (0, 1)))
    one, two = (Sample(tmp_path / part / "a.png", tmp_path / part / "m/a.png") for part in ("s1", "s2"))
    sources = [
        DataSource("x", [], {"train": [train], "val": [val]}, index_table(count))
        for train, val, count in ((one, two, 2), (two, one, 2), (one, two, 3))
    ]
    a, b, c = (source.fingerprints() for source in sources)
    assert a["data_fingerprint"] == b["data_fingerprint"] and a["split_fingerprint"] != b["split_fingerprint"]
    assert a["data_fingerprint"] != c["data_fingerprint"] and a["split_fingerprint"] == c["split_fingerprint"]
    shutil.copytree(tmp_path / "s1", tmp_path / "moved/s1")
    shutil.copytree(tmp_path / "s2", tmp_path / "moved/s2")
    moved = {
        split: [Sample(*(tmp_path / "moved" / path.relative_to(tmp_path) for path in sample.files()))]
        for split, sample in (("train", one), ("val", two))
    }
    assert DataSource("x", [], moved, index_table(2)).fingerprints() == a


def test_a_file_is_the_same_however_its_path_is_spelled(tmp_path, monkeypatch):
    """Else a model would be scored on images that it was trained on."""
    for name in ("a", "b", "c"):
        write_pair(tmp_path / f"s/{name}.png", tmp_path / f"s/m/{name}.png", blocks(8, 8, (0, 1)))
    monkeypatch.chdir(tmp_path)

    def samples(root, *names):
        return [Sample(Path(root, f"{name}.png"), Path(root, "m", f"{name}.png")) for name in names]

    sources = [DataSource("x", [], {"train": samples(root, "a", "b"), "val": samples("s", "b", "c")},
                          index_table(2)) for root in ("s", "s/../s", tmp_path / "s")]
    for source in sources:
        kept = datasets.without_leaks(source)
        assert [sample.image.name for sample in kept.splits["train"]] == ["a.png"] and len(kept.notes) == 1
        assert source.fingerprints() == sources[0].fingerprints()
        assert file_facts([*source.splits["train"], *source.splits["val"]])


def test_a_fingerprint_does_not_depend_on_where_masks_are_drawn(tmp_path, monkeypatch):
    found = []
    for cache in ("A", "z"):  # before and behind the data in the alphabet
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        samples = []
        for name in ("a", "b"):
            drawn = tmp_path / cache / f"dinoseg/masks/x/{name}.png"
            samples.append(Sample(tmp_path / f"m/{name}.png", drawn))
            write_pair(samples[-1].image, drawn, blocks(8, 8, (0, 1)))
        parts = {"train": samples[:1], "val": samples[1:]}
        found.append(DataSource("x", [], parts, index_table(2)).fingerprints())
    assert found[0] == found[1]


def test_a_data_set_without_a_part_is_refused(tmp_path, monkeypatch):
    write_tree("aeroscapes", tmp_path)
    whole = datasets.aeroscapes(tmp_path, None, False)
    for splits, name in (
        ({"train": whole.splits["train"], "valid": whole.splits["val"]}, "train, valid"),
        ({"train": whole.splits["train"], "val": []}, "--resplit"),
        ({"train": whole.splits["train"]}, "--resplit"),
        ({"val": whole.splits["val"]}, "train, val and test"),
    ):
        monkeypatch.setitem(datasets.DATASETS, "aeroscapes", (lambda *_, splits=splits: dataclasses.replace(
            whole, splits=splits), None))
        with refused("aeroscapes", name):
            datasets.check_trainable(load("aeroscapes", tmp_path))
    alone = {"train": whole.splits["train"]}  # the advice, followed
    monkeypatch.setitem(datasets.DATASETS, "aeroscapes", (lambda *_: dataclasses.replace(
        whole, splits=alone), None))
    again = load("aeroscapes", tmp_path, cache_dir=tmp_path / "cache", resplit=True)
    datasets.check_trainable(again)
    assert sum(again.counts.values()) == len(alone["train"]) and all(again.counts.values())


@pytest.mark.parametrize(("name", "gone"), [("aeroscapes", 0), ("pet", 1)])
def test_ignore_background_leaves_out_its_pixels_and_nothing_else(name, gone, tmp_path):
    write_tree(name, tmp_path)
    whole, without = load(name, tmp_path), load(name, tmp_path, ignore_background=True)
    assert without.classes == [c for c in whole.classes if c[0] != "background"]
    for sample in whole.splits["train"]:
        before, after = read_mask(sample.mask, whole.table), read_mask(sample.mask, without.table)
        assert ((after == 255) == ((before == 255) | (before == gone))).all()
        kept = after != 255
        assert (after[kept] == before[kept] - (before[kept] > gone)).all() and kept.any()
    with refused("--ignore-background", "camvid"):
        datasets.without_background(load("camvid", real_data("camvid")))


def test_real_samples_of_every_data_set(tmp_path):
    aeroscapes = load("aeroscapes", real_data("aeroscapes_sample"))
    assert aeroscapes.splits["train"] == [] and len(aeroscapes.notes) == 1
    mask = read_mask(aeroscapes.splits["val"][0].mask, aeroscapes.table)
    assert mask.shape == (720, 1280) and np.unique(mask).tolist() == [0, 1, 3, 7, 8, 9, 10, 11]
    pet = load("pet", real_data("pet_sample"))
    assert (len(pet.splits["train"]), len(pet.splits["val"])) == (9, 3)
    for sample in pet.splits["train"]:
        assert set(np.unique(read_mask(sample.mask, pet.table))) == {0, 1, 2}
    city = load("cityscapes", real_data("cityscapes_sample"))
    (sample,) = city.splits["val"]
    ids = read_mask(sample.mask, city.table)
    trained = sample.mask.with_name(sample.mask.name.replace("labelIds", "labelTrainIds"))
    assert (ids != np.array(Image.open(trained))).mean() < 0.005  # the sample was shrunk file by file
    assert len(city.splits["train"]) == 2 and ids.shape == (128, 256)
    ade20k = load("ade20k", real_data("ade20k_sample"))
    (sample,) = ade20k.splits["val"]
    stored = np.array(Image.open(sample.mask)).astype(int)
    assert (read_mask(sample.mask, ade20k.table) == np.where(stored == 0, 255, stored - 1)).all()
    assert ade20k.splits["train"] == []


def test_class_names_of_ade20k_are_those_of_its_list():
    lines = (real_data("ade20k_sample") / "objectInfo150.csv").read_text().splitlines()[1:]
    for line, (name, _) in zip(lines, ADE20K, strict=True):
        synonyms = ";" + line.split(",")[-1].lower() + ";"  # the list has `;` for every space
        assert f";{name.replace(' ', ';')};" in synonyms, (name, line)
    assert ADE20K[130][0] == "screen" and ADE20K[141][0] == "crt screen"


def test_a_table_with_an_id_that_is_not_a_class_is_refused(tmp_path, monkeypatch):
    write_tree("voc", tmp_path)
    find, classes = datasets.DATASETS["voc"]

    def wrong(root, options, download):
        return dataclasses.replace(find(root, options, download), table=index_table(22))

    monkeypatch.setitem(datasets.DATASETS, "voc", (wrong, classes))
    with refused("--dataset voc", 21):
        load("voc", tmp_path)


def test_the_test_part_of_camvid_is_scored_where_it_lies_there(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        mask = blocks(20, 30, (0, 5, 11), seed=number)
        write_pair(tmp_path / split / f"{number}.png", tmp_path / f"{split}annot" / f"{number}.png", mask)
    assert [sample.image.stem for sample in load("camvid", tmp_path).splits["test"]] == ["2"]
    (tmp_path / "testannot").rename(tmp_path / "elsewhere")
    assert set(load("camvid", tmp_path).splits) == {"train", "val"}


def test_real_camvid_and_voc():
    camvid = load("camvid", real_data("camvid"))
    assert len(camvid.splits["train"]) == 367 and len(camvid.splits["val"]) == 101
    assert camvid.table[11] == 255 and len(camvid.classes) == 11
    voc = load("voc", real_data("voc_sample"))
    assert [sample.image.stem for sample in voc.splits["val"]] == ["2007_000063"]
    dataset = SegmentationDataset(voc.splits["val"], voc.table, (56, 56))
    mask = dataset[0][1]["mask"]
    assert mask.shape == (375, 500) and set(mask.unique().tolist()) <= {*range(21), 255}


# --- every registered data set ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", datasets.DATASETS)
def test_registered_classes_are_names_with_colors(name):
    _, classes = datasets.DATASETS[name]
    if classes is not None:
        assert 2 <= len(classes) < datasets.OUTSIDE and len({name for name, _ in classes}) == len(classes)
        assert all(len(color) == 3 and all(0 <= part <= 255 for part in color) for _, color in classes)


@pytest.mark.parametrize("name", [name for name in datasets.DATASETS if name != "streets"])
def test_a_data_set_that_is_not_there_is_one_line_with_the_flag(name, tmp_path, monkeypatch):
    import torchvision.datasets.utils as downloads

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", no_network)
    for root in (tmp_path / "nowhere", tmp_path):
        with refused(root):
            load(name, root)


@pytest.mark.parametrize("name", [name for name, (_, classes) in datasets.DATASETS.items() if classes])
def test_model_py_knows_the_classes_of_every_data_set(name, run):
    code, text, err = run(model, "--backbone", "vit_tiny", "--imgsz", 28, 28, "--dataset", name)
    assert code == 0 and f"-> logits (1, {len(datasets.DATASETS[name][1])}, 28, 28) float32" in text, err
