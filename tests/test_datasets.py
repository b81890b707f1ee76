"""Data sets are found where users have them; batches depend on seed and epoch alone."""

import dataclasses
import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blocks, load, real_data, refused, write_folder, write_pair, write_tree
from PIL import Image

import datasets
import model
from config import IGNORE
from dataio.classes import ADE20K, CITYSCAPES, CITYSCAPES_IDS, VOC, plain
from dataio.feature_cache import file_facts
from dataio.dataloader import EpochSampler, SegmentationDataset, collate, make_loader, naming_files
from dataio.image_rule import read_image
from dataio.readers import FINGERPRINT, DataSource, Sample, Target, index_table, may_be_equal, read_mask


def small_dataset(root, count=6, **options):
    """Return a SegmentationDataset over `count` pairs of the size 45 x 61."""
    write_folder(root, count=count)
    samples = [Sample(path, root / "masks" / path.name) for path in sorted((root / "images").iterdir())]
    return SegmentationDataset(samples, index_table(3), (32, 40), **options)


def test_training_and_validation_items(tmp_path):
    """Also of a copy, as spawned workers get it."""
    for augments, mask_size in (((), (32, 40)), (None, (45, 61))):
        dataset = pickle.loads(pickle.dumps(small_dataset(tmp_path, augments=augments)))
        image, targets, name = dataset[0]
        assert image.shape == (3, 32, 40) and targets["mask"].shape == mask_size and name.endswith("00.png")


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
    relabeled = [sample._replace(targets=sample.targets[:1]) for sample in samples]
    first, other = (DataSource("x", [], {"train": split, "val": split}, index_table(3)).fingerprints()
                    for split in (samples, relabeled))
    assert first["data_fingerprint"] != other["data_fingerprint"]
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
    def start(self):
        raise error

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    batches = make_loader(small_dataset(tmp_path, augments=()), 2, 2)
    batches.start(1)
    assert sum(len(names) for *_, names in batches) == 6 and "--workers" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_an_epoch_early_moves_no_random_numbers(tmp_path, workers):
    """Also where batches are read in inference mode and closed outside."""
    batches = make_loader(small_dataset(tmp_path, augments=("flip",)), 2, workers)
    state = torch.get_rng_state()
    with naming_files(batches), torch.inference_mode():
        batches.start(3)
        first = [names for *_, names in batches]
        batches.sampler.set_epoch(3)
        assert first == [names for *_, names in batches] and torch.equal(torch.get_rng_state(), state)
    assert len(first) == len(batches) == 3


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize(("length", "per_epoch"), [(5, 12), (7, 3), (13, 13), (2, 2), (1, 4), (50, 33)])
def test_epochs_of_a_number_of_images_go_on_where_the_last_one_ended(length, per_epoch, processes):
    """Together the epochs are whole passes: after n passes every image was seen n times, in new orders; and
    all processes together take the items of a single one.
    """
    samplers = [EpochSampler(length, 3, rank, processes, per_epoch) for rank in range(processes)]
    alone = EpochSampler(length, 3, per_epoch=per_epoch)
    assert {len(sampler) for sampler in samplers} == {-(-per_epoch // processes)}
    items = []
    for epoch in range(length):  # so many images as `per_epoch` passes
        for sampler in (alone, *samplers):
            sampler.set_epoch(epoch)
        lists = [list(sampler) for sampler in samplers]
        together = [item for group in zip(*lists, strict=True) for item in group]
        assert together[:per_epoch] == list(alone) and set(together) == set(alone)
        items += together[:per_epoch]
        samplers[0].set_epoch(epoch, skip=1)
        assert list(samplers[0]) == lists[0][1:]
    assert sorted(item % length for item in items) == sorted(list(range(length)) * per_epoch)
    passes = [item // length for item in items]
    assert passes == sorted(passes) and (length < 5 or items != sorted(items))
    single = EpochSampler(length, 3)
    single.set_epoch(1)
    order = list(single)  # of a pass is that of an epoch
    assert items[length:2 * length] == order[:len(items) - length]


# --- finding data sets ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "folder"), [
    ("voc", "VOCdevkit/VOC2012"), ("voc", "VOC2012"), ("voc", "."), ("voc", "voc/VOCdevkit/VOC2012"),
    ("pet", "oxford-iiit-pet"), ("cityscapes", "Cityscapes"),
])
def test_data_sets_are_found_in_every_tree_users_have(tmp_path, name, folder):
    write_tree(name, tmp_path / folder)
    assert load(name, tmp_path).counts == {"train": 4, "val": 2}


@pytest.mark.parametrize(("name", "line"), [
    ("trainaug", "2008_000001"),
    ("train_aug", "/JPEGImages/2008_000001.jpg /SegmentationClassAug/2008_000001.png"),
])
def test_the_extra_annotations_of_voc(tmp_path, name, line):
    """More training images with masks of their own; a validation image in the list does not train, though
    its mask there is another file.
    """
    write_tree("voc", tmp_path)
    with refused("ImageSets/Segmentation/trainaug.txt", tmp_path):
        load("voc-aug", tmp_path)
    val = (tmp_path / "ImageSets/Segmentation/val.txt").read_text().split()[0]
    (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text(f"{line}\n{val}\n")
    with refused("SegmentationClassAug", tmp_path):
        load("voc-aug", tmp_path)
    for stem in ("2008_000001", val):
        write_pair(tmp_path / f"JPEGImages/{stem}.jpg", tmp_path / f"SegmentationClassAug/{stem}.png",
                   blocks(45, 61, (0, 7)))
    source = load("voc-aug", tmp_path)
    assert [sample.mask.parent.name for sample in source.splits["train"]] == ["SegmentationClassAug"]
    assert {sample.mask.parent.name for sample in source.splits["val"]} == {"SegmentationClass"}
    assert source.name == "voc-aug" and len(source.notes) == 1


def test_voc_download_goes_through_torchvision(tmp_path, monkeypatch):
    """A tar as VOC's own, served from disk: torchvision checks, unpacks, and the tree is found."""
    import torchvision.datasets.voc as voc_module

    write_tree("voc", tmp_path / "made/VOCdevkit/VOC2012")
    tar = tmp_path / "root" / datasets.VOC_TAR
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        file.add(tmp_path / "made/VOCdevkit", "VOCdevkit")
    year = voc_module.DATASET_YEAR_DICT["2012"] | {"md5": hashlib.md5(tar.read_bytes()).hexdigest()}
    monkeypatch.setitem(voc_module.DATASET_YEAR_DICT, "2012", year)
    assert load("voc", tar.parent).counts == {"train": 4, "val": 2}


def test_what_is_missing_or_in_the_way_is_named(tmp_path):
    write_tree("voc", tmp_path)
    (tmp_path / "SegmentationClass/val_000001.png").unlink()
    with refused("SegmentationClass/val_000001.png"):
        load("voc", tmp_path)
    with refused("--data-root", "nowhere"):
        load("folder", tmp_path / "nowhere")
    (tmp_path / "streets").mkdir()
    with refused(tmp_path / "streets", "--data-root"):
        load("streets", tmp_path)


# --- every data set, from trees as they are downloaded ----------------------------------------------------
@pytest.mark.parametrize("name", ["voc", "aeroscapes", "pet", "cityscapes", "ade20k"])
def test_trees_of_every_data_set_are_read_with_their_own_values(name, tmp_path):
    values = write_tree(name, tmp_path)
    source = load(name, tmp_path)
    assert source.classes == datasets.DATASETS[name][1] and source.name == name
    assert source.counts == {"train": 4, "val": 2} and source.table[255] == 255
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
    for split, samples in raw.splits.items():  # training comes first
        for sample in samples:
            trained = sample.mask.with_name(sample.mask.name.replace("labelIds", "labelTrainIds"))
            Image.fromarray(read_mask(sample.mask, raw.table)).save(trained)
        now = load("cityscapes", tmp_path)
        assert ("labelTrainIds" in now.splits["train"][0].mask.name) == (split == "val")
    for split, samples in raw.splits.items():
        for old, new in zip(samples, now.splits[split], strict=True):
            assert (read_mask(old.mask, raw.table) == read_mask(new.mask, now.table)).all()


def test_wrong_values_of_every_data_set_are_named(tmp_path):
    for name, wrong in (("aeroscapes", 12), ("pet", 4), ("cityscapes", 34), ("ade20k", 151), ("pet", 0)):
        root = tmp_path / f"{name}{wrong}"
        write_tree(name, root)
        source = load(name, root)
        path = source.splits["train"][0].mask
        Image.new("L", (8, 8), wrong).save(path)
        with refused(path, wrong, 64):
            read_mask(path, source.table)


def test_resplit_pools_all_images_and_shares_no_image(tmp_path):
    write_tree("voc", tmp_path)
    plain = load("voc", tmp_path)
    again = load("voc", tmp_path, resplit=True, val_fraction=0.5, cache_dir=tmp_path / "cache")
    train, val = (set(again.splits[split]) for split in ("train", "val"))
    assert len(train) == len(val) == 3 and not train & val
    assert train | val == {sample for split in plain.splits.values() for sample in split}
    assert again.fingerprints()["data_fingerprint"] == plain.fingerprints()["data_fingerprint"]
    assert again.fingerprints()["split_fingerprint"] != plain.fingerprints()["split_fingerprint"]
    assert "3 of 6 images" in again.notes[0] and "background" in "".join(again.notes)


def test_a_few_training_images_are_drawn_by_the_seed(tmp_path):
    write_tree("aeroscapes", tmp_path, counts=(9, 3))
    complete, drawn = load("aeroscapes", tmp_path), []
    for seed in range(4):
        few = load("aeroscapes", tmp_path, train_images=5, seed=seed)
        train, unused = few.splits["train"], few.splits["unused"]
        assert len(train) == 5 and sorted([*train, *unused]) == sorted(complete.splits["train"])
        assert few.splits["val"] == complete.splits["val"]
        assert few.fingerprints()["data_fingerprint"] == complete.fingerprints()["data_fingerprint"]
        assert few.splits == load("aeroscapes", tmp_path, train_images=5, seed=seed).splits
        drawn.append(tuple(train))
    assert len(set(drawn)) > 1
    assert load("aeroscapes", tmp_path, train_images=10).splits["train"] == complete.splits["train"]


def test_validation_images_in_the_train_list_do_not_train(tmp_path):
    write_tree("aeroscapes", tmp_path)
    lists = tmp_path / "ImageSets"
    names = (lists / "val.txt").read_text()
    (lists / "trn.txt").write_text((lists / "trn.txt").read_text() + names)
    source = load("aeroscapes", tmp_path)
    assert len(source.splits["train"]) == 4 and not set(source.splits["train"]) & set(source.splits["val"])
    assert len(source.notes) == 1 and "2 training images" in source.notes[0]
    again = load("aeroscapes", tmp_path, resplit=True, cache_dir=tmp_path / "cache")
    assert sum(again.counts.values()) == 6
    (lists / "trn.txt").write_text(names)
    assert load("aeroscapes", tmp_path).splits["train"] == []  # still good to evaluate on


def test_list_files_that_are_not_utf8_or_hold_comments_alone(tmp_path):
    write_tree("pet", tmp_path)
    (tmp_path / "annotations/test.txt").write_text("#Image CLASS-ID\n")
    with refused("test.txt"):
        load("pet", tmp_path)
    (tmp_path / "annotations/test.txt").write_bytes(b"\xff\xfe1")
    with refused("test.txt", "UTF-8"):
        load("pet", tmp_path)


def test_fingerprints_tell_files_splits_and_decoding_apart(tmp_path):
    root, moved = tmp_path / "data", tmp_path / "moved"
    for name in ("s1", "s2"):
        write_pair(root / name / "a.png", root / name / "m/a.png", blocks(8, 8, (0, 1)))

    def fingerprints(root, train="s1", val="s2", classes=2, mask="a.png"):
        """Return (data, split) fingerprints."""
        samples = [Sample(root / name / "a.png", root / name / "m" / mask) for name in (train, val)]
        splits = {"train": samples[:1], "val": samples[1:]}
        return list(DataSource("x", [], splits, index_table(classes)).fingerprints().values())

    data, split = fingerprints(root)
    swapped = fingerprints(root, "s2", "s1")
    assert swapped[0] == data and swapped[1] != split
    decoded = fingerprints(root, classes=3)
    assert decoded[0] != data and decoded[1] == split
    shutil.copytree(root, moved)
    assert fingerprints(moved) == [data, split]
    for name in ("s1", "s2"):
        shutil.copy(moved / name / "m/a.png", moved / name / "m/b.png")
    renamed = fingerprints(moved, mask="b.png")
    assert renamed[0] != data and renamed[1] == split
    write_pair(moved / "s2/a.png", moved / "s2/m/a.png", blocks(30, 30, (0, 1)))
    changed = fingerprints(moved)
    assert changed[0] != data and changed[1] == split


def test_fingerprints_tell_contents_class_names_and_extra_images_apart(tmp_path):
    """Of files that keep their names and sizes."""
    names = [("a", (0, 0, 0)), ("b", (1, 1, 1))]
    paths = [tmp_path / f"{folder}/{name}.bmp" for folder in "im" for name in "12"]
    extra = tmp_path / "more/3.bmp"

    def fingerprints(classes=names, changed=None):
        """Return (data, extra) fingerprints; changed: the file that holds other pixels."""
        for path in (*paths, extra):
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (9, 7), int(path == changed)).save(path)
        samples = [Sample(*pair) for pair in zip(paths[:2], paths[2:], strict=True)]
        splits = {"train": samples[:1], "val": samples[1:]}
        source = DataSource("x", classes, splits, index_table(2), extra=[Sample(extra, paths[2])])
        return [source.fingerprints()[name] for name in ("data_fingerprint", "extra_fingerprint")]

    data, more = fingerprints()
    assert fingerprints() == [data, more]
    swapped = [(name, color) for (name, _), (_, color) in zip(names[::-1], names, strict=True)]
    assert len({data, fingerprints(swapped)[0], *(fingerprints(changed=path)[0] for path in paths)}) == 6
    recolored = fingerprints([(name, (9, 9, 9)) for name, _ in names])
    assert recolored == [data, more]
    changed = fingerprints(changed=extra)
    assert changed[0] == data and changed[1] != more


def test_fingerprints_that_cannot_be_compared_may_be_equal():
    now, other, earlier, other_earlier = FINGERPRINT + "a1", FINGERPRINT + "b2", "a1", "b2"
    for unknown in (None, "", earlier):
        assert may_be_equal(unknown, now) and may_be_equal(now, unknown)
    for one, another in ((now, other), (earlier, other_earlier)):
        assert may_be_equal(one, one) and not may_be_equal(one, another) and not may_be_equal(another, one)


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
        clean = datasets.without_leaks(source)
        assert [sample.image.name for sample in clean.splits["train"]] == ["a.png"] and len(clean.notes) == 1
        assert source.fingerprints() == sources[0].fingerprints()
        assert file_facts([*source.splits["train"], *source.splits["val"]])


def test_a_fingerprint_does_not_depend_on_where_masks_are_drawn(tmp_path, monkeypatch):
    fingerprints = []
    for cache in ("A", "z"):  # before and behind the data in the alphabet
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        samples = []
        for name in ("a", "b"):
            drawn = tmp_path / cache / f"dinoseg/masks/x/{name}.png"
            samples.append(Sample(tmp_path / f"m/{name}.png", drawn))
            write_pair(samples[-1].image, drawn, blocks(8, 8, (0, 1)))
        splits = {"train": samples[:1], "val": samples[1:]}
        fingerprints.append(DataSource("x", [], splits, index_table(2)).fingerprints())
    assert fingerprints[0] == fingerprints[1]


def test_a_data_set_that_cannot_be_right_or_train_is_refused(tmp_path, monkeypatch):
    """Of other splits, classes or ids than it should have; one without a split is helped by --resplit."""
    write_tree("aeroscapes", tmp_path)
    full, classes = datasets.aeroscapes(tmp_path, None, False), datasets.AEROSCAPES
    train, val = full.splits["train"], full.splits["val"]

    def register(classes=classes, **changes):
        source = dataclasses.replace(full, **changes)
        monkeypatch.setitem(datasets.DATASETS, "aeroscapes", (lambda *_: source, classes))

    for changes, name in (
        ({"splits": {"train": train, "valid": val}}, "valid"),
        ({"splits": {"val": val}}, "train"),
        ({"splits": {"train": train, "val": []}}, "--resplit"),
        ({"splits": {"train": train}}, "--resplit"),
        ({"classes": datasets.VOC}, "DATASETS"),
        ({"table": index_table(13)}, 12),
    ):
        register(**changes)
        with refused("aeroscapes", name):
            datasets.check_trainable(load("aeroscapes", tmp_path))
    register(splits={"train": train})  # the advice, followed
    again = load("aeroscapes", tmp_path, cache_dir=tmp_path / "cache", resplit=True)
    datasets.check_trainable(again)
    assert sum(again.counts.values()) == len(train) and all(again.counts.values())


@pytest.mark.parametrize(("name", "gone"), [("aeroscapes", 0), ("pet", 1)])
def test_ignore_background_leaves_out_its_pixels_and_nothing_else(name, gone, tmp_path):
    write_tree(name, tmp_path)
    complete, without = load(name, tmp_path), load(name, tmp_path, ignore_background=True)
    assert without.classes == [c for c in complete.classes if c[0] != "background"]
    for sample in complete.splits["train"]:
        before, after = read_mask(sample.mask, complete.table), read_mask(sample.mask, without.table)
        assert ((after == 255) == ((before == 255) | (before == gone))).all()
        kept = after != 255
        assert (after[kept] == before[kept] - (before[kept] > gone)).all() and kept.any()
    with refused("--ignore-background", "camvid"):
        datasets.without_background(load("camvid", real_data("camvid")))


@pytest.mark.parametrize(("name", "folder", "train", "val", "ids"), [
    ("camvid", "camvid", 367, 101, {*range(11), 255}),
    ("voc", "voc_sample", 3, 1, {0, 9, 12, 255}),
    ("aeroscapes", "aeroscapes_sample", 0, 1, {0, 1, 3, 7, 8, 9, 10, 11}),
    ("pet", "pet_sample", 9, 3, {0, 1, 2}),
    ("cityscapes", "cityscapes_sample", 2, 1, None),
    ("ade20k", "ade20k_sample", 0, 1, None),
])
def test_real_samples_of_every_data_set(name, folder, train, val, ids):
    source = load(name, real_data(folder))
    assert (len(source.splits["train"]), len(source.splits["val"])) == (train, val)
    path = source.splits["val"][0].mask
    mask = read_mask(path, source.table)
    assert ids is None or set(np.unique(mask)) <= ids and len(np.unique(mask)) > 1
    if name == "cityscapes":
        trained = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        assert (mask != np.array(Image.open(trained))).mean() < 0.005  # the sample was shrunk file by file
    if name == "ade20k":
        stored = np.array(Image.open(path)).astype(int)
        assert (mask == np.where(stored == 0, 255, stored - 1)).all()


def test_class_names_of_ade20k_are_those_of_its_list():
    lines = (real_data("ade20k_sample") / "objectInfo150.csv").read_text().splitlines()[1:]
    for line, (name, _) in zip(lines, ADE20K, strict=True):
        synonyms = ";" + line.split(",")[-1].lower() + ";"  # the list has `;` for every space
        assert f";{name.replace(' ', ';')};" in synonyms, (name, line)
    assert ADE20K[130][0] == "screen" and ADE20K[141][0] == "crt screen"


def test_classes_of_cityscapes_and_voc_are_those_of_torchvision():
    """In the order of their ids; the colors of VOC are the bits of these."""
    from torchvision.datasets import Cityscapes
    from torchvision.models.segmentation import FCN_ResNet50_Weights
    classes = sorted((entry for entry in Cityscapes.classes if 0 <= entry.train_id < IGNORE),
                     key=lambda entry: entry.train_id)
    assert [(entry.name, entry.color) for entry in classes] == CITYSCAPES
    assert [entry.id for entry in classes] == CITYSCAPES_IDS
    names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert [plain(name) for name in names] == [name for name, _ in VOC]
    for id, (_, color) in enumerate(VOC):
        assert color == tuple(sum((id >> 3 * bit + part & 1) << 7 - bit for bit in range(3))
                              for part in range(3))


def test_the_test_part_of_camvid_is_scored_where_it_lies_there(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        mask = blocks(20, 30, (0, 5, 11), seed=number)
        write_pair(tmp_path / split / f"{number}.png", tmp_path / f"{split}annot" / f"{number}.png", mask)
    assert [sample.image.stem for sample in load("camvid", tmp_path).splits["test"]] == ["2"]
    (tmp_path / "testannot").rename(tmp_path / "elsewhere")
    assert set(load("camvid", tmp_path).splits) == {"train", "val"}


# --- every registered data set ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", datasets.DATASETS)
def test_registered_classes_are_names_with_colors(name):
    _, classes = datasets.DATASETS[name]
    if classes is not None:
        assert 2 <= len(classes) < datasets.OUTSIDE and len({name for name, _ in classes}) == len(classes)
        assert all(len(color) == 3 and all(0 <= value <= 255 for value in color) for _, color in classes)


ADVICE = {  # what to download, how large it is, and where it goes
    "voc": (datasets.VOC_TAR, "2 GB"), "camvid": ("180 MB", "trainannot"),
    "aeroscapes": ("750 MB", "ImageSets/trn.txt"), "cityscapes": ("11 GB", "gtFine"),
    "ade20k": ("923 MB", "annotations/training"), "pet": ("755 MB", "oxford-iiit-pet"),
}


@pytest.mark.parametrize("name", [name for name in datasets.DATASETS if name != "streets"])
def test_a_data_set_that_is_not_there_is_one_line_with_what_to_download(name, tmp_path, monkeypatch):
    import torchvision.datasets.utils as downloads

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", no_network)
    for root in (tmp_path / "nowhere", tmp_path):
        with refused(root, *(("--data-root", *ADVICE[name]) if name in ADVICE else ())):
            load(name, root)


def test_model_py_knows_the_classes_of_a_data_set(run):
    code, text, err = run(model, "--backbone", "vit_tiny", "--imgsz", 28, 28, "--dataset", "ade20k")
    assert code == 0 and "-> logits (1, 150, 28, 28) float32" in text, err
