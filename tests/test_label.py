"""label.py: nothing painted is lost, what is learned is what was painted, the page does what it says."""
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from conftest import ROOT, free_port, open_browser, refused, tiny, wait_for, write_folder
from PIL import Image
from sklearn.linear_model import LogisticRegression

import dataio.feature_cache as cache
import label
import train
from checkpoint import pack_checkpoint
from config import IGNORE, DataOptions
from dataio.classes import fill_colors
from datasets import load_data
from labeling import learner as learning
from labeling.folder import LARGEST, LabelFolder, Stroke
from labeling.learner import Learner
from models.backbones import Features

CLASSES = ["background", "crack", "patch of tar"]


@pytest.fixture
def photos(tmp_path):
    """A folder of four photos, one of which is damaged."""
    folder = write_folder(tmp_path / "data", count=3) / "images"
    (folder / "damaged.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def folder(tmp_path, photos):
    with LabelFolder(tmp_path / "labels", [photos], CLASSES) as opened:
        yield opened


def dot(label, x, y, radius=2.0):
    return Stroke(label=label, radius=radius, points=[(x, y)])


# --- strokes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("radius", [0.4, 1, 3.5, 12])
def test_a_stroke_covers_what_is_nearer_to_its_line_than_its_radius(radius):
    stroke = Stroke(label=1, radius=radius, points=[(10, 12), (40, 30), (70, 8)])
    y, x = np.mgrid[:45, :90]
    far = np.full((45, 90), np.inf)
    for (ax, ay), (bx, by) in zip(stroke.points, stroke.points[1:], strict=False):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        far = np.minimum(far, np.hypot(x - ax - along * dx, y - ay - along * dy))
    area = stroke.area((45, 90))
    assert area[12, 10] and area[30, 40] and area[8, 70]
    assert area[far <= radius - 1.5].all() and not area[far > radius + 1.5].any()


def test_strokes_may_leave_the_photo():
    area = Stroke(label=0, radius=2, points=[(-1e9, 5), (1e9, 5)]).area((11, 30))
    assert area[5].all() and not area[[0, -1]].any()


# --- the folder -------------------------------------------------------------------------------------------
def test_what_is_painted_and_accepted_is_on_disk_at_once_and_found_again(tmp_path, photos, folder):
    assert folder.names == ["00.png", "01.png", "02.png"] and len(folder.unreadable) == 1
    folder.paint(0, dot(1, 10, 10))
    folder.paint(0, dot(2, 30, 30))
    before = folder.strokes(0)
    folder.paint(0, dot(IGNORE, 10, 10))  # an eraser
    assert {*np.unique(folder.strokes(0)).tolist()} == {2, IGNORE}
    folder.undo(0)
    assert (folder.strokes(0) == before).all()
    pred, confidence = np.zeros((45, 61), np.uint8), np.full((45, 61), 0.5, np.float32)
    confidence[:, :20] = 0.95
    folder.accept(0, pred, confidence, 0.9)
    mask = folder.read("masks", 0)
    painted = before != IGNORE
    assert (mask[painted] == before[painted]).all()
    assert (mask[~painted] == np.where(confidence >= 0.9, 0, IGNORE)[~painted]).all()
    folder.__exit__()
    with LabelFolder(tmp_path / "labels") as again:
        assert [again.state(number) for number in range(3)] == ["accepted", "untouched", "untouched"]
        assert (again.strokes(0) == before).all() and [name for name, _ in again.classes] == CLASSES
        again.undo(0)  # nothing was painted since it was opened
        assert (again.strokes(0) == before).all()
        again.accept(2, pred, confidence, 0.9)
    data = load_data(DataOptions(dataset="folder", data_root=str(tmp_path / "labels")), tmp_path / "cache")
    assert [name for name, _ in data.classes] == CLASSES
    assert sum(map(len, data.splits.values())) == 2  # those that were accepted


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, folder):
    with refused("--out-dir"), LabelFolder(tmp_path / "labels"):
        pass


def test_a_second_label_py_ends_in_a_line(tmp_path, folder):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    command = [sys.executable, "label.py", "--out-dir", tmp_path / "labels", "--device", "cpu", "--port",
               str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--out-dir" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("links", [True, False])
def test_photos_of_one_name_keep_masks_of_their_own(tmp_path, monkeypatch, links):
    """And a photo that comes again is the same photo; where links cannot be made, too."""
    if not links:
        monkeypatch.setattr("labeling.folder.Path.symlink_to", lambda *_: (_ for _ in ()).throw(OSError()))
    for gray, name in enumerate(("a/x.png", "b/x.png", "b/x.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (gray, 0, 0)).save(tmp_path / name)
    for inputs in ("ab", "ab", "b", ""):
        with LabelFolder(tmp_path / "labels", [tmp_path / name for name in inputs], CLASSES) as folder:
            assert len({folder.file("masks", number) for number in range(len(folder))}) == len(folder) == 3


def test_the_masks_of_a_data_set_are_taken_over_and_it_stays_as_it_is(tmp_path):
    """Upright, at the size of the photo; not over what was corrected since."""
    root = write_folder(tmp_path / "data", count=3)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).save(root / "images/tall.jpg", exif=exif)
    upright = np.zeros((60, 40), np.uint8)
    upright[:20, :10] = 2
    Image.fromarray(upright).resize((20, 30), Image.Resampling.NEAREST).save(root / "masks/tall.png")
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    data = load_data(DataOptions(dataset="folder", data_root=str(root)), tmp_path / "cache")
    names = [name for name, _ in data.classes]
    with LabelFolder(tmp_path / "labels", (), names, data) as folder:
        assert [folder.state(number) for number in range(4)] == ["accepted"] * 4
        assert (folder.read("masks", 3) == upright).all() and folder.sizes[3] == (60, 40)
        for number in range(3):
            assert (folder.read("masks", number) == np.array(Image.open(root / f"masks/0{number}.png"))).all()
        folder.paint(3, dot(1, 20, 30))
        corrected = folder.read("masks", 3)
        folder.reopen(2)
        folder.paint(2, dot(1, 5, 5))
    with LabelFolder(tmp_path / "labels", (), names, data) as folder:
        assert (folder.read("masks", 3) == corrected).all() and folder.state(2) == "strokes"
    assert files == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_taken_mask_is_truth_until_it_is_predicted_anew(tmp_path):
    data = load_data(DataOptions(dataset="folder", data_root=str(write_folder(tmp_path / "data", count=2))))
    names = [name for name, _ in data.classes]
    with LabelFolder(tmp_path / "labels", (), names, data) as folder:
        session = label.Session(folder, tiny(head="detail"), (42, 56))
        assert session.known.keys() == {0, 1}
        folder.reopen(0)
        folder.accept(0, np.zeros((45, 61), np.uint8), np.ones((45, 61)), 0.5)
        session.note(0)
        assert session.known.keys() == {1}  # a prediction teaches nothing
        for _ in range(2):
            folder.undo(0)
        session.note(0)
        assert session.known.keys() == {0, 1}


def test_masks_that_are_being_taken_over_as_it_ends_are_taken_next_time(tmp_path, monkeypatch):
    data = load_data(DataOptions(dataset="folder", data_root=str(write_folder(tmp_path / "data", count=3))))
    names, save = [name for name, _ in data.classes], LabelFolder.save

    def interrupted(folder, kind, number, values):
        if number == 1:
            raise KeyboardInterrupt
        save(folder, kind, number, values)

    monkeypatch.setattr(LabelFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt), LabelFolder(tmp_path / "labels", (), names, data):
        pass
    monkeypatch.undo()
    with LabelFolder(tmp_path / "labels", (), names, data) as folder:
        assert all(folder.is_taken(number) and folder.state(number) == "accepted" for number in range(3))


def test_a_data_set_is_not_labeled_in_its_own_folder(tmp_path):
    root = write_folder(tmp_path / "data", count=2)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with refused("--out-dir", "--data-root"), LabelFolder(root, [root / "images"], CLASSES):
        pass
    assert files == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def photo_of(path, gray):
    """Write a photo of one gray; return its folder."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (30, 20), (gray, gray, 0)).save(path)
    return path.parent


def test_what_was_painted_stays_with_its_picture_whatever_has_its_name(tmp_path):
    first = photo_of(tmp_path / "trip1/img.png", 50)
    zeros, sure = np.zeros((20, 30), np.uint8), np.ones((20, 30))
    with LabelFolder(tmp_path / "labels", [first], CLASSES) as folder:
        folder.paint(0, dot(1, 10, 10))
        folder.accept(0, zeros, sure, 0.5)
    first.rename(tmp_path / "moved")
    second = photo_of(tmp_path / "trip2/img.png", 90)
    with LabelFolder(tmp_path / "labels", [second], CLASSES) as folder:  # another one of that name
        assert len(folder) == 1 and folder.state(0) == "untouched" and "img.png" in str(folder.unreadable)
    with LabelFolder(tmp_path / "labels", [tmp_path / "moved"], CLASSES) as folder:  # the first is back
        states = {np.array(Image.open(path))[0, 0, 0]: folder.state(number)
                  for number, path in enumerate(folder.paths)}
        assert states == {50: "accepted", 90: "untouched"}
    photo_of(tmp_path / "moved/img.png", 120)  # another one is put in its place
    with LabelFolder(tmp_path / "labels") as folder:
        assert [folder.state(number) for number in range(len(folder))] == ["untouched"]
        assert not list((tmp_path / "labels/images").glob("*"))
    photo_of(tmp_path / "moved/img.png", 50)
    with LabelFolder(tmp_path / "labels") as folder:
        assert sorted(map(folder.state, range(len(folder)))) == ["accepted", "untouched"]


def test_unsure_is_not_the_second_of_two_classes(tmp_path, photos):
    """Also where no mask holds that one, and with a list of classes that was there before."""
    for name, written in (("new", None), ("old", "background\ncrack\n"), ("colors", "a 0 0 0\nb 9 9 9\n")):
        if written:
            (tmp_path / name).mkdir()
            (tmp_path / name / "classes.txt").write_text(written)
        with LabelFolder(tmp_path / name, [photos], [] if written else ["background", "crack"]) as folder:
            confidence = np.ones((45, 61))
            confidence[:, 20:] = 0
            for number in range(3):
                folder.accept(number, np.zeros((45, 61), np.uint8), confidence, 0.5)
        with LabelFolder(tmp_path / name):
            pass
        data = load_data(DataOptions(dataset="folder", data_root=str(tmp_path / name)))
        assert data.table[[0, 1, 255]].tolist() == [0, 1, IGNORE] and len(data.classes) == 2


@pytest.mark.parametrize("written", ["ignore\nroad\nsky\n", "road = 1\nsky = 2\n", "sky = 1\nroad = 0\n"])
def test_a_class_list_of_other_numbers_is_refused(tmp_path, photos, written):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/classes.txt").write_text(written)
    with refused("classes.txt"), LabelFolder(tmp_path / "labels", [photos]):
        pass


def test_a_map_that_is_damaged_is_listed_and_what_can_be_read_of_it_is_there(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("labeling.folder.LARGEST", 90)
    monkeypatch.setattr("labeling.folder.TILE", 50)
    values = np.random.default_rng(0).integers(1, 255, (3, 100, 100), dtype=np.uint8)
    with rasterio.open(tmp_path / "map.tif", "w", driver="GTiff", dtype="uint8", count=3, height=100,
                       width=100, crs="EPSG:32632", transform=rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)) as file:
        file.write(values)
    content = (tmp_path / "map.tif").read_bytes()
    (tmp_path / "map.tif").write_bytes(content[:len(content) // 2])
    for _ in range(2):
        with LabelFolder(tmp_path / "labels", [tmp_path / "map.tif", photos], CLASSES) as folder:
            assert len(folder) >= 3 and any("map.tif" in why for why in folder.unreadable.values())


def test_a_deep_photo_that_is_cut_off_is_listed_and_left_out(tmp_path):
    (tmp_path / "deep").mkdir()
    values = np.random.default_rng(0).integers(0, 4000, (40, 50)).astype(np.uint16)
    for number in range(3):
        Image.fromarray(values + number).save(tmp_path / f"deep/{number}.tif")
    content = (tmp_path / "deep/1.tif").read_bytes()
    with LabelFolder(tmp_path / "labels", [tmp_path / "deep"], CLASSES) as folder:
        assert len(folder) == 3
    (tmp_path / "deep/1.tif").write_bytes(content[:len(content) // 2])
    for inputs in ([tmp_path / "deep"], []):
        with LabelFolder(tmp_path / "labels", inputs) as folder:
            assert len(folder) == 2 and "1.tif" in str(folder.unreadable)


def test_bad_classes_and_folders_are_one_line(tmp_path, photos):
    for classes, named in ((["a"], "--classes"), (["a", "a"], "--classes"), ([], "--classes")):
        with refused(named), LabelFolder(tmp_path / "other", [photos], classes):
            pass
    missing = tmp_path / "nothing"
    with refused("--input", missing), LabelFolder(tmp_path / "third", [missing], CLASSES):
        pass
    with LabelFolder(tmp_path / "labels", [photos], CLASSES):
        pass
    with refused("--classes"), LabelFolder(tmp_path / "labels", [], ["a", "b"]):
        pass
    if os.geteuid():
        os.chmod(tmp_path / "labels", stat.S_IRUSR | stat.S_IXUSR)
        with refused("--out-dir"), LabelFolder(tmp_path / "labels"):
            pass


def test_a_full_disk_loses_nothing(folder, monkeypatch):
    folder.paint(0, dot(1, 10, 10))
    before = folder.strokes(0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.paint(0, dot(2, 30, 30))
    monkeypatch.undo()
    assert (folder.strokes(0) == before).all()


def test_a_map_becomes_tiles_that_lie_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("labeling.folder.LARGEST", 90)
    monkeypatch.setattr("labeling.folder.TILE", 40)
    values = np.random.default_rng(0).integers(1, 255, (3, 70, 100), dtype=np.uint8)
    place = dict(crs="EPSG:32632", transform=rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5e6))
    with rasterio.open(tmp_path / "map.tif", "w", driver="GTiff", dtype="uint8", count=3, height=70,
                       width=100, **place) as file:
        file.write(values)
    assert LARGEST > 1000
    with LabelFolder(tmp_path / "labels", [tmp_path / "map.tif"], CLASSES) as folder:
        assert len(folder) == 6
        for path in folder.paths:
            top, left = map(int, path.stem.split("_")[-2:])
            with rasterio.open(path) as tile, rasterio.open(tmp_path / "map.tif") as whole:
                assert (tile.read() == values[:, top:top + 40, left:left + 40]).all()
                assert tile.xy(0, 0) == whole.xy(top, left) and tile.res == whole.res


def test_accepting_twice_changes_nothing_and_undo_holds_little(folder):
    folder.paint(0, dot(1, 10, 10))
    zeros, sure = np.zeros((45, 61), np.uint8), np.ones((45, 61), np.float32)
    folder.accept(0, zeros, sure, 0.9)
    folder.paint(0, dot(2, 30, 30))
    corrected = folder.read("masks", 0)
    folder.accept(0, zeros, 0 * sure, 0.9)
    assert (folder.read("masks", 0) == corrected).all()
    for number in range(40):
        folder.paint(0, dot(number % 3, number, 20))
    assert sum(len(content or b"") for before, _ in folder.history[0] for content in before) < 100_000
    for _ in range(40):
        folder.undo(0)
    assert len(np.unique(folder.strokes(0))) > 1  # 30 changes are held


def test_the_folder_may_lie_in_the_photos(photos):
    for _ in range(2):
        with LabelFolder(photos / "labels", [photos], CLASSES) as folder:
            assert folder.names == ["00.png", "01.png", "02.png"]
            folder.paint(0, dot(1, 10, 10))
            folder.accept(1, np.zeros((45, 61), np.uint8), np.ones((45, 61)), 0.5)


def test_photos_that_do_not_fit_the_others_leave_the_folder_as_it_was(tmp_path, photos, folder):
    folder.paint(0, dot(1, 10, 10))
    folder.__exit__()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((45, 61), 4000, np.uint16)).save(deep)
    with refused("deep.png"), LabelFolder(tmp_path / "labels", [deep]):
        pass
    with LabelFolder(tmp_path / "labels") as again:
        assert again.names == ["00.png", "01.png", "02.png"] and again.state(0) == "strokes"


def test_photos_that_go_change_and_come_back(tmp_path, photos, folder):
    """Those that are left still are a data set."""
    for number in range(3):
        folder.accept(number, np.full((45, 61), number % 2, np.uint8), np.ones((45, 61)), 0.5)
    folder.paint(2, dot(1, 10, 10))
    folder.__exit__()
    (photos / "00.png").rename(tmp_path / "elsewhere.png")
    contents = (photos / "02.png").read_bytes()
    Image.new("RGB", (30, 20)).save(photos / "02.png")
    with LabelFolder(tmp_path / "labels") as fewer:
        assert fewer.names == ["01.png"] and fewer.state(0) == "accepted"
        assert {"00.png", "02.png"} <= {word for why in fewer.unreadable.values() for word in why.split()}
        for kind in ("images", "masks"):
            assert [path.name for path in (tmp_path / "labels" / kind).iterdir()] == ["01.png"]
    (tmp_path / "elsewhere.png").rename(photos / "00.png")
    (photos / "02.png").write_bytes(contents)
    with LabelFolder(tmp_path / "labels") as again:
        assert [again.state(number) for number in range(3)] == ["accepted"] * 3
        assert again.read("masks", 2)[10, 10] == 1
    Image.new("RGB", (30, 20)).save(photos / "02.png")
    (tmp_path / "labels/strokes/02.png.png").unlink()
    for _ in range(3):  # its mask is set aside, and does not come back to another picture
        with LabelFolder(tmp_path / "labels") as folder:
            states = {name: folder.state(number) for number, name in enumerate(folder.names)}
    assert states["02.png"] == "untouched"


def test_classes_that_were_changed_are_refused_and_more_are_taken(tmp_path, folder):
    path = tmp_path / "labels/classes.txt"
    lines = path.read_text().splitlines()
    folder.__exit__()
    for changed in ([lines[1], lines[0], lines[2]], lines[:2]):
        path.write_text("\n".join(changed))
        with refused("classes.txt"), LabelFolder(tmp_path / "labels"):
            pass
    path.write_text("\n".join([*lines, "pothole 1 2 3"]))
    with LabelFolder(tmp_path / "labels") as more:
        assert [name for name, _ in more.classes] == [*CLASSES, "pothole"]


@pytest.mark.parametrize("name", ["x" * 245 + ".png", "a b#?%\u00e9.png", os.fsdecode(b"caf\xe9.png")],
                         ids=ascii)
def test_photos_may_have_any_name(tmp_path, name):
    source = tmp_path / "photos"
    source.mkdir()
    Image.new("RGB", (30, 20)).save(source / "plain.png")
    try:
        os.rename(source / "plain.png", source / name)
    except OSError:
        pytest.skip("no such name on this file system")
    with LabelFolder(tmp_path / "labels", [source], CLASSES) as folder:
        folder.paint(0, dot(1, 10, 10))
        folder.accept(0, np.zeros((20, 30), np.uint8), np.ones((20, 30)), 0.5)
        json.dumps(label.Session(folder, tiny(head="detail"), (42, 56)).state()).encode()


def test_files_beside_a_tiff_come_with_it_and_maps_of_one_name_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr("labeling.folder.LARGEST", 90)
    monkeypatch.setattr("labeling.folder.TILE", 60)
    profile = dict(driver="GTiff", dtype="uint8", count=3, crs="EPSG:32632")
    for name, size in (("a/map.tif", (60, 100)), ("b/map.tif", (60, 100)), ("a/small.tif", (20, 30))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(
                tmp_path / name, "w", height=size[0], width=size[1], **profile,
                transform=rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5e6)) as file:
            file.write(np.full((3, *size), 99, np.uint8))
            if size == (20, 30):
                file.write_mask(np.arange(30)[None].repeat(20, 0) < 10)
    assert (tmp_path / "a/small.tif.msk").exists()
    for _ in range(2):
        with LabelFolder(tmp_path / "labels", [tmp_path / "a", tmp_path / "b"], CLASSES) as folder:
            assert len(folder) == 5
            small = next(path for path in folder.paths if path.name == "small.tif")
            assert folder.rule.read(small).valid.sum() == 200


def test_wrong_flags_are_one_line_and_make_nothing(tmp_path, photos, run, monkeypatch):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    for name, head in (("bn.pth", "bn"), ("detail.pth", "detail")):
        classes = [("sky", (0, 0, 9)), ("tar", (9, 0, 0)), ("crack", (0, 9, 0))]
        torch.save(pack_checkpoint(tiny(head=head).eval(), classes, (42, 56)), tmp_path / name)
    small = ("--backbone", "vit_tiny", "--weights", "none", "--device", "cpu", "--port", free_port())
    new = ("--input", photos, "--classes", *CLASSES)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [((), "--classes"), (("--data-root", tmp_path / "nowhere"), "nowhere"),
                 ((*new, "--model", tmp_path / "bn.pth"), "bn.pth"),
                 ((*new, "--model", tmp_path / "detail.pth"), "detail.pth"),
                 ((*new, "--model", tmp_path / "gone.pth"), "gone.pth"),
                 ((*new, "--port", taken.getsockname()[1]), "--port"), ((*new, "--imgsz", 0, 5), "--imgsz")]
        for number, (flags, named) in enumerate(cases):
            out = tmp_path / f"out{number}"
            code, _, err = run(label, *small, *flags, "--out-dir", out)
            lines = [line for line in err.splitlines() if not line.startswith(("left out", "usage", "  "))]
            assert code == 2 and named in lines[-1] and len(lines) == 1, err
            assert not list(out.glob("strokes/*")) and not list(out.glob("masks/*"))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run(label, *small, *new)
    assert code == 2 and "pip install" in err and err.count("\n") == 1


# --- what is learned --------------------------------------------------------------------------------------
SIZE = 56, 70


@pytest.fixture
def learner():
    """A Learner of three classes on random features, which differ by thirds of the photos."""
    net = tiny(head="detail")
    geometry = net.geometry(SIZE)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, sum(net.backbone.channels), generator=generator)

    def features(number):
        maps = torch.empty(1, len(kinds[0]), 4, 5)
        for column in range(5):
            maps[..., column] = kinds[(column * 3 // 5 + number) % 3][None, :, None]
        maps += 0.3 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(number))
        image = torch.full((1, 3, *SIZE), 100, dtype=torch.uint8)
        return Features(list(maps.split(net.backbone.channels, 1)), {}, image, geometry)

    return Learner(net, SIZE, features, range(4))


def predict(learner, number):
    """Return the label map (h, w) of a photo."""
    return learner.shares(number).argmax(1)[0]


def strokes_of(*points):
    """Return strokes of single pixels (label, y, x)."""
    drawn = np.full(SIZE, IGNORE, np.uint8)
    for label_, y, x in points:
        drawn[y, x] = label_
    return drawn


def test_a_pixel_of_each_class_labels_other_photos(learner):
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35), (2, 20, 60))})
    for number, order in ((0, (0, 1, 2)), (1, (1, 2, 0)), (3, (0, 1, 2))):
        assert predict(learner, number)[30, [7, 35, 63]].tolist() == list(order)


def test_classes_count_alike_however_much_of_each_is_painted(learner):
    drawn = strokes_of((1, 20, 35), (2, 20, 60))
    drawn[:, :25] = 0
    learner.learn({0: drawn})
    assert predict(learner, 1)[30, [7, 35, 63]].tolist() == [1, 2, 0]


def test_a_second_stroke_on_the_same_array_is_learned(learner):
    drawn = strokes_of((0, 20, 10), (1, 20, 35))
    learner.learn({0: drawn})
    drawn[20, 60] = 2
    learner.learn({0: drawn})
    assert predict(learner, 0)[30, [7, 35, 63]].tolist() == [0, 1, 2]


def test_what_is_no_longer_painted_and_what_never_was_is_not_predicted(learner):
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35)), 1: strokes_of((2, 20, 35))})
    assert (predict(learner, 0) == 2).any()
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35))})
    assert not (predict(learner, 0) == 2).any()


def test_the_backbone_stays_as_it_is_and_the_same_strokes_teach_the_same(learner):
    before = {name: value.clone() for name, value in learner.model.backbone.state_dict().items()}
    learner.learn({2: strokes_of((0, 20, 10), (1, 20, 35))})
    after = learner.model.backbone.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_trained_head_changes_where_it_is_corrected_and_nowhere_else(learner):
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35), (2, 20, 60))})
    trained = Learner(learner.model, SIZE, learner.features, range(4), is_trained=True)
    before = [predict(trained, number) for number in range(4)]
    trained.learn({3: strokes_of((2, 20, 10), (2, 30, 12))})  # of one class alone
    for number, columns in ((0, (7, 35, 63)), (1, (7, 35, 63))):
        after = predict(trained, number)[30, list(columns)].tolist()
        want = before[number][30, list(columns)].tolist()
        assert after == [2 if id == 0 else id for id in want]


def test_strokes_that_are_taken_back_leave_a_trained_head_as_it_was(learner):
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35), (2, 20, 60))})
    trained = Learner(learner.model, SIZE, learner.features, range(4), is_trained=True)
    before = trained.shares(1)
    trained.learn({3: strokes_of((2, 20, 10))})
    assert not torch.equal(trained.shares(1), before)
    trained.learn({})
    assert torch.equal(trained.shares(1), before)


def test_a_photo_is_less_doubtful_where_it_was_painted(learner):
    learner.learn({0: strokes_of((0, 20, 10), (1, 20, 35))})
    doubts = [learner.uncertainty(number) for number in range(4)]
    assert all(0 <= doubt <= 1 for doubt in doubts)
    drawn = np.full(SIZE, IGNORE, np.uint8)
    drawn[::3, ::3] = 0
    drawn[1, 1] = 1
    learner.learn({0: drawn})
    assert learner.uncertainty(0) == 0


def test_what_is_learned_is_the_logistic_regression_of_scikit_learn(learner):
    """Of strokes of one class on each photo, as a robot paints them; classes weigh alike."""
    drawn = {number: np.full(SIZE, IGNORE, np.uint8) for number in range(3)}
    drawn[0][:30, :60], drawn[1][40, 3:60], drawn[2][10:12, 30:33] = 0, 1, 2
    learner.learn(drawn)
    labels, values, lines = (torch.cat([getattr(painted, name) for painted in learner.painted.values()])
                             for name in ("labels", "values", "lines"))
    penalty = learning.PENALTY / 3
    inputs = torch.cat([values, lines * (penalty / learning.LINE_PENALTY) ** 0.5], 1).numpy()
    weights = learning.balanced(labels, 3).numpy()
    theirs = LogisticRegression(C=0.5 / penalty, tol=1e-8, max_iter=10_000)
    want = theirs.fit(inputs, labels.numpy(), weights).predict_proba(inputs)
    layer = learner.linear.conv_seg
    logits = values @ layer.weight[:, :, 0, 0].T + layer.bias + lines @ learner.line_weight.T
    assert np.allclose(logits.softmax(1).detach().numpy(), want, atol=1e-3)


def test_a_line_thinner_than_a_patch_is_found_on_other_photos(learner):
    """Where the features tell nothing: they are the same everywhere, and a pixel of a line is dark."""
    noise = np.random.default_rng(0)
    lines = {0: np.s_[:, 22], 1: np.s_[31, :], 2: np.s_[:, 50]}

    def features(number):
        image = np.full(SIZE, 150.0) + noise.normal(0, 4, SIZE)
        image[lines[number]] -= 40
        image = torch.from_numpy(image.astype(np.uint8))[None, None].repeat(1, 3, 1, 1)
        maps = [torch.zeros(1, channels, 4, 5) for channels in learner.model.backbone.channels]
        return Features(maps, {}, image, learner.model.geometry(SIZE))

    learner = Learner(learner.model, SIZE, features, range(3))
    drawn = strokes_of(*((1, y, 22) for y in range(10, 40)), *((0, y, 40 + y % 5) for y in range(10, 40)))
    learner.learn({0: drawn})
    for number in (1, 2):
        line = np.zeros(SIZE, np.uint8)
        line[lines[number]] = 1
        far = cv2.dilate(line, np.ones((7, 7))) == 0
        found = predict(learner, number).numpy()
        assert set(np.unique(found)) == {0, 1}  # and never the class that was not painted
        assert (found[line > 0] == 1).mean() > 0.9 and (found[far] == 1).mean() < 0.1


def test_lines_are_seen_alike_whichever_way_they_go():
    image = np.random.default_rng(0).integers(0, 255, (33, 33, 3), dtype=np.uint8)
    seen, turned = learning.line_filters(image), learning.line_filters(image.transpose(1, 0, 2))
    assert np.allclose(seen, turned.transpose(1, 0, 2), atol=1e-5)
    flat = learning.line_filters(np.full((33, 21, 3), 7, np.uint8))
    assert flat.shape == (33, 21, 9) and np.abs(flat).max() < 1e-5


def test_the_guided_filter_is_that_of_the_paper(monkeypatch):
    """By a loop over all windows, on a guide of the same size, where both forms of it agree."""
    monkeypatch.setattr(learning, "RADIUS", 2)
    generator = torch.Generator().manual_seed(0)
    guide, shares = torch.rand(1, 3, 9, 11, generator=generator), torch.rand(1, 4, 9, 11, generator=generator)
    shares = (shares + 3) / (shares + 3).sum(1, keepdim=True)  # far from 0, so that nothing is cut off
    padded = [F.pad(values, [2] * 4, mode="replicate")[0].double() for values in (guide, shares)]
    fits = torch.empty(9, 11, 4, 4, dtype=torch.double)  # of a window: 3 slopes and an offset, of 4 classes
    for y in range(9):
        for x in range(11):
            colors, wanted = (values[:, y:y + 5, x:x + 5].flatten(1) for values in padded)
            centered = colors - colors.mean(1, keepdim=True)
            slope = torch.linalg.solve(centered @ centered.T / 25 + learning.SMOOTH * torch.eye(3),
                                       centered @ wanted.T / 25)  # (3, 4)
            fits[y, x] = torch.cat([slope, (wanted.mean(1) - colors.mean(1) @ slope)[None]])
    for y in range(9):
        for x in range(11):
            around = [(min(max(y + dy, 0), 8), min(max(x + dx, 0), 10))
                      for dy in range(-2, 3) for dx in range(-2, 3)]
            fit = torch.stack([fits[place] for place in around]).mean(0)
            want = guide[0, :, y, x].double() @ fit[:3] + fit[3]
            assert torch.allclose(learning.guided(shares, guide)[0, :, y, x].double(), want, atol=1e-4)


def test_what_is_predicted_follows_an_edge_within_a_patch():
    guide = torch.zeros(1, 3, 56, 84)
    guide[..., 40:] = 0.8
    shares = torch.zeros(1, 2, 14, 21)
    shares[:, 1] = torch.linspace(0, 1, 21)  # a soft seam, which the image has at 40
    shares[:, 0] = 1 - shares[:, 1]
    sharp = learning.guided(shares, guide)
    assert torch.allclose(sharp.sum(1), torch.ones(1, 56, 84), atol=1e-5)
    step = sharp[0, 1, 28].diff()
    assert step.argmax() == 39 and step[39] > 5 * 1 / 84


def test_strokes_reach_the_size_of_the_network_however_thin():
    drawn = np.full((700, 900), IGNORE, np.uint8)
    drawn[333, 100:800] = 1
    drawn[10, 10] = 2
    smaller = learning.at_size(drawn, (42, 56))
    assert (smaller[333 * 42 // 700, 7:49] == 1).all() and smaller[0, 0] == 2
    assert set(np.unique(smaller)) == {1, 2, IGNORE}


# --- the page ---------------------------------------------------------------------------------------------
@pytest.fixture
def session(folder):
    torch.manual_seed(0)
    return label.Session(folder, tiny(head="detail"), (42, 56))


@pytest.fixture
def client(session):
    testclient = pytest.importorskip("fastapi.testclient")
    client = testclient.TestClient(label.build_app(session, ["testserver"]), raise_server_exceptions=False)
    client.params = dict(run=session.run)
    return client


def picture_of(answer):
    assert answer.status_code == 200, answer.text
    return np.array(Image.open(io.BytesIO(answer.content)))


def test_a_page_paints_learns_corrects_and_accepts(client, session, folder):
    state = client.get("/state").json()
    assert [photo["state"] for photo in state["photos"]] == ["untouched"] * 3
    assert [entry["name"] for entry in state["classes"]] == CLASSES and len(state["unreadable"]) == 1
    assert "<canvas" in client.get("/").text and picture_of(client.get("/photo/0")).shape == (45, 61, 3)
    assert not picture_of(client.get("/overlay/0"))[..., 3].any()  # nothing was learned
    for id, x in ((0, 5), (1, 50)):
        assert client.post("/paint/0", json=dict(label=id, radius=3, points=[(x, 20), (x, 30)])).is_success
    assert (picture_of(client.get("/painted/0"))[..., 3] > 0).sum() == (folder.strokes(0) != IGNORE).sum()
    shown = picture_of(client.get("/overlay/0"))
    colors = {tuple(color) for color in shown.reshape(-1, 4).tolist()}
    assert colors <= {(*color, 255) for _, color in folder.classes[:2]}
    assert (picture_of(client.get("/overlay/1"))[..., 3] == 255).all()
    while session.compute_something():
        pass
    photos = client.get("/state").json()["photos"]
    assert all(photo["ready"] and 0 <= photo["uncertainty"] <= 1 for photo in photos)
    assert client.post("/accept/0", json=dict(least=0.0)).is_success
    accepted = folder.read("masks", 0)
    assert folder.state(0) == "accepted" and not (accepted == IGNORE).any()
    assert client.post("/fill/1", json=dict(x=3, y=3, label=2)).is_success
    assert folder.strokes(1)[3, 3] == 2
    assert client.post("/undo/1", json={}).is_success
    assert (folder.strokes(1) == IGNORE).all()
    assert client.post("/paint/0", json=dict(label=1, radius=2, points=[(5, 5)])).is_success
    corrected = folder.read("masks", 0)
    assert folder.state(0) == "accepted" and corrected[5, 5] == 1 and (corrected != accepted).sum() < 30
    assert client.post("/reopen/0", json={}).is_success and folder.state(0) == "strokes"
    assert client.post("/undo/0", json={}).is_success and (folder.read("masks", 0) == corrected).all()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_photo_that_breaks_off_is_listed_and_the_others_go_on(tmp_path, photos, broken):
    content = (photos / f"0{broken}.png").read_bytes()
    (photos / f"0{broken}.png").write_bytes(content[:len(content) // 2])
    with LabelFolder(tmp_path / "labels", [photos], CLASSES) as folder:
        torch.manual_seed(0)
        session = label.Session(folder, tiny(head="detail"), (42, 56))
        session.paint(2, dot(1, 20, 20))
        while session.compute_something():
            pass
        state = session.state()
        assert [photo["ready"] for photo in state["photos"]] == [broken != number for number in range(3)]
        assert len(state["unreadable"]) == 2 and f"0{broken}.png" in state["unreadable"][1]


def test_a_page_of_an_earlier_run_is_told_to_reload(client, session, folder):
    session.run = "another"
    answer = client.post("/paint/0", json=dict(label=1, radius=3, points=[(5, 5)]))
    assert answer.status_code == 400 and "reload" in answer.text and folder.state(0) == "untouched"


def test_what_was_predicted_and_accepted_teaches_nothing(client, session):
    for id, x in ((0, 5), (1, 50)):
        client.post("/paint/0", json=dict(label=id, radius=3, points=[(x, 20), (x, 30)]))
    known = session.known[0].copy()
    assert client.post("/accept/0", json=dict(least=0.0)).is_success
    assert client.post("/accept/1", json=dict(least=0.0)).is_success
    assert (session.known[0] == known).all() and 1 not in session.known


def test_an_error_is_a_line_in_the_terminal(client, capfd):
    assert client.post("/accept/0", json=dict(least=0.5)).status_code == 400  # nothing is painted
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err


def test_two_pages_paint_on_one_photo(client, folder):
    """And several at once: nothing is lost."""
    def paint(row):
        client.post("/paint/0", json=dict(label=row % 3, radius=0.5, points=[(2, 3 * row), (50, 3 * row)]))

    threads = [threading.Thread(target=paint, args=(row,)) for row in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.strokes(0)[np.arange(12) * 3, 20].tolist() == [row % 3 for row in range(12)]


@pytest.mark.parametrize(("path", "content"), [
    ("/paint/0", dict(label=3, radius=2, points=[(1, 1)])), ("/paint/0", dict(label=1, radius=2, points=[])),
    ("/paint/0", dict(label=1, radius=-2, points=[(1, 1)])),
    ("/paint/9", dict(label=1, radius=2, points=[(1, 1)])),
    ("/paint/0", dict(label=1, radius=2, points=[(float("nan"), 1)])), ("/fill/0", dict(x=900, y=0, label=0)),
    ("/accept/0", dict(least=2)), ("/accept/0", []), ("/paint/x", {}), ("/nothing", {}),
], ids=str)
def test_what_no_page_sends_is_refused_in_a_line_and_changes_nothing(client, folder, path, content):
    answer = client.post(path, content=json.dumps(content), headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500 and "\n" not in answer.text and "Traceback" not in answer.text
    assert all(folder.state(number) == "untouched" for number in range(3))


def test_a_page_of_another_site_reaches_nothing(client, folder):
    stroke = json.dumps(dict(label=1, radius=2, points=[(1, 1)]))
    assert client.get("/state", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/paint/0", content=stroke, headers={"Content-Type": "text/plain"}).status_code >= 400
    assert folder.state(0) == "untouched"


def test_a_training_takes_the_features_that_the_page_computed(tmp_path, photos, run, monkeypatch):
    flags = ["--backbone", "vit_tiny", "--imgsz", 42, 56]
    weights = tmp_path / "vit.pth"
    torch.save(tiny().backbone.net.state_dict(), weights)
    args = label.parse_args(["--input", str(photos), "--classes", *CLASSES[:2], *map(str, flags), "--weights",
                             str(weights), "--out-dir", str(tmp_path / "labels"), "--device", "cpu"])
    with LabelFolder(args.out_dir, args.input, args.classes) as folder:
        session = label.Session(folder, *label.build_learned_model(args, folder))
        while session.compute_something():
            pass
        for number in range(3):
            folder.save("masks", number, np.arange(45 * 61).reshape(45, 61).astype(np.uint8) % 2)
    passes, forward = [], cache.parts_that_fit

    def counted(model, parts, images, precision, size):
        passes.append(len(images))
        return forward(model, parts, images, precision, size)

    monkeypatch.setattr(cache, "parts_that_fit", counted)
    code, _, err = run(train, "--dataset", "folder", "--data-root", tmp_path / "labels", *flags, "--weights",
                       weights, "--cache-features", tmp_path / "labels/cache", "--epochs", 1, "--workers", 0,
                       "--out-dir", tmp_path / "out")
    assert code == 0, err
    assert sum(passes) == 1  # of the validation image, which is read in another way


@pytest.mark.long
def test_a_browser_paints_learns_corrects_accepts_and_goes_on_after_a_kill(tmp_path, run):
    """With real keys and a real pointer; the folder trains then."""
    pytest.importorskip("uvicorn")
    keys = pytest.importorskip("selenium.webdriver").ActionChains
    photos, port, log = tmp_path / "photos", free_port(), tmp_path / "terminal.txt"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):  # dark on the left, bright on the right
        pixels = generator.integers(0, 60, (60, 90, 3)) + 180 * (np.arange(90) >= 45)[None, :, None]
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number}.png")
    out = tmp_path / "labels"
    command = [sys.executable, ROOT / "label.py", "--input", photos, "--classes", "dark", "bright", "--imgsz",
               "56", "84", "--backbone", "vit_tiny", "--weights", "none", "--device", "cpu", "--out-dir", out,
               "--port", str(port)]

    def serve():
        with open(log, "w") as terminal:
            process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT)
        wait_for(lambda: f"http://127.0.0.1:{port}" in log.read_text() or process.poll())
        assert process.poll() is None, log.read_text()
        return process

    process = serve()
    with open_browser(tmp_path / "profile") as browser:
        def drawn():
            return int(browser.execute_script("return document.body.dataset.drawn") or 0)

        def doing(act):
            """Call act(); return once the page has drawn what comes of it."""
            before = drawn()
            act()
            wait_for(lambda: drawn() > before)

        def stroke(*points, answered=True):
            canvas = browser.find_element("id", "strokes")
            width, height = canvas.rect["width"], canvas.rect["height"]
            at = [(round(width * (x - 0.5)), round(height * (y - 0.5))) for x, y in points]
            chain = keys(browser, duration=20).move_to_element_with_offset(canvas, *at[0]).click_and_hold()
            for point in at[1:]:
                chain = chain.move_to_element_with_offset(canvas, *point)
            chain = chain.release()
            doing(chain.perform) if answered else chain.perform()

        def press(key):
            browser.find_element("tag name", "body").send_keys(key)

        def pixel(layer, x, y):
            """Return the color (R, G, B, alpha) of a layer at a place of the photo, 0 to 1 each."""
            return browser.execute_script(
                "const c = document.getElementById(arguments[0]);"
                "return [...c.getContext('2d').getImageData(arguments[1] * c.width, arguments[2] * c.height,"
                "1, 1).data]", layer, x, y)

        def mask(number, kind="masks"):
            name = f"{number}.png" if kind == "masks" else f"{number}.png.png"
            return np.array(Image.open(out / kind / name))

        browser.get(f"http://127.0.0.1:{port}")
        wait_for(drawn)
        dark, bright = ([*color, 255] for _, color in fill_colors([("dark", None), ("bright", None)]))
        press("1")
        stroke((0.1, 0.2), (0.3, 0.6))
        press("2")
        stroke((0.7, 0.2), (0.9, 0.6))
        strokes = mask(0, "strokes")
        assert strokes[12, 9] == 0 and strokes[36, 81] == 1
        assert pixel("strokes", 0.1, 0.2) == dark and pixel("strokes", 0.9, 0.6) == bright
        assert pixel("overlay", 0.15, 0.8) == dark and pixel("overlay", 0.85, 0.9) == bright
        canvas = browser.find_element("id", "strokes")
        arrow = keys(browser).move_to_element(canvas).click_and_hold().send_keys("\ue014").pause(1).release()
        doing(arrow.perform)  # a stroke that began on a photo that is gone is painted nowhere
        assert not (out / "strokes/1.png.png").exists() and (mask(0, "strokes") == strokes).all()
        doing(lambda: press("n"))
        item = browser.find_element("css selector", "#photos .on").text
        assert "0.png" not in item  # nothing is painted on the other photos
        assert pixel("overlay", 0.15, 0.5) == dark and pixel("overlay", 0.85, 0.5) == bright
        number = int(item.split(".png")[0][-1])
        doing(lambda: press("a"))
        assert mask(number)[30, 10] in (0, IGNORE) and (out / "images" / f"{number}.png").exists()
        press("2")
        stroke((0.1, 0.2), (0.2, 0.2))  # corrects what was accepted
        assert mask(number)[12, 14] == 1 and pixel("overlay", 0.15, 0.2) == bright
        doing(lambda: press("z"))
        assert mask(number)[12, 14] != 1
        os.rename(out / "strokes", out / "gone")
        (out / "strokes").write_text("in the way")  # as a full disk: nothing can be written
        stroke((0.5, 0.5), (0.6, 0.5))
        assert wait_for(lambda: browser.find_element("id", "message").text)
        (out / "strokes").unlink()
        os.rename(out / "gone", out / "strokes")
        process.kill()
        process.wait()
        stroke((0.5, 0.5), (0.6, 0.5), answered=False)
        assert wait_for(lambda: "saved" in browser.find_element("id", "message").text)
        process = serve()
        press("z")
        assert wait_for(lambda: "reload" in browser.find_element("id", "message").text)
        browser.refresh()
        wait_for(drawn)
        assert (mask(0, "strokes") == strokes).all() and pixel("strokes", 0.1, 0.2) == dark
        marks = [item.text[0] for item in browser.find_elements("css selector", "#photos li")]
        assert marks[0] == "\u270e" and marks[number] == "\u2713"
        doing(lambda: press("a"))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0 and "Traceback" not in log.read_text()
    code, _, err = run(train, "--dataset", "folder", "--data-root", out, "--backbone", "vit_tiny",
                       "--weights", "none", "--imgsz", 56, 84, "--epochs", 1,
                       "--out-dir", tmp_path / "trained")
    assert code == 0, err
