"""train.py --shards-per-epoch: an epoch trains on its shards' pairs, in the order of the seed."""
import os
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from attacks import same_run
from conftest import blocks, history_of, load, train_flags
from test_distributed import flags, torchrun
from test_resume import at_step, in_validation, send
from test_shards import write_training_shard

import checkpoint
import evaluate
import train
from config import InputError
from dataio import contents
from dataio.contents import contents_of, digests_in
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.readers import index_table
from dataio.shards import plain_parts, training_folder
from dataio.stream import ShardBatches

NUMBERS = {"train-000.tar": (0, 1), "train-001.tar": (2, 3, 4), "train-002.tar": (5,),
           "train-003.tar": (6, 7), "val-000.tar": (8, 9)}
FLAGS = "--shards-per-epoch", 2, "--epochs", 3, "--steps", 6, "--augment", "crop", "flip", "--amp", "off"


@pytest.fixture
def root(tmp_path):
    """A folder of four shards to train on, and one to validate."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, numbers in NUMBERS.items():
        write_training_shard(folder / name, numbers)
    (folder / "classes.txt").write_text("ground\nroof\npool\n")
    return folder


def batches_of(root, folder, per_epoch=2, workers=0, length=3, seed=0, epochs=9, is_usable=None):
    """Return ShardBatches of two images each, not augmented."""
    def load(epoch, samples, contents):
        dataset = SegmentationDataset(samples, index_table(3), (45, 61), (), seed=epoch)
        return make_loader(dataset, 2, workers, per_epoch=2 * length)

    shards = {path.name: str(path) for path in sorted(root.glob("train*.tar"))}
    return ShardBatches(shards, load, length, per_epoch, epochs, seed, folder, is_usable)


def number_of(name):
    """Return the number of an image, from its file's name."""
    return int(Path(name).stem.split("_")[-1])


# --- what an epoch sees -------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_an_epoch_has_the_pairs_of_its_shards(root, tmp_path, workers):
    batches, seen = batches_of(root, tmp_path / "unpacked", workers=workers), []
    for epoch in range(4):
        batches.start(epoch)
        shards = set()
        for images, targets, names in batches:
            assert len(images) == len(names) == 2
            for mask, name in zip(targets["mask"], names, strict=True):
                assert (mask.numpy() == blocks(45, 61, (0, 1, 2), seed=number_of(name))).all()
                shards.add(Path(name).parent.parent.name)
                assert number_of(name) in NUMBERS[Path(name).parent.parent.name]
        assert len(list((tmp_path / "unpacked").iterdir())) <= 2
        seen.append(sorted(shards))
    batches.close()
    assert not list((tmp_path / "unpacked").iterdir())
    for first, second in (seen[:2], seen[2:]):  # two epochs are a pass
        assert sorted(first + second) == sorted(NUMBERS)[:4]


def test_the_order_is_that_of_the_seed_wherever_it_starts(root, tmp_path):
    def names(seed, first=0, skip=0):
        batches, found = batches_of(root, tmp_path / "unpacked", seed=seed), []
        for epoch in range(first, 4):
            batches.start(epoch, skip if epoch == first else 0)
            found += [[number_of(name) for name in names] for *_, names in batches]
        batches.close()
        return found

    straight = names(seed=3)
    assert names(seed=3) == straight != names(seed=4)
    assert names(seed=3, first=2) == straight[6:] and names(seed=3, first=1, skip=2) == straight[5:]


def test_a_small_shard_is_drawn_from_again(root, tmp_path):
    batches = batches_of(root, tmp_path / "unpacked", per_epoch=1, length=3)
    for epoch in range(4):
        batches.start(epoch)
        numbers = [number_of(name) for *_, names in batches for name in names]
        own = NUMBERS[batches.names(epoch)[0]]
        assert len(numbers) == 6 and all(numbers.count(number) == 6 // len(own) for number in own)
    batches.close()


# --- runs ---------------------------------------------------------------------------------------------------
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(root, tmp_path, run, monkeypatch):
    code, out, err = run(train, *train_flags(root, tmp_path / "straight", *FLAGS))
    assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_step", at_step(3, send(signal.SIGTERM)))  # in the second epoch
        assert run(train, *train_flags(root, tmp_path / "stopped", *FLAGS))[0] == 143
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_batch", in_validation(3, send(signal.SIGINT)))
        assert run(train, "--resume", "--out-dir", tmp_path / "stopped")[0] == 130
    assert run(train, "--resume", "--out-dir", tmp_path / "stopped")[0] == 0
    same_run(tmp_path / "straight", tmp_path / "stopped")
    assert not list((tmp_path / "stopped/cache").rglob("*.jpg"))


def test_what_was_seen_is_known_and_what_validates_is_scored(root, tmp_path, run):
    assert run(train, *train_flags(root, tmp_path / "out", *FLAGS))[0] == 0
    whole, _ = training_folder(root)
    hashes = {contents_of([path]) for path in whole.glob("train/*/images/*")}
    known = digests_in(torch.load(tmp_path / "out/last.pth")["trained_on"])
    assert known == hashes  # two epochs are a pass
    model = "--model", tmp_path / "out/last.pth", "--out-dir", tmp_path / "out"
    code, out, err = run(evaluate, *model)
    scores = history_of(tmp_path / "out")[-1]
    assert code == 0 and f"{scores['val_miou']:.4f}" in out and "warning" not in out, err
    code, _, err = run(evaluate, *model, "--split", "train")
    assert code == 2 and err.count("\n") == 1
    copies = tmp_path / "copies"
    for kind in ("images", "masks"):
        shutil.copytree(next(whole.glob(f"train/train-001.tar/{kind}")), copies / kind)
    code, out, err = run(evaluate, *model, "--dataset", "folder", "--data-root", copies)
    assert code == 0 and "3 of 3 images that are scored were trained on" in out, err


def test_a_list_of_commands_trains_as_the_folder(root, tmp_path, run):
    assert run(train, *train_flags(root, tmp_path / "folder", *FLAGS))[0] == 0
    shards = sorted(root.glob("*.tar"))
    lines = [path if path.stem == "train-001" else f"pipe:cat {path}" for path in shards]
    (tmp_path / "list.txt").write_text("\n".join(map(str, lines)))
    own = train_flags(f"@{tmp_path / 'list.txt'}", tmp_path / "list", *FLAGS)
    code, _, err = run(train, *own, "--classes", "ground", "roof", "pool")
    assert code == 0, err
    for first, second in zip(history_of(tmp_path / "folder"), history_of(tmp_path / "list"), strict=True):
        assert first["train_loss"] == second["train_loss"] and first["val_miou"] == second["val_miou"]


@pytest.mark.long
def test_two_processes_train_as_one_with_the_doubled_batch(root, tmp_path, run):
    more = "--shards-per-epoch", 2, "--steps", 4
    code, _, err = run(train, *flags(root, tmp_path / "one", 4, *more))
    assert code == 0, err
    done = torchrun(2, *flags(root, tmp_path / "two", 2, *more))
    assert done.returncode == 0, done.stderr
    for first, second in zip(history_of(tmp_path / "one"), history_of(tmp_path / "two"), strict=True):
        assert first["val_loss"] == pytest.approx(second["val_loss"], abs=1e-5)
        assert first["val_miou"] == pytest.approx(second["val_miou"], abs=1e-3)
    one, two = (torch.load(tmp_path / name / "last.pth")["trained_on"] for name in ("one", "two"))
    assert one == two


def test_what_lies_in_the_folder_of_unpacked_shards_stays(root, tmp_path):
    kept = tmp_path / "unpacked/my.tar", tmp_path / "unpacked/3.tar"
    (tmp_path / "unpacked/0").mkdir(parents=True)
    for path in kept:
        path.write_text("mine")
    batches = batches_of(root, tmp_path / "unpacked")
    batches.start(0)
    assert len(list(batches)) == 3
    batches.close()
    assert sorted((tmp_path / "unpacked").iterdir()) == sorted(kept)


def test_a_validation_image_in_a_later_shard_is_reported(root, tmp_path, run):
    with tarfile.open(root / "train-003.tar", "w") as tar, tarfile.open(root / "val-000.tar") as val:
        for member in val:
            tar.addfile(member, val.extractfile(member))
    code, out, err = run(train, *train_flags(root, tmp_path / "out", *FLAGS))
    assert code == 0 and "2 of 2 images that are scored were trained on" in out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("waits_for", ["val-000", "train-001"])
def test_the_wait_for_a_command_that_sends_nothing_can_be_stopped(root, tmp_path, run, monkeypatch, waits_for,
                                                                  number):
    """While what is needed for good is unpacked, and later for an epoch; the command ends too."""
    stop, nothing = f"sleep 1; kill -{number.value} {os.getpid()}; sleep 60", f"cat {tmp_path}/nothing"
    commands = {name: f"pipe:cat {root}/{name}.tar" for name in ("train-000", "train-001", "val-000")}
    commands[waits_for] = f"pipe:{stop if waits_for == 'val-000' else 'sleep 60'}; {nothing}/{waits_for}.tar"
    (tmp_path / "list.txt").write_text("\n".join(commands.values()))
    take = ShardBatches.take

    def taken(self, epoch):
        if self.names(epoch) == ["train-001"] == [waits_for]:
            os.kill(os.getpid(), number)
        return take(self, epoch)

    monkeypatch.setattr(ShardBatches, "take", taken)
    own = train_flags(f"@{tmp_path / 'list.txt'}", tmp_path / "out", *FLAGS, "--shards-per-epoch", 1)
    code, _, err = run(train, *own, "--classes", "ground", "roof", "pool")
    assert code == 128 + number and "Traceback" not in err
    if shutil.which("pgrep"):
        assert subprocess.run(["pgrep", "-f", nothing], capture_output=True).stdout == b""


# --- lists and splits ---------------------------------------------------------------------------------------
def test_on_a_list_a_folder_says_the_split_and_other_class_files_do_not_count(root, tmp_path):
    for split, name, shard in (("train", "000", "train-000"), ("val", "000", "val-000"),
                               ("train", "001", "train-001"), ("val", "002", "train-002")):
        path = tmp_path / "data" / split / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"{shard}.tar", path)
    (tmp_path / "data/class_dict.csv").write_text("name,r,g,b\nsky,1,2,3\nsea,4,5,6\n")
    for lines in (sorted, lambda paths: sorted(paths, reverse=True)):
        (tmp_path / "list.txt").write_text("\n".join(map(str, lines((tmp_path / "data").rglob("*.tar")))))
        source = load("folder", f"@{tmp_path / 'list.txt'}", classes=("ground", "roof", "pool"))
        assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 5, "val": 3}
    (tmp_path / "data/val").rename(tmp_path / "data/test")
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted((tmp_path / "data").rglob("*.tar")))))
    source = load("folder", f"@{tmp_path / 'list.txt'}", classes=("ground", "roof", "pool"))
    assert len(source.splits["test"]) == 3


def test_a_path_is_written_in_any_way(root, monkeypatch):
    monkeypatch.chdir(root)
    Path("list.txt").write_text("./train-000.tar\n.//train-001.tar\nval-000.tar\n")
    source = load("folder", "@list.txt")
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 5, "val": 2}


def test_of_data_that_moved_the_first_shard_is_unpacked(root, tmp_path, run):
    assert run(train, *train_flags(root, tmp_path / "out", *FLAGS))[0] == 0
    moved, unpacked = root.rename(tmp_path / "moved"), set((contents.cache_home() / "shards").iterdir())
    code, out, err = run(evaluate, "--model", tmp_path / "out/last.pth", "--data-root", moved, "--out-dir",
                         tmp_path / "out")
    assert code == 0 and f"{history_of(tmp_path / 'out')[-1]['val_miou']:.4f}" in out, err
    assert set((contents.cache_home() / "shards").iterdir()) == unpacked


@pytest.mark.parametrize(("text", "parts"), [
    ("pipe:curl -s https://host/val/000.tar.zst | zstd -d", ["val", "000"]), ("a/b.tar.gz", ["a", "b"]),
    ("pipe:cat 'a/val-1.tar'; true", ["a", "val-1"]), ("data/train-000.TGZ", ["data", "train-000"])])
def test_the_name_of_a_shard_is_that_of_its_file(text, parts):
    assert plain_parts(text) == parts


# --- what is wrong ------------------------------------------------------------------------------------------
def spoil(path, fault):
    """Damage a shard: cut it off, or put a mask of a value that is no class, or no image, into it."""
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:3000])
        return
    with tarfile.open(path) as tar:
        tar.extractall(path.parent / "files", filter="data")
    photo = sorted((path.parent / "files").glob("*.jpg"))[0]
    if fault == "mask":
        Image.fromarray(blocks(45, 61, (0, 1, 9), seed=1)).save(photo.with_suffix(".png"))
    else:
        photo.write_bytes(photo.read_bytes()[:400])
    with tarfile.open(path, "w") as tar:
        for file in sorted((path.parent / "files").iterdir()):
            tar.add(file, file.name)
    shutil.rmtree(path.parent / "files")


@pytest.mark.parametrize("fault", ["cut off", "mask", "photo"])
def test_a_damaged_shard_ends_the_run_saved_or_is_left_out(root, tmp_path, run, fault):
    second_epoch = batches_of(root, tmp_path / "unused").names(1)
    damaged = root / next(name for name in second_epoch if name != "train-000.tar")
    spoil(damaged, fault)
    code, _, err = run(train, *train_flags(root, tmp_path / "out", *FLAGS, "--batch-size", 2))
    assert code == 2 and damaged.name in err.splitlines()[-1] and "Traceback" not in err
    assert len(history_of(tmp_path / "out")) == 1
    code, out, err = run(train, "--resume", "--skip-bad-labels", "--out-dir", tmp_path / "out")
    assert code == 0 and "left out" in out and damaged.name in out, err
    assert len(history_of(tmp_path / "out")) == 3


@pytest.mark.parametrize(("more", "word"), [
    (("--steps", 0), "--steps"), (("--cache-features",), "--cache-features"), (("--fold", "1/2"), "--fold"),
    (("--class-weights", "enet"), "--class-weights"), (("--shards-per-epoch", 5), "4 training shards"),
    (("--train-scale", "native"), "--train-scale"), (("--dataset", "streets"), "--shards-per-epoch")])
def test_what_needs_all_images_is_refused(root, tmp_path, run, more, word):
    code, _, err = run(train, *train_flags(root, tmp_path / "out", *FLAGS, *more))
    assert code == 2 and err.count("\n") == 1 and word in err


def test_what_the_first_shards_do_not_say_is_asked_for(root, tmp_path, run):
    def refusal():
        code, _, err = run(train, *train_flags(root, tmp_path / "out", *FLAGS))
        assert code == 2 and err.count("\n") == 1
        return err

    (root / "classes.txt").rename(tmp_path / "classes.txt")
    assert "classes.txt" in refusal()
    (tmp_path / "classes.txt").rename(root / "classes.txt")
    (root / "val-000.tar").rename(root / "train-004.tar")
    assert "val-000.tar" in refusal()
    with pytest.raises(InputError, match="neither a tar file"):
        (tmp_path / "list.txt").write_text("some.jpg")
        training_folder(f"@{tmp_path / 'list.txt'}")


def test_of_the_shards_the_first_one_is_unpacked_for_good(root):
    whole, shards = training_folder(root)
    first, same = training_folder(root, first_only=True)
    assert shards == same and list(shards) == sorted(NUMBERS)[:4]
    assert len(list(whole.glob("*/*/images/*"))) == 10 and len(list(first.glob("*/*/images/*"))) == 4
