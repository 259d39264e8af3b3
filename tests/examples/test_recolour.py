"""Another colour for a part of an image: what stays, what changes and how; the command."""

import io
import itertools
import os
import sys

import children
import numpy as np
import pytest
import recolour
import small_parser
import torch
from colour_profiles import adobe_profile
from example_scripts import EXAMPLE, call, refused
from PIL import Image, ImageCms

from faceparse import cli
from faceparse.inference import image_io, recolouring
from faceparse.inference.face_parser import FaceParser

WINE, BLOND, BLACK, WHITE = (139, 34, 82), (232, 201, 138), (0, 0, 0), (255, 255, 255)
COLOURS = [WINE, BLOND, BLACK, WHITE, (0, 0, 255), (128, 128, 128)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    small_parser.save_parser(folder)
    return folder


@pytest.fixture(autouse=True)
def placed_points(monkeypatch):
    monkeypatch.setattr(FaceParser, "find_points", small_parser.place_points)


@pytest.fixture
def photo(tmp_path):
    return small_parser.save_photo(tmp_path / "photo.png")


def noise(*shape, seed=0):
    return torch.randint(
        0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def strands(level, height=40, width=60):
    """Grey hair: light and dark columns about a level."""
    columns = level + 25 * torch.sin(torch.arange(width) / 3)
    return columns.round().to(torch.uint8).expand(3, height, width).contiguous()


def mean(image):
    return image.double().mean((1, 2))


def distance(image, colour):
    return (mean(image) - torch.tensor(colour)).norm().item()


def brightness(image):
    """Luma, (H, W)."""
    return (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * image).sum(0)


@pytest.mark.parametrize("colour", COLOURS)
def test_strength_zero_is_the_image(colour):
    image = noise(31, 17)
    assert torch.equal(recolouring.recolour(image, torch.rand(31, 17), colour, 0.0), image)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("colour", COLOURS)
def test_nothing_changes_outside_of_the_mask(colour, strength):
    image, mask = noise(64, 48), torch.zeros(64, 48)
    mask[10:50, 5:40] = torch.rand(40, 35, generator=torch.Generator().manual_seed(1))
    result = recolouring.recolour(image, mask, colour, strength)
    assert torch.equal(result[:, mask == 0], image[:, mask == 0])
    assert not torch.equal(result, image)


def test_an_empty_mask_is_the_image():
    image = noise(9, 9)
    assert torch.equal(recolouring.recolour(image, torch.zeros(9, 9), WINE, 1.0), image)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (200, 1)])
def test_shape_and_type_stay_and_the_image_is_not_written_to(size):
    image = noise(*size)
    before = image.clone()
    result = recolouring.recolour(image, torch.ones(size), WINE, 0.7)
    assert result.shape == image.shape
    assert result.dtype == torch.uint8
    assert torch.equal(image, before)


@pytest.mark.parametrize("level", [40, 120, 210])
@pytest.mark.parametrize("colour", COLOURS)
def test_colour_comes_nearer_with_strength(level, colour):
    image = strands(level)
    away = [
        distance(recolouring.recolour(image, torch.ones(40, 60), colour, s), colour)
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    # Grey on its way to a grey is there before the end, within what lightness is held back by.
    assert all(b < a + 1 for a, b in itertools.pairwise(away))
    assert away[-1] < away[0] or away[0] < 15


@pytest.mark.parametrize("colour", [(200, 30, 30), (30, 160, 40), WINE, (40, 60, 200)])
def test_hue_is_that_of_the_colour(colour):
    result = mean(recolouring.recolour(strands(120), torch.ones(40, 60), colour, 1.0))
    channels = torch.tensor(colour)
    assert result[channels.argmax()] > result[channels != channels.max()].max() + 50


def test_dark_becomes_light_and_light_dark():
    mask = torch.ones(40, 60)
    dark, light = strands(45), strands(200)
    assert brightness(recolouring.recolour(dark, mask, BLOND, 1.0)).mean() > 110
    assert brightness(recolouring.recolour(light, mask, (40, 20, 15), 1.0)).mean() < 110


@pytest.mark.parametrize("colour", COLOURS)
def test_texture_stays(colour):
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256).contiguous()
    light = brightness(recolouring.recolour(ramp, torch.ones(4, 256), colour, 1.0))[0]
    assert (light.diff() > -1.5).all()  # rounding of each channel
    assert light[0] < 1
    assert light[-1] > 254


def test_a_part_in_the_colour_already_stays():
    image = torch.tensor(WINE, dtype=torch.uint8).view(3, 1, 1).repeat(1, 8, 8)
    result = recolouring.recolour(image, torch.ones(8, 8), WINE, 1.0)
    assert (result.int() - image.int()).abs().max() <= 1


def test_edge_is_soft():
    flat, mask = noise(40, 100).fill_(60), torch.linspace(0, 1, 100).expand(40, 100)
    change = (recolouring.recolour(flat, mask, BLOND, 1.0).int() - flat.int()).abs().sum(0)[0]
    assert (change.diff() >= 0).all()
    assert change.diff().max() < 0.1 * change.max()


def test_strips_do_not_show(monkeypatch):
    image, mask = noise(50, 40), torch.rand(50, 40, generator=torch.Generator().manual_seed(2))
    whole = recolouring.recolour(image, mask, BLOND, 1.0)
    monkeypatch.setattr(recolouring, "STRIP", 90)
    parts = recolouring.recolour(image, mask, BLOND, 1.0)
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_oklab_has_the_published_values_and_a_way_back():
    # White, red, green and blue as the colour space's definition gives them (CSS Color 4).
    colours = torch.tensor([[255, 255, 0, 0], [255, 0, 255, 0], [255, 0, 0, 255]])
    expected = [
        [1.0, 0.62796, 0.86644, 0.45201],
        [0.0, 0.22486, -0.23389, -0.03246],
        [0.0, 0.12585, 0.17950, -0.31153],
    ]
    found = recolouring._to_lab(colours.to(torch.uint8)[:, None])[:, 0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)
    image = noise(300, 300)
    assert torch.equal(recolouring._to_bytes(recolouring._to_lab(image)), image)


@pytest.mark.parametrize(("mask", "strength"), [((3, 4), 1.0), ((4, 3), 1.5), ((4, 3), -0.1)])
def test_arguments_are_checked(mask, strength):
    with pytest.raises(ValueError, match=r"(mask|strength) must be"):
        recolouring.recolour(noise(4, 3), torch.ones(mask), WINE, strength)


def test_command_writes_at_the_photographs_own_size_upright(monkeypatch, tmp_path, models, photo):
    upright = Image.open(photo).crop((0, 0, 320, 310))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned, out = tmp_path / "turned.png", tmp_path / "out.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    upright.save(photo)
    options = ["--models", models, "--part", "hair", "--colour", "#8b2252"]
    assert call(monkeypatch, recolour, turned, *options, "--out", out) == 0
    assert call(monkeypatch, recolour, photo, *options) == 0
    result = Image.open(out)
    assert result.size == (320, 310)
    assert result.getexif().get(0x0112, 1) == 1
    default = np.asarray(Image.open(tmp_path / "photo-hair.png"))
    assert np.array_equal(np.asarray(result), default)
    assert not np.array_equal(default, np.asarray(upright))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.png",
        "photo-hair.png",
        "photo.png",
        "turned.png",
    ]


def test_no_picture_of_the_user_is_written_over(monkeypatch, tmp_path, models, photo, capsys):
    """One of an earlier run is."""
    options = ["--models", models, "--part", "hair", "--strength", 0, "--colour"]
    for colour in ("#8b2252", "#000000"):
        assert call(monkeypatch, recolour, photo, *options, colour) == 0
    Image.new("RGB", (5, 4)).save(tmp_path / "photo-hair.png")
    before = (tmp_path / "photo-hair.png").read_bytes()
    error = refused(monkeypatch, capsys, recolour, photo, *options, "#000000")
    assert "photo-hair.png exists, and this program did not write it: give --out" in error
    assert (tmp_path / "photo-hair.png").read_bytes() == before


def test_command_leaves_the_photograph_at_strength_zero(monkeypatch, tmp_path, models, photo):
    out = tmp_path / "out.png"
    options = ["--models", models, "--part", "lips", "--colour", "#8b2252", "--strength", "0"]
    assert call(monkeypatch, recolour, photo, *options, "--out", out) == 0
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(photo)))


def test_command_takes_the_largest_face_or_all(monkeypatch, tmp_path, models):
    photo = small_parser.save_photo(tmp_path / "two.png", faces=2)
    options = [photo, "--models", models, "--part", "hair", "--colour", "#00ff00"]
    assert call(monkeypatch, recolour, *options, "--out", tmp_path / "one.png") == 0
    assert call(monkeypatch, recolour, *options, "--all", "--out", tmp_path / "all.png") == 0
    before, one, both = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("two", "one", "all")
    )
    changed, changed_by_all = ((v != before).any(2) for v in (one, both))
    assert 0 < changed.sum() < changed_by_all.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--colour": "red"}, "argument --colour: must be like '#8b2252', got 'red'"),
        ({"--colour": "#12345"}, "argument --colour: must be like '#8b2252', got '#12345'"),
        ({"--strength": "1.5"}, "argument --strength: 1.5 is not in 0 .. 1"),
        ({"--strength": "nan"}, "argument --strength: nan is not in 0 .. 1"),
        ({"--part": "nose"}, "argument --part: invalid choice: 'nose'"),
        ({"--out": "out.gif"}, "argument --out: must end in one of .png"),
        ({"--models": "nowhere"}, "no face parser at nowhere"),
        ({"PHOTO": "notes.png"}, "notes.png"),
        ({"PHOTO": "missing.png"}, "missing.png: No such file"),
        ({"PHOTO": "pipe.png"}, "cannot read pipe.png: it is no file"),
        ({"PHOTO": "wide.png", "--out": "w.webp"}, "a .webp picture has 16383 pixels a side"),
        ({"--out": "none/x.png"}, "--out must be a file in a folder that is there, got none/x.png"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, models, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save("plain.png")
    Image.new("RGB", (17000, 2)).save("wide.png")
    os.mkfifo("pipe.png")
    before = sorted(tmp_path.iterdir())
    options = {"--models": models, "--part": "hair", "--colour": "#8b2252", "PHOTO": "plain.png"}
    options |= change
    photo = options.pop("PHOTO")
    given = [value for pair in options.items() for value in pair]
    assert words in refused(monkeypatch, capsys, recolour, photo, *given)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("space", "kept"), [(b"RGB ", True), (b"CMYK", False), (b"GRAY", False)])
def test_command_keeps_a_profile_that_fits_the_result(
    space, kept, monkeypatch, tmp_path, models, photo
):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:16] + space + profile[20:]
    Image.open(photo).save(tmp_path / "in.png", icc_profile=profile)
    options = ["--models", models, "--part", "hair", "--colour", "#8b2252"]
    assert call(monkeypatch, recolour, tmp_path / "in.png", *options) == 0
    written = Image.open(tmp_path / "in-hair.png").info.get("icc_profile")
    assert written == (profile if kept else None)


def test_the_colour_is_in_srgb_whatever_the_photographs_space(monkeypatch, tmp_path, models, photo):
    profile = adobe_profile()
    plain, wide = tmp_path / "plain.png", tmp_path / "wide.png"
    Image.open(photo).convert("RGB").save(plain)
    ends = [ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile))]
    converted = ImageCms.profileToProfile(Image.open(plain), *ends, outputMode="RGB")
    converted.save(wide, icc_profile=profile)
    options = ["--models", models, "--part", "hair", "--colour", "#8b2252"]
    for path in (plain, wide):
        assert call(monkeypatch, recolour, path, *options) == 0
    outs = [tmp_path / "plain-hair.png", tmp_path / "wide-hair.png"]
    before, expected, found = (image_io.read(path).int() for path in (plain, *outs))
    new = (expected != before).any(0)
    assert (expected - before).abs()[:, new].float().mean() > 20
    assert (found - expected).abs()[:, new].float().mean() < 2
    own = np.asarray(Image.open(outs[1])) == np.asarray(converted)
    assert own.all(2)[~new.numpy()].mean() > 0.99


def test_photograph_without_a_face_has_an_exit_code_of_its_own(
    monkeypatch, capsys, tmp_path, models
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("plain.png")
    options = ["--models", models, "--part", "hair", "--colour", "#8b2252"]
    assert call(monkeypatch, recolour, "plain.png", *options) == cli.FACELESS
    assert capsys.readouterr().err == "error: no face found in plain.png\n"
    assert [p.name for p in tmp_path.iterdir()] == ["plain.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twelve_megapixels_take_less_than_a_gigabyte(tmp_path, models, photo, script_environment):
    large, out = tmp_path / "large.jpg", tmp_path / "out.jpg"
    Image.open(photo).resize((4000, 3000)).save(large)
    arguments = [EXAMPLE / "recolour.py", large, "--models", models, "--out", out]
    arguments += ["--part", "hair", "--colour", "#8b2252"]
    run = children.run(
        [sys.executable, small_parser.__file__, *map(str, arguments)],
        env=script_environment,
        timeout=120,
        check=True,
    )
    assert Image.open(out).size == (4000, 3000)
    assert int(run.stderr.split(small_parser.PEAK)[1]) < 1e6  # kB
