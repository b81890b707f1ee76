"""TIFFs by windows: what is written lies where the image lay, and is what the same tiles give in memory."""
import json
import signal
import sys

import numpy as np
import pytest
import rasterio
import torch
from conftest import tiny
from PIL import Image

import infer_image
from checkpoint import load_model, pack_checkpoint
from dataio import windows
from dataio.resizing import PADDING_COLOR
from inference.predictor import Predictor, Tiles, choose_protocol
from inference.rasters import save_polygons

CLASSES = [("background", (0, 0, 0)), ("roof", (255, 0, 0)), ("road", (0, 255, 0))]
WHERE = rasterio.transform.from_origin(691_000, 5_335_000, 0.2, 0.2)  # pixels of 20 cm


def write_tiff(path, pixels, nodata=None, crs="EPSG:32632", transform=WHERE, **options):
    """Write (bands, H, W) as a GeoTIFF."""
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, count=count, nodata=nodata, crs=crs,
                       height=height, width=width, transform=transform, **options) as file:
        file.write(pixels)
    return path


def picture(height=130, width=171, seed=0):
    """Return (3, H, W) uint8 of rectangles, none of them 0."""
    rng = np.random.default_rng(seed)
    small = rng.integers(20, 255, (3, height // 16 + 1, width // 16 + 1))
    return small.repeat(16, 1).repeat(16, 2)[:, :height, :width].astype(np.uint8)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model of three classes that predicts all of them."""
    net = tiny().eval()
    torch.nn.init.normal_(net.head.conv_seg.weight, std=0.3)
    image = torch.from_numpy(picture())[None]
    with torch.no_grad():
        net.head.conv_seg.bias -= net(image).mean((0, 2, 3))
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save(pack_checkpoint(net, CLASSES, (56, 56)), path)
    return path


@pytest.fixture
def segment(tmp_path, model_file, run):
    """Return a function that segments files in tiles, and returns the folder of the results and the text."""
    def call(*flags, code=0):
        got, text, err = run(infer_image, "--model", model_file, "--protocol", "tile", "--device", "cpu",
                             "--backend", "torch", "--out-dir", tmp_path, *flags)
        assert got == code, err
        return tmp_path / "inference_results_image", text + err
    return call


def in_memory(model_file, pixels):
    """Return the label map of (3, H, W) by the same tiles."""
    model, facts = load_model(model_file)
    predictor = Predictor(model, facts, "cpu", choose_protocol(facts, kind="tile"))
    return predictor(torch.from_numpy(pixels)[None])[0]


def test_a_geotiff_gives_a_mask_and_polygons_that_lie_where_it_lies(tmp_path, segment, model_file):
    pixels = picture()
    pixels[:, 40:90, 100:] = 0  # no data
    nothing = (pixels == 0).all(0)
    path = write_tiff(tmp_path / "ortho.tif", pixels, nodata=0)
    folder, text = segment("--input", path, "--polygons", "geojson", "--json")
    features = json.loads((folder / "ortho.geojson").read_text())["features"]
    with rasterio.open(path) as source, rasterio.open(folder / "ortho_mask.tif") as file:
        mask = file.read(1)
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert file.nodata == 255 and file.dtypes == ("uint8",) and file.compression.value == "DEFLATE"
        assert file.block_shapes == [(256, 256)]
        assert [file.colormap(1)[id][:3] for id in range(3)] == [color for _, color in CLASSES]
        assert [file.tags()[f"class_{id}"] for id in range(3)] == [name for name, _ in CLASSES]
        shapes = [(rasterio.warp.transform_geom("EPSG:4326", file.crs, feature["geometry"]),
                   feature["properties"]["id"]) for feature in features]
        drawn = rasterio.features.rasterize(shapes, mask.shape, transform=file.transform, fill=0)
    assert ((mask == 255) == nothing).all()
    pixels[:, nothing] = np.array(PADDING_COLOR)[:, None]  # what the network sees there
    assert (mask == in_memory(model_file, pixels))[~nothing].all() and len(np.unique(mask)) == 4
    assert (drawn == mask)[~nothing].mean() > 0.999  # longitude and latitude round
    longitude, latitude = features[0]["geometry"]["coordinates"][0][0]
    assert 11 < longitude < 12 and 48 < latitude < 49  # where EPSG:32632 has these coordinates
    entries = [feature["properties"] for feature in features]
    assert {entry["class"] for entry in entries} == {"roof", "road"}
    (shares,) = json.loads((folder / "shares.json").read_text())
    for id, (name, _) in enumerate(CLASSES):
        share = (mask == id).sum() / (~nothing).sum()
        assert shares["classes"][name]["share"] == pytest.approx(share, abs=1e-5)
        assert f"{name} {100 * share:.1f} %" in text
        area = sum(entry["area"] for entry in entries if entry["id"] == id)
        assert area == pytest.approx(0.04 * (mask == id).sum() if id else 0, rel=1e-4)  # square meters
    assert np.array(Image.open(folder / "ortho_overlay.jpg")).shape == (130, 171, 3)


def test_areas_are_those_of_the_pixels_without_holes(tmp_path):
    ids = np.zeros((40, 50), np.uint8)
    ids[5:35, 5:45], ids[10:20, 10:30], ids[24:30, 12:20] = 1, 2, 255
    centimeter = rasterio.transform.from_origin(691_000.37, 5_335_000.41, 0.01, 0.01)
    path = write_tiff(tmp_path / "mask.tif", ids[None], nodata=255, transform=centimeter)
    save_polygons(path, CLASSES, tmp_path / "mask.geojson", keep=0)
    features = json.loads((tmp_path / "mask.geojson").read_text())["features"]
    entries = [feature["properties"] for feature in features]
    assert {entry["id"]: entry["area"] for entry in entries} == {
        id: pytest.approx(1e-4 * (ids == id).sum()) for id in (1, 2)}


def test_deep_bands_in_another_order_are_scaled_by_what_the_user_says(tmp_path, segment, model_file):
    plain = picture()
    deep = plain.astype(np.uint16) * 13 + 500
    path = write_tiff(tmp_path / "deep.tif", np.concatenate([deep[::-1], deep[:1]]))
    folder, text = segment("--input", path, "--bands", 3, 2, 1, "--value-range", 500, 500 + 255 * 13)
    with rasterio.open(folder / "deep_mask.tif") as file:
        assert (file.read(1) == in_memory(model_file, plain)).all()
        read_as = json.loads(file.tags()["images_read_as"])
    assert read_as["bands"] == [3, 2, 1] and read_as["ranges"] == [[500, 3815]] * 3 and "500..3815" in text
    _, text = segment("--input", path, "--bands", 3, 2, 1)
    assert "warning: " in text and "deep.tif" in text


def test_tiles_without_data_are_not_computed(tmp_path):
    pixels = np.zeros((3, 900, 700), np.uint8)
    pixels[:, 500:560, 300:420] = 99
    computed = []

    def probabilities(crops):
        computed.append(len(crops))
        return torch.full((len(crops), 3, 64, 64), 1 / 3)

    with windows.Raster(write_tiff(tmp_path / "map.tif", pixels, nodata=0)) as raster:
        tiles = Tiles(probabilities, raster, (64, 64), (48, 48), 3)
        rows = sum(probabilities.shape[2] for _, probabilities in tiles.rows())
        assert rows == 900 and 2 <= sum(computed) <= 3 * 5
        assert not raster.valid(slice(0, 100)).any() and raster.valid(slice(500, 560)).sum() == 60 * 120


def test_broken_files_are_skipped_and_flags_that_do_not_fit_refused(tmp_path, segment):
    path = write_tiff(tmp_path / "ortho.tif", picture())
    (tmp_path / "broken.tif").write_bytes(path.read_bytes()[:3000])
    (tmp_path / "none.tif").write_bytes(b"II*\0 no")
    folder, text = segment("--input", tmp_path / "broken.tif", tmp_path / "none.tif", path, code=1)
    assert text.count("skipped: ") == 2 and "broken.tif" in text and "none.tif" in text
    assert {file.name for file in folder.glob("*") if file.suffix == ".tif"} == {"ortho_mask.tif"}
    for flags, named in ((["--bands", 1, 2, 7], "bands 1 2 7"), (["--cutout"], "--cutout"),
                         (["--min-confidence", 0.5], "--min-confidence"),
                         (["--polygons", "coco"], "--polygons"), (["--probabilities", "max"], "--prob")):
        _, text = segment("--input", path, *flags, code=2)
        assert "ortho.tif" in text and named in text


def test_images_without_data_or_smaller_than_a_tile(tmp_path, segment, model_file):
    pixels = picture(57, 40)
    write_tiff(tmp_path / "small.tif", pixels, crs=None)
    write_tiff(tmp_path / "empty.tif", 0 * pixels, nodata=0)
    folder, text = segment("--input", tmp_path / "small.tif", tmp_path / "empty.tif", "--polygons", "geojson")
    assert text.count("small.tif") == text.count("empty.tif") + 1  # that it has no coordinate system
    with rasterio.open(folder / "small_mask.tif") as file:
        assert (file.read(1) == in_memory(model_file, pixels)).all() and file.crs is None
    with rasterio.open(folder / "empty_mask.tif") as file:
        assert (file.read(1) == 255).all()
    assert json.loads((folder / "empty.geojson").read_text())["features"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the size of files")
def test_a_disk_that_is_full_leaves_no_mask(tmp_path, segment):
    import resource
    noise = np.random.default_rng(0).integers(0, 256, (3, 80, 300), np.uint8)
    path = write_tiff(tmp_path / "ortho.tif", noise)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        folder, text = segment("--input", path, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ortho_mask.tif" in text and not list(folder.glob("*mask.tif"))


def test_a_signal_in_the_middle_leaves_no_mask(tmp_path, segment, monkeypatch):
    path, asked = write_tiff(tmp_path / "ortho.tif", picture(190, 60)), []

    def stop(*args):
        asked.append(args)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(infer_image.MaskFile, "write", stop)
    folder, text = segment("--input", path, code=128 + signal.SIGTERM)
    assert "ortho.tif" in text and "0 of 1 image" in text and not list(folder.glob("*ortho*"))
