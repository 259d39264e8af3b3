"""Photographs of every kind as (3, H, W) uint8 RGB, and what is said of those that are none."""

import io
import re

import cv2
import numpy as np
import pytest
import torch
import trees
from colour_profiles import ADOBE, GAMMA, SRGB, adobe_profile
from example_scripts import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms

from faceparse.data import DataError, open_dataset
from faceparse.inference import image_io
from faceparse.inference.image_io import (
    PhotographError,
    as_tensor,
    open_image,
    read,
    read_with_profile,
)

COLOUR = (200, 40, 10)


def pixel(image):
    """The first pixel of what becomes of an image."""
    tensor = as_tensor(image)
    assert tensor.dtype == torch.uint8
    assert tuple(tensor.shape) == (3, image.height, image.width)
    return tensor[:, 0, 0].tolist()


@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
@pytest.mark.parametrize(
    ("mode", "off"),
    [(mode, 0) for mode in ("RGB", "RGBA", "RGBa", "RGBX", "CMYK")]
    + [(mode, 3) for mode in ("YCbCr", "HSV", "LAB")],
)
def test_colour_modes_keep_the_colour(mode, off, size):
    image = Image.new("RGB", size, COLOUR)
    image = (image.convert("RGBA") if mode == "RGBa" else image).convert(mode)
    np.testing.assert_allclose(pixel(image), COLOUR, atol=off)


@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("1", 1, 255), ("L", 77, 77), ("F", 0.2, 51), ("LA", (77, 255), 77), ("La", (77, 255), 77)]
    + [(mode, 257 * 77, 77) for mode in ("I", "I;16", "I;16L", "I;16B", "I;16N")]
    + [("I", 70_000, 255), ("I", -5, 0)],
)
def test_grey_modes_keep_the_grey(mode, value, expected, size):
    assert pixel(Image.new(mode, size, value)) == [expected] * 3


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 128), [255, 127, 127]),  # 255 (1 - 128 / 255)
        ("RGBa", (128, 0, 0, 128), [255, 127, 127]),  # holds the products
        ("LA", (0, 51), [204, 204, 204]),
        ("La", (0, 51), [204, 204, 204]),
    ],
)
def test_what_is_transparent_is_white(mode, value, expected):
    assert pixel(Image.new(mode, (2, 2), value)) == expected


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def test_palettes_and_their_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putdata([0, 1])
    blue, red, white = [0, 0, 255], [255, 0, 0], [255, 255, 255]
    for options, expected in (
        ({}, [blue, red]),
        ({"transparency": 0}, [white, red]),
        ({"transparency": b"\xff\x00"}, [blue, white]),
    ):
        assert as_tensor(saved(image, **options))[:, 0].T.tolist() == expected
    assert as_tensor(image.convert("PA"))[:, 0].T.tolist() == [blue, red]


@pytest.mark.parametrize(("mode", "value"), [("L", 7), ("RGB", (1, 2, 3)), ("1", 0)])
def test_the_transparent_colour_of_a_png_is_white(mode, value):
    assert pixel(saved(Image.new(mode, (2, 1), value), transparency=value)) == [255] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_16_bits(channels):
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 4, channels), dtype=np.uint16)
    encoded = cv2.imencode(".png", values)[1].tobytes()  # BGR; Pillow writes grey alone
    found = as_tensor(Image.open(io.BytesIO(encoded))).permute(1, 2, 0).numpy()
    # Pillow reads grey as it is, and of colours the upper byte.
    np.testing.assert_allclose(found, np.broadcast_to(values[..., ::-1] / 257, (5, 4, 3)), atol=1)


def test_cmyk_jpeg():
    image = saved(Image.new("CMYK", (16, 16), (0, 200, 200, 20)), "JPEG", quality=100)
    assert image.mode == "CMYK"
    np.testing.assert_allclose(pixel(image), [235, 51, 51], atol=3)


# How a camera stores an upright picture, by the orientation that it writes down.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.T, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_turned_upright(orientation, kind):
    upright = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).convert("RGB")
    found = as_tensor(saved(stored, kind, exif=exif))
    assert tuple(found.shape) == (3, *upright.shape)
    np.testing.assert_allclose(found[1].numpy(), upright, atol=6)  # lossy, for two


def level(value, dtype):
    """What one value is in 0 .. 255, before it is rounded."""
    if dtype.kind == "f":
        return float(value) * 255
    return int(value) if dtype.itemsize == 1 else int(value) / 257


@st.composite
def arrays(draw):
    """Arrays of every kind that is allowed: types, byte orders, shapes, strides, read-only."""
    dtype = np.dtype(draw(st.sampled_from(["u1", "<u2", ">u2", "f2", "<f4", ">f4", "f8"])))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    shape += draw(st.sampled_from([[], [1], [3]]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    values = rng.random(shape) if dtype.kind == "f" else rng.integers(0, 256**dtype.itemsize, shape)
    array = np.asarray(values, dtype, order=draw(st.sampled_from("CF")))
    array = array[tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape)]
    if len(shape) == 3 and draw(st.booleans()):  # the memory of a tensor, seen as an array
        array = np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0)
    array.flags.writeable = draw(st.booleans())
    return array


@given(arrays())
@pytest.mark.filterwarnings("error")
def test_arrays_of_any_layout(array):
    before = array.copy()
    found = as_tensor(array)
    deep = array if array.ndim == 3 else array[..., None]
    for y, x in np.ndindex(deep.shape[:2]):
        expected = [level(v, array.dtype) for v in deep[y, x]]
        assert found[:, y, x].tolist() == pytest.approx((expected * 3)[:3], abs=0.5001)
    found.fill_(7)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floating_tensors(dtype):
    image = torch.tensor([0.0, 0.25, 1.0], dtype=dtype).view(3, 1, 1).requires_grad_()
    assert as_tensor(image).flatten().tolist() == [0, 64, 255]


def test_integer_tensors():
    image = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    assert torch.equal(as_tensor(image), image.expand(3, 2, 3))
    assert torch.equal(as_tensor((image.int() * 257).to(torch.uint16)), image.expand(3, 2, 3))


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("a.jpg", TypeError, "must be a Pillow image, an array or a tensor, got str"),
        ([[1, 2]], TypeError, "got list"),
        (np.zeros((3, 40, 50), np.uint8), ValueError, "got an array (3, 40, 50); the channels of"),
        (np.zeros((4, 5, 2), np.uint8), ValueError, "(H, W, 4), or a tensor"),
        (np.zeros((1, 4, 5, 3), np.uint8), ValueError, "got an array (1, 4, 5, 3)"),
        (np.zeros(5, np.uint8), ValueError, "got an array (5,)"),
        (torch.zeros(4, 5, 3), ValueError, "got a tensor (4, 5, 3)"),
        (torch.zeros(4, 5), ValueError, "got a tensor (4, 5)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "must have pixels, got 5 x 0"),
        (torch.zeros(3, 2, 0), ValueError, "must have pixels, got 0 x 2"),
        (np.full((2, 2), 1.5), ValueError, "must be in 0 .. 1, got 1.5 .. 1.5"),
        (np.full((2, 2), -0.1), ValueError, "got -0.1 .. -0.1"),
        (np.full((2, 2), np.nan), ValueError, "must be finite, got NaN"),
        (np.zeros((2, 2), int), TypeError, "must be uint8, uint16 or floating, got int64"),
        (np.zeros((2, 2), bool), TypeError, "got bool"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), TypeError, "got int64"),
        (Image.new("F", (2, 2), 200), ValueError, "got 200 .. 200"),
    ],
)
def test_what_is_no_image_is_refused(image, error, words):
    with pytest.raises(error, match=re.escape(words)):
        as_tensor(image)


def refusal(path):
    with pytest.raises(PhotographError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"cannot read {path}: ")
    return line


def test_files_that_cannot_be_read_are_named(tmp_path):
    image = Image.effect_noise((64, 48), 50).convert("RGB")
    for kind in ("jpg", "png", "webp", "tif", "bmp"):
        path = tmp_path / f"cut.{kind}"
        image.save(path)
        assert read(path).shape == (3, 48, 64)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refusal(path)
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    assert "cannot identify image file" in refusal(path)
    path.write_bytes(b"")
    assert "the file is empty" in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.jpg")
    assert "directory" in refusal(tmp_path)


@pytest.fixture
def limit():
    yield image_io.set_limit
    image_io.set_limit(image_io.MAX_MEGAPIXELS)


@pytest.mark.filterwarnings("error")
def test_pixels_beyond_the_limit_are_refused(tmp_path, limit):
    path = tmp_path / "large.png"
    Image.new("RGB", (30, 20)).save(path)
    limit(599e-6)
    assert "must have at most 0.000599 megapixels, got 30 x 20: raise --max-megap" in refusal(path)
    limit(600e-6)
    assert read(path).shape == (3, 20, 30)


def test_the_limit_of_a_data_set_names_no_option_that_train_lacks(tmp_path, limit):
    tree = trees.write_tree("helen", tmp_path)
    limit(0.006)
    words = r"10000_1.jpg: a photograph must .* got 80 x 80: make it and its labels smaller"
    with pytest.raises(DataError, match=words):
        open_dataset("helen", tree, "train")


@pytest.mark.filterwarnings("error")
def test_the_limit_can_be_higher_than_that_of_pillow(tmp_path, limit):
    path = tmp_path / "huge.ppm"
    path.write_bytes(b"P6 20000 10000 255\n")
    assert "at most 120 megapixels, got 20000 x 10000" in refusal(path)
    limit(200)
    with open_image(path) as image:
        assert image.size == (20_000, 10_000)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_the_package_for_heic_is_named(brand, tmp_path, monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    path = tmp_path / "phone.jpg"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(50))
    assert "pip install pillow-heif" in refusal(path)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_matter(tmp_path):
    path = tmp_path / "photo.jpg"
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"):
        Image.new("RGB", (5, 4), COLOUR).save(path, exif=exif)
        assert read(path).shape == (3, 4, 5)


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    path = tmp_path / "moving.gif"
    pictures = [Image.new("RGB", (5, 4), colour) for colour in (COLOUR, "black")]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    assert read(path)[:, 0, 0].tolist() == list(COLOUR)


@pytest.fixture
def programs(monkeypatch):
    """The calls of Ghostscript, which is not started."""
    calls = []

    def pretend(*arguments, **options):
        calls.append(arguments)
        return Image.new("RGB", (80, 80)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", pretend)
    return calls


def write_eps(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\nshowpage\n")


def test_no_photograph_starts_a_program(tmp_path, programs):
    path = tmp_path / "photo.jpg"
    write_eps(path)
    with Image.open(path) as image:
        image.load()
    assert programs  # what Pillow does by itself
    programs.clear()
    assert "must be one of JPEG, PNG" in refusal(path)
    assert not programs


@pytest.mark.parametrize("change", [trees.image, trees.label])
def test_no_file_of_a_data_set_starts_a_program(change, tmp_path, programs):
    tree = trees.write_tree("helen", tmp_path)
    write_eps(change("helen", tree, 1))
    with pytest.raises(DataError, match=r"cannot decode .* must be one of JPEG"):
        open_dataset("helen", tree, "train")
    assert not programs


def test_one_function_opens_all_images():
    modules = [
        path for path in (ROOT / "examples").rglob("*.py") if "Image.open(" in path.read_text()
    ]
    assert [path.name for path in modules] == ["image_io.py"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA"])
def test_the_content_and_not_the_name_tells_the_format(kind, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (5, 4), COLOUR).save(path, kind)
    with open_image(path) as image:
        assert image.format == kind


def save_tiff(path, *pages):
    """A TIFF of several pages, each a size and the tags that it has."""
    pictures = [Image.new("RGB", size, COLOUR) for size, _ in pages]
    for picture, (_, tags) in zip(pictures, pages, strict=True):
        picture.encoderinfo = {"tiffinfo": tags}
    first = pictures[0].encoderinfo["tiffinfo"]
    pictures[0].save(path, "TIFF", save_all=True, append_images=pictures[1:], tiffinfo=first)


THUMBNAIL, MASK, DNG = {254: 1}, {254: 4}, {50706: b"\1\4\0\0"}


@pytest.mark.parametrize(
    ("name", "pages", "words"),
    [
        ("a.tif", [((16, 12), {}), ((16, 12), {})], "a TIFF must hold one picture, got 2"),
        ("a.tif", [((16, 12), THUMBNAIL)], "a camera's RAW file must be converted first"),
        ("a.tif", [((16, 12), DNG)], "a camera's RAW file must be converted first"),
        ("a.nef", [((16, 12), {})], "a camera's RAW file must be converted first"),
        ("a.DNG", [((16, 12), {})], "a camera's RAW file must be converted first"),
    ],
)
def test_no_preview_is_taken_for_the_photograph(name, pages, words, tmp_path):
    save_tiff(tmp_path / name, *pages)
    assert words in refusal(tmp_path / name)


def test_a_raw_file_that_is_no_tiff_is_called_so(tmp_path):
    (tmp_path / "a.raf").write_bytes(b"FUJIFILMCCD-RAW " + bytes(99))
    assert "a camera's RAW file must be converted first" in refusal(tmp_path / "a.raf")


def test_of_a_tiff_with_a_thumbnail_and_a_mask_the_picture_is_read(tmp_path):
    pages = [((4, 3), THUMBNAIL), ((32, 24), {}), ((32, 24), MASK)]
    save_tiff(tmp_path / "a.tif", *pages)
    assert read(tmp_path / "a.tif").shape == (3, 24, 32)


def test_colours_are_brought_to_srgb(tmp_path):
    path = tmp_path / "photo.png"
    values = np.array([[[120, 60, 90], [200, 190, 30], [128, 128, 128]]], np.uint8)
    Image.fromarray(values).save(path, icc_profile=adobe_profile())
    linear = (values / 255) ** GAMMA @ np.transpose(ADOBE) @ np.linalg.inv(SRGB).T
    linear = linear.clip(0, 1)
    expected = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(read(path).permute(1, 2, 0), 255 * expected, atol=1.5)
    own, profile = read_with_profile(path)
    np.testing.assert_array_equal(own.permute(1, 2, 0), values)
    assert profile == adobe_profile()


@pytest.mark.parametrize(
    "profile", [b"damaged", adobe_profile()[:300], ImageCms.createProfile("sRGB")]
)
def test_a_profile_that_changes_nothing_leaves_the_pixels(profile, tmp_path):
    path = tmp_path / "photo.png"
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = profile if isinstance(profile, bytes) else ImageCms.ImageCmsProfile(profile).tobytes()
    Image.fromarray(values).save(path, icc_profile=data)
    np.testing.assert_array_equal(read(path).permute(1, 2, 0), values)


def test_loaders_bring_colours_to_srgb(tmp_path):
    tree = trees.write_tree("lapa", tmp_path)
    photo = Image.new("RGB", (80, 80), (120, 60, 90))
    photo.save(trees.image("lapa", tree, 4), quality=95, icc_profile=adobe_profile())
    found = open_dataset("lapa", tree, "test", limit=1).images[0]
    expected = read(trees.image("lapa", tree, 4))[:, :1, :1]
    assert abs(expected[0].item() - 120) > 5
    np.testing.assert_allclose(found, expected.expand(3, 128, 128), atol=1)
