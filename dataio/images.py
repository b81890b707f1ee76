"""Image files: what their headers say, and their values as they are stored.

    stored = stored_of("scene.tif")                          # its size, type, bands, marks
    values, valid = read_stored("scene.tif", stored, (4, 3, 2))  # (3, H, W) uint16, (H, W) bool or None

Pictures of 8 bit are read by PIL, all others by bands: through GDAL, or as arrays. What is wrong with a file
is an InputError that names it. A new format is one function, entered in READERS.
"""
import math
import os
import struct
import warnings
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB of blocks to keep; GDAL would take 5 % of the memory
os.environ.setdefault("CPL_LOG", os.devnull)  # what it complains of comes as one line

import cv2
import numpy as np
import rasterio
from PIL import Image, TiffImagePlugin
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning

from config import InputError, count_of
from utils import copy_file, in_parallel

COMPANIONS = (".msk", ".aux.xml")  # endings of the files beside a TIFF that say which pixels are data
# PIL can read more, such as EPS, which it has another program draw
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
# of GDAL, which can read files that name others, by the first two bytes
DRIVERS = {b"II": "GTiff", b"MM": "GTiff", b"\x89P": "PNG", b"P5": "PNM", b"P6": "PNM"}
TIFFS = (".tif", ".tiff")
EXIF_ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_COLORS = 256, 257, 258, 262  # tags
TIFF_SAMPLES, TIFF_PLANAR, TIFF_PAGE, TIFF_NODATA = 277, 284, 254, 42113
TIFF_COMPRESSION, TIFF_SIGN = 259, 339  # 2 = integers with a sign
JPEGS = (6, 7)  # TIFF_COMPRESSION of pixels that PIL and GDAL decode to values that differ a little
SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # of a pixel without more bands, by TIFF_COLORS
MOST_PIXELS = 1 << 30  # of an image or mask; PIL alone stops at a sixth of it
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, cv2.error)
TAG_ERRORS = (*DECODE_ERRORS, EOFError, LookupError, TypeError, struct.error)  # of TIFFs
LARGE_STEP, WINDOWS, WINDOW = 16, 4, 64  # above it, so many windows of so many pixels on each side
DAMAGED = "is damaged or not an image: repair or remove it"


# --- files that PIL opens -----------------------------------------------------------------------------------
@contextmanager
def naming_damage(path):
    """Context in which an error while pixels are decoded is an InputError that names the file."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise InputError(f"{path} is damaged ({error}): repair or remove the file") from None


def open_image(path):
    """Open an image file with PIL, header only. Raises InputError where it is missing or not an image."""
    warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # of broken files; an InputError says it
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # errors are enough
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # twice it is an error
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except DECODE_ERRORS as error:
        reason = "not a known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise InputError(f"{path} is not a readable image ({reason}): repair or remove the file") from None
    if image.format == "TIFF":
        with suppress(*TAG_ERRORS), Image.open(path, formats=FORMATS) as pages:
            pages.seek(1)
            if pages.size == image.size:  # smaller ones are previews
                raise InputError(f"{path} holds several pages: save each of them as a file of its own")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS, (8,))
    if tags.get(TIFF_PLANAR) == 2 and len(bits) > 1 and max(bits) > 8:  # PIL would take bytes for pixels
        raise InputError(f"{path} stores one {max(bits)}-bit channel after the other (planar), which is not "
                         "read: save it with interleaved channels")
    return image


def open_picture(path):
    """Return an image opened by PIL where it is an 8-bit picture: gray, color or a palette, of a TIFF without
    further bands or a value for no data. Return None where it has bands. Raises InputError.
    """
    is_tiff = Path(path).suffix.lower() in TIFFS
    try:
        image = open_image(path)
    except InputError:
        if is_tiff and Path(path).is_file():
            return None
        raise
    tags = getattr(image, "tag_v2", {})
    has_bands = TIFF_NODATA in tags or tags.get(TIFF_SAMPLES, 1) > SAMPLES.get(tags.get(TIFF_COLORS), 4)
    has_bands |= 2 in tags.get(TIFF_SIGN, ()) or tags.get(TIFF_COMPRESSION) in JPEGS
    if is_tiff and tags:  # a mask beside it, or in a page of its own
        has_bands |= os.path.exists(f"{path}.msk") or bool(tags.next) and 4 in tiff_tags(path, TIFF_PAGE)
    if has_bands or image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in image.tile):
        image.close()
        return None
    return image


def tiff_tags(path, number):
    """Return a tag of every page of a TIFF, None where it is left out; [] where the file is no TIFF."""
    values = []
    with suppress(*TAG_ERRORS), open(path, "rb") as file:
        start = file.read(4)
        tags = TiffImagePlugin.ImageFileDirectory_v2(start + file.read(12 if b"+" in start else 4))
        seen = {0}  # a damaged file may point in a circle
        while tags.next not in seen:
            seen.add(tags.next)
            file.seek(tags.next)
            tags.load(file)
            values.append(tags.get(number))
    return values


def stored_size(image, exif=None):
    """Return (size (H, W) as stored, EXIF orientation 1..8) of a PIL image that is not decoded yet."""
    orientation = (image.getexif() if exif is None else exif).get(EXIF_ORIENTATION, 1)
    orientation = orientation if orientation in range(1, 9) else 1  # PIL does not turn others
    tags = getattr(image, "tag_v2", None)  # of TIFFs, PIL's own size is the turned one
    return (int(tags[TIFF_HEIGHT]), int(tags[TIFF_WIDTH])) if tags else image.size[::-1], orientation


def to_rgb(image):
    """Return an 8-bit PIL image of any mode as RGB, transparency laid over white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def upright_size(size, orientation):
    """Return the (H, W) of an image that is stored as `size` and turned by its EXIF orientation."""
    return size[::-1] if orientation >= 5 else size  # 5 to 8 turn by 90 degrees


def upright(values, orientation):
    """Turn an array (..., H, W) as an EXIF orientation says."""
    if orientation >= 5:
        values = values.swapaxes(-1, -2)
    if orientation in (2, 3, 6, 7):
        values = values[..., ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[..., ::-1, :]
    return values


def has_late_exif(path):
    """Return whether a PNG may say behind its pixels how it is turned; reads the heads of its chunks."""
    with open(path, "rb") as file:
        file.seek(8)
        behind_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            behind_pixels |= kind == b"IDAT"
            if behind_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def picture_orientation(image, path):
    """Return what stored_size says of an image that is not decoded; PNG may keep EXIF behind the pixels."""
    early = image.format == "PNG" and not has_late_exif(path)
    # of a PNG without EXIF, PIL's own way is to decode all of it and look behind the pixels
    return stored_size(image, Image.Image.getexif(image) if early else None)


# --- what a file says of itself -----------------------------------------------------------------------------
def companions(path):
    """Return the files beside an image that say which of its pixels are data, as GDAL writes them."""
    beside = (Path(f"{path}{ending}") for ending in COMPANIONS)
    return [file for file in beside if Path(path).suffix.lower() in TIFFS and file.is_file()]


def copy_image(path, target):
    """Copy an image file, and those beside it that say which of its pixels are data."""
    for file in (path, *companions(path)):
        copy_file(file, Path(f"{target}{str(file)[len(str(path)):]}"))


class Stored(NamedTuple):
    """What the header of an image file says.

    size: (H, W) as stored; orientation: of EXIF, 1 = upright; dtype: of the values, such as uint16; bands:
    how many there are. colors: the numbers, from 1, of those it calls red, green and blue, () where it does
    not; alpha: the one that it calls transparency, 0 = none; nodata: the value that is no data, or None.
    pages: whether the bands are pages of a TIFF; is_picture: whether open_picture opens it.
    """

    size: tuple
    orientation: int
    dtype: str
    bands: int
    colors: tuple = ()
    alpha: int = 0
    nodata: float | None = None
    pages: bool = False
    is_picture: bool = False

    def __str__(self):
        if self.is_picture:
            return "8-bit picture"
        return f"{self.dtype} of {count_of(self.bands, 'page' if self.pages else 'band')}"


def stored_of(path):
    """Return the Stored of an image file, whose pixels are not decoded. Raises InputError."""
    if reader := READERS.get(Path(path).suffix.lower()):
        values = reader(path)
        return Stored(values.shape[1:], 1, str(values.dtype), len(values))
    image = open_picture(path)
    if image is None:
        with BandFile(path) as file:
            return file.stored
    with image, naming_damage(path):
        size, orientation = picture_orientation(image, path)
    return Stored(size, orientation, "uint8", 3, (1, 2, 3), is_picture=True)


def read_orientation(path):
    """Return (size (H, W) as stored, EXIF orientation 1..8) of an image file. Raises InputError."""
    stored = stored_of(path)
    return stored.size, stored.orientation


def image_size(path):
    """Return the (H, W) of an upright image file; reads its header. Raises InputError."""
    return upright_size(*read_orientation(path))


def largest_first(paths):
    """Return the positions of image files in a list, those of the most pixels first and those that
    cannot be read last; reads their headers.
    """
    sizes = in_parallel(image_size, paths, "image headers")
    pixels = [0 if isinstance(size, InputError) else math.prod(size) for size in sizes]
    return sorted(range(len(paths)), key=lambda position: -pixels[position])


# --- files of bands -----------------------------------------------------------------------------------------
@contextmanager
def named_errors(path, what=DAMAGED):
    """Context in which an error of rasterio is an InputError that names the file and says what is wrong."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # GDAL's are not all of one class
        raise InputError(f"{path} {what} ({' '.join(str(error).split())})") from None


class BandFile:
    """An image file read by bands, all of it or windows: through GDAL, by rasterio. overviews: whether
    smaller versions may be read from those in the file, which are averages. Raises InputError.

    A palette comes as its colors, and inverted gray as it looks; pages of one size are
    bands. Transparency of formats other than TIFF is laid over white and is no band.
    """

    def __init__(self, path, overviews=True):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path} does not exist")
        with open(path, "rb") as file:
            driver = DRIVERS.get(file.read(2))
        if driver is None:
            raise InputError(f"{path} {DAMAGED}")
        warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # such files are usual
        with named_errors(path):
            options = {} if overviews or driver != "GTiff" else dict(OVERVIEW_LEVEL="NONE")
            self.source = rasterio.open(path, driver=driver, **options)
            names = [name for name in self.source.subdatasets if name.startswith("GTIFF_DIR")]
            pages = [rasterio.open(name, driver=driver) for name in names]
            self.pages = [page for page in pages if page.shape == pages[0].shape]  # smaller ones are previews
            self.is_tiff, self.colors = driver == "GTiff", self.source.colorinterp
            self.inverted = self.source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
            self.palette = None
            if self.colors[0] == ColorInterp.palette:
                entries = self.source.colormap(1)
                self.palette = np.array([entries[value][:3] for value in sorted(entries)], np.uint8)

    @cached_property
    def stored(self):
        """The Stored of the file."""
        source, kinds = self.source, self.colors
        if len(set(source.dtypes)) > 1 or np.dtype(source.dtypes[0]).kind not in "iuf":
            raise InputError(f"{self.path} holds {', '.join(sorted(set(source.dtypes)))}, which are not "
                             "bands of one type of real numbers: save it as one type")
        if len(self.pages) > 1 and max(page.count for page in self.pages) > 1:
            raise InputError(f"{self.path} holds several pages: save each of them as a file of its own")
        wanted = ColorInterp.red, ColorInterp.green, ColorInterp.blue
        colors = tuple(kinds.index(color) + 1 for color in wanted if color in kinds)
        alpha = kinds.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in kinds else 0
        count = len(self.pages) if len(self.pages) > 1 else 3 if self.palette is not None else source.count
        if alpha and not self.is_tiff:
            count, alpha = count - 1, 0
        orientation = next(iter(tiff_tags(self.path, EXIF_ORIENTATION)), 1) if self.is_tiff else 1
        if not self.is_tiff:
            with suppress(InputError), open_image(self.path) as image:
                _, orientation = picture_orientation(image, self.path)
        orientation = orientation if orientation in range(1, 9) else 1
        nodata = None if self.palette is not None or not math.isfinite(source.nodata or 0) else source.nodata
        if self.inverted and nodata is not None:
            nodata = np.iinfo(source.dtypes[0]).max - nodata
        return Stored(source.shape, orientation, source.dtypes[0], count, colors if len(colors) == 3 else (),
                      alpha, nodata, len(self.pages) > 1)

    def read(self, bands, window=None, shape=None):
        """Return the bands of these numbers, (C, h, w) of the file's type; window: ((top, bottom), (left,
        right)); shape: (h, w) of a smaller version, of single pixels.
        """
        with named_errors(self.path):
            if len(self.pages) > 1:
                values = np.stack([self.pages[band - 1].read(1, window=window, out_shape=shape)
                                   for band in bands])
            elif self.palette is not None:
                indices = self.source.read(1, window=window, out_shape=shape)
                values = self.palette[indices].transpose(2, 0, 1)[[band - 1 for band in bands]]
            else:
                values = self.source.read(list(bands), window=window,
                                          out_shape=shape and (len(bands), *shape))
            if self.inverted:
                values = np.iinfo(values.dtype).max - values
            if not self.is_tiff and ColorInterp.alpha in self.colors:
                top = np.iinfo(values.dtype).max
                alpha = self.source.read(self.source.count, window=window, out_shape=shape) / top
                values = np.rint(values * alpha + top * (1 - alpha)).astype(values.dtype)
        return values

    @property
    def is_plain(self):
        """Whether GDAL's values are what PIL shows: of whole bytes, and no color model but RGB and gray."""
        bits = self.source.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "8")
        return not int(bits) < 8 and ColorInterp.cyan not in self.colors

    def has_mask(self, alpha):
        """Return whether pixels may be masked, by the band `alpha` or a mask of the file."""
        flags = self.source.mask_flag_enums[0]
        has_index = self.palette is not None and MaskFlags.nodata in flags  # of a color that is no data
        return bool(alpha) or has_index or MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags

    def valid(self, alpha, window=None, shape=None):
        """Return (h, w) bool: which pixels are not masked, None where none can be; arguments as of read."""
        if not self.has_mask(alpha):
            return None
        with named_errors(self.path):
            if alpha:
                return self.source.read(alpha, window=window, out_shape=shape) > 0
            return self.source.read_masks(1, window=window, out_shape=shape) > 0

    def close(self):
        """Close the file."""
        for file in (*self.pages, self.source):
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def load_array(path, **options):
    """Return the array of a NumPy file; options: of numpy.load. Raises InputError."""
    try:
        return np.load(path, allow_pickle=False, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # of a damaged header: it can be any
        raise InputError(f"{path} is not a readable array ({error}): save it again with numpy.save") from None


def read_npy(path):
    """Read a NumPy file as (C, H, W), memory-mapped; (H, W, C) is turned. Raises InputError."""
    return bands_first(path, load_array(path, mmap_mode="r"))


def read_npz(path):
    """Read the one array of an .npz file as (C, H, W). Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise InputError(f"{path} holds the arrays {', '.join(arrays.files)}: save the image alone")
            values = arrays[arrays.files[0]]
    except InputError:
        raise
    except Exception as error:  # of a damaged archive: it can be any
        raise InputError(f"{path} is not a readable archive of arrays ({error}): save it again with "
                         "numpy.savez") from None
    return bands_first(path, values)


def bands_first(path, values):
    """Return an array as (C, H, W): of the first and the last axis, the bands are the shorter one. Raises
    InputError.
    """
    shape = values.shape
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and shape[2] < min(shape[:2]) and shape[0] != shape[2]:
        values = np.moveaxis(values, 2, 0)
    elif values.ndim != 3 or shape[0] >= min(shape[1:]):
        raise InputError(f"{path} is an array of the shape {shape}, which does not tell its bands: save (C, "
                         "H, W) or (H, W, C) with fewer bands than rows and columns")
    if values.dtype.kind not in "iuf" or values.dtype.itemsize > 8 or not values.size:
        raise InputError(f"{path} holds {values.dtype}, and images are integers or floats: save it as these")
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


# A new format is one function f(path) -> (C, H, W) of any integers or floats, and one line here.
READERS = {
    ".npy": read_npy,
    ".npz": read_npz,
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", *TIFFS, ".webp", ".gif", *READERS)


def read_stored(path, stored, bands, alpha=0, step=1):
    """Return (bands (C, h, w) of an image file in its own type, valid (h, w) bool or None), not turned.

    step: take every so manieth pixel of rows and columns; of much larger files, small windows all over it.
    Raises InputError.
    """
    picked = [band - 1 for band in bands]
    if reader := READERS.get(Path(path).suffix.lower()):
        return np.ascontiguousarray(reader(path)[picked, ::step, ::step]), None
    if stored.is_picture:
        with open_picture(path) as image, naming_damage(path):
            pixels = np.array(to_rgb(image))[::step, ::step]  # (h, w, 3)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[picked]), None
    if step == 1:
        check_size(path, stored, len(bands), "; a TIFF is read by windows with --protocol tile of "
                   "infer_image.py and --train-scale native")
    with BandFile(path, overviews=False) as file:
        if step <= LARGE_STEP:
            shape = None if step == 1 else tuple(-(-side // step) for side in stored.size)
            return file.read(bands, shape=shape), file.valid(alpha, shape=shape)
        grid = windows_of(stored.size)
        values = np.block([[file.read(bands, window) for window in row] for row in grid])
        masks = [[file.valid(alpha, window) for window in row] for row in grid]
        return values, np.block(masks) if file.has_mask(alpha) else None


def check_size(path, stored, count, advice=": cut it into tiles"):
    """Raise InputError where so many bands of an image file are more than is read at once; advice: its end.
    """
    pixels = math.prod(stored.size)
    if pixels > MOST_PIXELS or pixels * count * np.dtype(stored.dtype).itemsize > 4 * MOST_PIXELS:
        raise InputError(f"{path} has more than {MOST_PIXELS} pixels, or 4 bytes for each of so many, which "
                         f"are not read at once{advice}")


def windows_of(size):
    """Return WINDOWS rows of as many windows ((top, bottom), (left, right)) spread over an image (H, W)."""
    rows, columns = ([(start, min(start + WINDOW, side)) for start in
                      np.linspace(0, max(0, side - WINDOW), WINDOWS).astype(int).tolist()] for side in size)
    return [[(row, column) for column in columns] for row in rows]


def no_data(values, nodata):
    """Return which numbers of an array are no data (not finite, or `nodata`), bool of its shape; None = none.
    """
    empty = ~np.isfinite(values) if values.dtype.kind == "f" else None
    if nodata is not None and (empty is not None or is_integer_of(nodata, values.dtype)):
        is_value = values == values.dtype.type(nodata)
        empty = is_value if empty is None else empty | is_value
    return empty if empty is not None and empty.any() else None


def is_integer_of(number, dtype):
    """Return whether an integer type has a number."""
    return number == int(number) and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max
