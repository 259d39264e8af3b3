"""Photographs as people have them, as (3, H, W) uint8 RGB tensors in sRGB."""

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# The formats that are opened, in this order. Others may start a program, as EPS does Ghostscript.
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000", "BMP", "PPM", "HEIF"]
FORMATS += ["TGA"]  # last: it has no signature, so any file may be one
# What a folder is searched for. HEIC without pillow-heif is refused by name, not passed over.
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
SUFFIXES |= {".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
# Cameras' RAW files hold a small preview, which must not be taken for the photograph.
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc"}
RAW_SUFFIXES |= {".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl"}
RAW_SUFFIXES |= {".sr2", ".srf", ".srw", ".x3f"}
RAW = "a camera's RAW file must be converted first, for example to JPEG: only its preview is known"
DNG_VERSION, PAGE_KIND = 50706, 254  # TIFF tags
THUMBNAIL, MASK = 1, 4  # bits of a page's kind
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
MAX_MEGAPIXELS = 120  # of a photograph, unless :func:`set_limit` changes it
MARK = ("Software", "gatedrnn")  # in the PNGs whose names nobody gave, see `is_ours`
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

Image.MAX_IMAGE_PIXELS = None  # `open_image` has the limit
_limit = MAX_MEGAPIXELS * 10**6  # pixels


class PhotographError(ValueError):
    """A photograph that cannot be used; the message is one line and names the file."""


class TooLargeError(ValueError):
    """An image of more pixels than :func:`set_limit` allows."""


class NoFaceError(ValueError):
    """There is no face in a photograph, or none that the detector finds."""


def set_limit(megapixels):
    """Open photographs of this many megapixels at most."""
    global _limit
    _limit = megapixels * 10**6


def open_image(path):
    """The Pillow image in a file, its header read and its pixels not. All files come through here.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: nearly any other, of a file that cannot be used; its words give the reason.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError("it is no file")  # a pipe would be waited for
    Image.init()
    try:
        image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_why_unknown(path)) from None
    try:
        if Path(path).suffix.lower() in RAW_SUFFIXES:
            raise ValueError(RAW)
        if image.format == "TIFF":
            _seek_photograph(image)
        if image.width * image.height > _limit:
            raise TooLargeError(
                f"a photograph must have at most {_limit / 10**6:g} megapixels, got {image.width} "
                f"x {image.height}"
            )
    except BaseException:
        image.close()
        raise
    return image


def _seek_photograph(image):
    """Go to the only page of a TIFF that is no thumbnail and no mask."""
    found = []
    for page in range(image.n_frames):
        try:
            image.seek(page)
        except SyntaxError:  # a sensor's pixels, which Pillow does not know
            raise ValueError(RAW) from None
        if DNG_VERSION in image.tag_v2:
            raise ValueError(RAW)
        if not image.tag_v2.get(PAGE_KIND, 0) & (THUMBNAIL | MASK):
            found.append(page)
    if not found:
        raise ValueError(RAW)
    if len(found) > 1:
        raise ValueError(
            f"a TIFF must hold one picture, got {len(found)}: save the one to use as a file"
        )
    image.seek(found[0])


def mark():
    """What to save a PNG with, as ``pnginfo``, so that a later run may take its place."""
    info = PngInfo()
    info.add_text(*MARK)
    return info


def is_ours(path):
    """Whether a file was saved with :func:`mark`."""
    try:
        with open_image(path) as image:
            return MARK in image.info.items()
    except Exception:  # no picture, or a damaged one
        return False


def _why_unknown(path):
    """What is wrong with a file that is in none of ``FORMATS``."""
    if Path(path).suffix.lower() in RAW_SUFFIXES:
        return RAW
    with open(path, "rb") as file:
        header = file.read(12)
    if not header:
        return "the file is empty"
    if header[4:8] == b"ftyp" and header[8:] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        return "HEIC needs one more package: pip install pillow-heif; or convert it to JPEG"
    return f"cannot identify image file: it must be one of {', '.join(FORMATS)}"


def upright_size(image):
    """The width and height of an opened image after `ImageOps.exif_transpose`."""
    if image.format == "TIFF":  # Pillow gives its upright size, and turns it by itself
        return image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except Exception:  # damaged
        turned = False
    return image.size[::-1] if turned else image.size


def read(path):
    """The photograph in a file, upright, in sRGB: (3, H, W) uint8; of several, the first.

    Raises:
        PhotographError: it cannot be read; gives the reason.
    """
    with _named(path), open_image(path) as image:
        return as_tensor(image)


def read_with_profile(path):
    """The same in its own colours, and their ICC profile (bytes); or in sRGB, and None.

    Raises:
        PhotographError: it cannot be read; gives the reason.
    """
    with _named(path), open_image(path) as image:
        profile = image.info.get("icc_profile")
        if image.mode == "CMYK" or not _transform(profile, "RGB", back=True):
            return as_tensor(image), None
        del image.info["icc_profile"]
        return as_tensor(image), profile


@contextlib.contextmanager
def _named(path):
    """Any error becomes a PhotographError that names the file; warnings are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data
            yield
    except TooLargeError as error:
        raise PhotographError(f"cannot read {path}: {error}: raise --max-megapixels") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise PhotographError(f"cannot read {path}: {words or type(error).__name__}") from None


def as_tensor(image):
    """Any image as a tensor (3, H, W) uint8 RGB, which shares no memory with it.

    Args:
        image: a Pillow image of any mode, turned upright as its EXIF orientation says, and brought
            to sRGB as its colour profile says; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4);
            or a tensor (1, H, W) or (3, H, W). Arrays and tensors are uint8, uint16, or floating
            in 0 .. 1. What is transparent is white.

    Raises:
        TypeError, ValueError: anything else; says what was given.
    """
    if isinstance(image, Image.Image):
        image = _pixels(ImageOps.exif_transpose(image))
    elif isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise _wrong_shape("a tensor", image)
        if image.is_floating_point():
            image = image.float()  # NumPy has no bfloat16
        image = image.detach().cpu().numpy().transpose(1, 2, 0)
    elif not isinstance(image, np.ndarray):
        raise TypeError(
            f"image must be a Pillow image, an array or a tensor, got {type(image).__name__}"
        )
    elif image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,), (4,)):
        raise _wrong_shape("an array", image)
    if image.ndim == 2:
        image = image[..., None]
    if not image.size:
        raise ValueError(f"image must have pixels, got {image.shape[1]} x {image.shape[0]}")
    image = _as_bytes(image)
    if image.shape[2] == 4:
        opaque = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, 2)
    # A copy in any case: PyTorch takes neither negative strides nor memory that is read-only.
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _wrong_shape(what, image):
    shape = tuple(image.shape)
    mistaken = what == "an array" and len(shape) == 3 and shape[0] in (1, 3, 4)
    return ValueError(
        "image must be an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor (1, H, W) "
        f"or (3, H, W), got {what} {shape}" + "; the channels of an array come last" * mistaken
    )


def _pixels(image):
    """The array of a Pillow image, in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits of grey, also where Pillow holds them in 32
        return np.asarray(image).clip(0, 65535).astype(np.uint16)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode == "La":
        image = image.convert("LA")  # the one mode that it can become
    if image.mode in ("LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    image = in_srgb(image, profile)
    return np.asarray(image.convert("RGB") if image.mode == "CMYK" else image)


def in_srgb(image, profile, *, back=False):
    """A Pillow image of mode L, RGB, RGBA or CMYK brought to sRGB from its ICC profile.

    Args:
        profile: bytes or None. Where it cannot be used, the image stays as it is.
        back: from sRGB to the profile instead, for mode RGB.
    """
    transform = _transform(profile, image.mode, back=back)
    return transform.apply(image) if transform else image


def _transform(profile, mode, *, back=False):
    if not profile:
        return None
    try:
        ends = [ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")]
        source, target = reversed(ends) if back else ends
        return ImageCms.buildTransform(source, target, mode, "RGBA" if mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # damaged, or of other colours
        return None


def _as_bytes(image):
    """uint8 of an array in one of the allowed types."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.newbyteorder("=") == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError("a floating image must be finite, got NaN or infinity")
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"a floating image must be in 0 .. 1, got {image.min():g} .. {image.max():g}"
            )
        # At 255, half precision has steps of an eighth.
        single = image.astype(np.result_type(image.dtype, np.float32), copy=False)
        return (single * 255).round().astype(np.uint8)
    raise TypeError(f"image must be uint8, uint16 or floating, got {image.dtype}")
