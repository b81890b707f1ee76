"""Draw images of five bands in which one class shows in the fifth alone: what are --bands and --widen worth?

    python -m tools.bands data/bands
    python check_data.py --data-root data/bands --bands all
    python train.py --dataset folder --data-root data/bands --bands all --show-bands 5 2 1

Street scenes as 16-bit GeoTIFFs: bands 1 to 3 are red, green and blue, 4 is brighter where plants are, and 5
is darker where it is wet, which no other band shows. Writes train/ and val/ with images/ and masks/,
classes.txt, and map.tif, a larger scene to try a model on.
"""
from config import script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__, prog="python -m tools.bands")
    parser.add_argument("folder", metavar="DIR", help="where to write it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

from pathlib import Path

import numpy as np
import rasterio

import utils
from dataio.classes import STREETS
from dataio.labels import save_classes
from dataio.streets import draw_scene
from visualize import save_mask

COUNTS, SIZE, MAP_SIZE = {"train": 48, "val": 16}, (224, 224), (600, 900)
CLASSES = [*STREETS, ("wet", (30, 200, 230))]
PLANTS = [id for id, (name, _) in enumerate(STREETS) if name in ("grass", "tree")]
NORTH_WEST = rasterio.transform.from_origin(691_000, 5_335_000, 0.2, 0.2)  # pixels of 20 cm


def draw(seed, size):
    """Return bands (5, H, W) uint16 and class ids (H, W) uint8 of a scene."""
    picture, mask = draw_scene(seed, size=size)
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size[0], :size[1]]
    wet = np.zeros(size, bool)
    for _ in range(4 * size[0] * size[1] // (224 * 224)):
        y, x, high, wide = (rng.uniform(*ends) for ends in ((0, size[0]), (0, size[1]), (12, 35), (12, 35)))
        wet |= ((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2 < 1
    infrared = 60 + 90 * np.isin(mask, PLANTS)
    moisture = np.where(wet, 70, 120)
    bands = np.stack([*picture.transpose(2, 0, 1), infrared, moisture]).astype(float)
    bands[3:] += rng.normal(0, 15, bands[3:].shape)
    mask = np.where(wet, len(STREETS), mask).astype(np.uint8)
    return (400 + 9 * bands.clip(0, 255)).astype(np.uint16), mask


def write(path, bands):
    """Write (C, H, W) as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", dtype=bands.dtype, count=len(bands),
                       height=bands.shape[1], width=bands.shape[2], crs="EPSG:32632", transform=NORTH_WEST,
                       tiled=True, blockxsize=256, blockysize=256, compress="deflate") as file:
        file.write(bands)


def main():
    """Draw and write all of it."""
    folder, seed = Path(parse_args().folder), 0
    for split, count in COUNTS.items():
        for number in range(count):
            bands, mask = draw(seed, SIZE)
            write(folder / split / f"images/{number:03d}.tif", bands)
            save_mask(mask, CLASSES, folder / split / f"masks/{number:03d}.png")
            seed += 1
    save_classes(CLASSES, folder)
    write(folder / "map.tif", draw(seed, MAP_SIZE)[0])
    counts = " and ".join(f"{count} {split}" for split, count in COUNTS.items())
    print(f"{folder}: {counts} images of five bands, and map.tif")


if __name__ == "__main__":
    utils.run_main(main)
