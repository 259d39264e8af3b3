"""HELEN, CelebAMask-HQ (whole and mini), LaPa and multi-face in their genuine layouts."""

import sys

import children
import lfw_tree
import numpy as np
import pytest
import torch
import trees
from example_scripts import ROOT
from PIL import Image

from faceparse.data import DATASETS, SPLITS, DataError, open_dataset
from faceparse.data.celebamask_hq import MASK_NAMES, split_tenths
from faceparse.data.celebamask_mini import held_out
from faceparse.data.labels import CELEBAMASK_HQ

NAMES = ("helen", "celebamask-hq", "celebamask-mini", "lapa", "multi-face")
FINE_NAMES = NAMES[:-1]
LISTED = ("helen", "celebamask-mini", "multi-face")
SHARED = ROOT.parent / "shared"
TOOL = SHARED / "tools" / "make_face_sets.py"
MINI = SHARED / "data" / "celebamask-mini"


@pytest.fixture
def tree(tmp_path, request):
    """The tree of the set that the test's parameter ``name`` says."""
    name = request.node.callspec.params["name"]
    return trees.write_tree(name, tmp_path / name)


def expected_labels(name, fine):
    """What the loader must make of ``trees.fine()``, by hand: (S, S)."""
    labels = fine if DATASETS[name].TABLE.fine else trees.coarse()
    middle = np.floor((np.arange(128) + 0.5) * 80 / 128).astype(int)
    if name == "multi-face":  # 80 x 80 scaled to 512 x 512
        middle = np.floor((np.arange(512) + 0.5) * 80 / 512).astype(int)
    elif name in ("helen", "lapa"):
        # The face's box is columns 10 to 50, rows 20 to 60: a square of 80 from x -10, y 0.
        labels = np.pad(labels, ((0, 0), (10, 0)))[:, :80]
    return labels[middle][:, middle]


@pytest.mark.parametrize("name", NAMES)
def test_splits_come_in_order_with_the_right_pixels(name, tree):
    faces = {split: open_dataset(name, tree, split, labels="coarse") for split in SPLITS}
    numbers = {**trees.SPLITS}
    if name == "celebamask-hq":  # by number: 11 comes after 9
        numbers = {"train": range(10), "validation": [10], "test": [11]}
    for split, part in faces.items():
        side = DATASETS[name].SIDE
        assert part.images.shape == (len(numbers[split]), 3, side, side)
        assert part.images.dtype == part.labels.dtype == torch.uint8
        assert part.label_set.names == ("background", "skin", "hair")
        # Also where the square reaches outside: the border goes on there.
        for image, k in zip(part.images, numbers[split], strict=True):
            np.testing.assert_allclose(image.float(), trees.shade(k), atol=2)
    expected = np.array([0, *[1] * 9, 2], np.uint8)
    wanted = expected_labels(name, trees.fine())
    wanted = expected[wanted] if DATASETS[name].TABLE.fine else wanted
    np.testing.assert_array_equal(faces["train"].labels[1], wanted)
    assert len(open_dataset(name, tree, "train", limit=2).images) == 2


@pytest.mark.parametrize("name", FINE_NAMES)
def test_fine_labels_and_points_are_right(name, tree):
    faces = open_dataset(name, tree, "test", labels="fine")
    np.testing.assert_array_equal(faces.labels[0], expected_labels(name, trees.fine()))
    shift = (10, 0) if name in ("helen", "lapa") else (0, 0)
    expected = (np.array(trees.POINTS) + shift) * 128 / 80
    np.testing.assert_allclose(faces.points[0], expected, atol=1e-3)


QUARTERS = np.array([[20, 90], [160, 230]], np.uint8)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("name", [*NAMES, "lfw-pl"])
def test_photographs_are_turned_upright(name, orientation, tmp_path):
    """The masks are upright, so a photograph must be, whatever way the camera was held."""
    if name == "lfw-pl":
        tree = lfw_tree.write_tree(tmp_path)
        path = lfw_tree.image_path(tree, "Cy_Young_2", 1)
    else:
        tree = trees.write_tree(name, tmp_path)
        path = trees.image(name, tree, 11 if name == "celebamask-hq" else 4)
    half = Image.open(path).width // 2
    upright = np.kron(QUARTERS[..., None], np.ones((half, half, 3), np.uint8))
    found = []
    for stored in (1, orientation):
        trees.save_stored(path, upright, stored)
        found.append(open_dataset(name, tree, "test", limit=1))
    np.testing.assert_allclose(*(faces.images.float() for faces in found), atol=6)
    assert len(found[1].images[0].unique()) >= 4
    assert torch.equal(found[0].labels, found[1].labels)


def test_width_and_height_are_those_of_the_upright_photograph(tmp_path):
    tree = trees.write_tree("multi-face", tmp_path)
    upright = np.kron(QUARTERS[..., None], np.ones((30, 60, 3), np.uint8))
    trees.save_stored(trees.image("multi-face", tree, 4), upright, 6)
    Image.fromarray(np.ones((60, 120), np.uint8)).save(trees.label("multi-face", tree, 4))
    image = open_dataset("multi-face", tree, "test", limit=1).images[0, 0]
    found = image[[50, 200]][:, [100, 400]]
    np.testing.assert_allclose(found, QUARTERS, atol=3)
    assert (image[256:] == 0).all()


def test_masks_are_turned_upright(tmp_path):
    tree = trees.write_tree("helen", tmp_path)
    before = open_dataset("helen", tree, "test", limit=1).labels
    exif = Image.Exif()
    exif[0x112] = 3
    for part in range(11):
        path = trees.label("helen", tree, 4, part)
        Image.open(path).rotate(180).save(path, exif=exif)
    assert torch.equal(open_dataset("helen", tree, "test", limit=1).labels, before)


def test_fine_labels_where_there_are_none_are_an_error(tmp_path):
    tree = trees.write_tree("multi-face", tmp_path)
    with pytest.raises(DataError, match="do not give the labels 'fine'"):
        open_dataset("multi-face", tree, "train", labels="fine")
    assert open_dataset("multi-face", tree, "train").points is None


def test_multi_face_is_padded_right_or_below(tmp_path):
    tree = trees.write_tree("multi-face", tmp_path)
    photo = np.full((60, 120, 3), 200, np.uint8)
    Image.fromarray(photo).save(trees.image("multi-face", tree, 1))
    Image.fromarray(np.ones((60, 120), np.uint8)).save(trees.label("multi-face", tree, 1))
    faces = open_dataset("multi-face", tree, "train")
    assert (faces.labels[1, :256] == 1).all()
    assert (faces.labels[1, 256:] == 0).all()
    assert (faces.images[1, :, :256] > 190).all()
    assert (faces.images[1, :, 256:] == 0).all()


def test_helen_takes_the_strongest_map_and_the_first_of_equals(tmp_path):
    tree = trees.write_tree("helen", tmp_path)
    # Skin 200 everywhere on the face; hair's map is as strong on its lower half, the nose's more.
    hair = np.array(Image.open(trees.label("helen", tree, 0, 10)))
    hair[40:60, 10:50] = 200
    Image.fromarray(hair).save(trees.label("helen", tree, 0, 10))
    nose = np.array(Image.open(trees.label("helen", tree, 0, 6)))
    nose[58:60, 10:50] = 255
    Image.fromarray(nose).save(trees.label("helen", tree, 0, 6))
    labels = open_dataset("helen", tree, "train", labels="fine").labels[0]
    expected = trees.fine()
    expected[58:60, 10:50] = 6
    np.testing.assert_array_equal(labels, expected_labels("helen", expected))


def test_celebamask_hq_paints_later_parts_over_earlier_ones(tmp_path):
    tree = trees.write_tree("celebamask-hq", tmp_path)
    white = Image.new("L", (80, 80), 255)
    folder = trees.label("celebamask-hq", tree, 0).parent
    white.save(folder / "00000_l_eye.png")  # over skin, nose and nothing else
    white.save(folder / "00001_cloth.png")  # over everything
    faces = open_dataset("celebamask-hq", tree, "train", labels="fine")
    expected = trees.fine()
    expected[np.isin(expected, (0, 1, 6))] = 4
    np.testing.assert_array_equal(faces.labels[0], expected_labels("celebamask-hq", expected))
    assert (faces.labels[1] == 0).all()
    assert [
        CELEBAMASK_HQ.names[1 + MASK_NAMES.index(part)] for part in ("l_ear", "neck_l", "eye_g")
    ] == [
        "left ear",
        "necklace",
        "eyeglasses",
    ]


def test_celebamask_ears_are_skin_in_the_coarse_set_only():
    ears = [CELEBAMASK_HQ.names.index(f"{side} ear") for side in ("left", "right")]
    assert [CELEBAMASK_HQ.coarse[ear] for ear in ears] == [1, 1]
    assert [CELEBAMASK_HQ.fine[ear] for ear in ears] == [0, 0]


def test_splits_without_lists():
    tenths = split_tenths(list(range(30000)))
    assert {split: len(rows) for split, rows in tenths.items()} == DATASETS["celebamask-hq"].COUNTS
    assert tenths["validation"][0] == 24000
    assert tenths["test"][-1] == 29999
    assert [held_out(count) for count in (4, 100, 800, 5000)] == [1, 10, 60, 60]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_counts_unlike_the_published_ones_are_a_notice(name, tree, capsys):
    open_dataset(name, tree, "test")
    count, published = {"celebamask-hq": (1, 3000)}.get(name, (2, DATASETS[name].COUNTS["test"]))
    error = capsys.readouterr().err
    assert error.startswith("note: ")
    assert f"lists {count} faces, the published list {published} (test)" in error


def break_image(name, root):
    path = trees.image(name, root, 1)
    path.write_bytes(path.read_bytes()[:200])
    return "cannot decode", str(path)


def break_empty_image(name, root):
    path = trees.image(name, root, 1)
    path.write_bytes(b"")
    return "cannot decode", str(path)


def break_label(name, root):
    path = trees.label(name, root, 1)
    path.write_bytes(path.read_bytes()[:60])
    return "cannot decode", str(path)


def break_size(name, root):
    path = trees.label(name, root, 1)
    with Image.open(path) as labels:
        labels.resize((40, 80), Image.Resampling.NEAREST).save(path)
    # In HELEN and CelebAMask-HQ the other maps of the same face tell first.
    size = "40 x 80", "80 x 80"
    return (str(path), *size)


def break_missing_image(name, root):
    path = trees.image(name, root, 1)
    path.unlink()
    return "names a missing file", str(path)


def break_missing_label(name, root):
    path = trees.label(name, root, 1)
    if name != "celebamask-hq":
        path.unlink()
        return "names a missing file", str(path)
    for part in trees.PARTS:  # absent parts have no file, but no part at all is an error
        trees.label(name, root, 1, part).unlink()
    return "has no mask file", str(trees.image(name, root, 1))


def break_unknown_label(name, root):
    path = trees.label(name, root, 1)
    with Image.open(path) as file:
        labels, palette = np.array(file), file.getpalette()
    labels[3, 5] = 19
    image = Image.fromarray(labels)
    if palette:
        image.putpalette(palette)
    image.save(path)
    return str(path), "unknown label 19 at row 3, column 5 (1 such pixels)"


def break_colour_label(name, root):
    path = trees.label(name, root, 1)
    Image.new("RGB", (80, 80)).save(path)
    return str(path), "8-bit grey or palette image"


def break_faceless(name, root):
    for part in range(1, 11):
        path = trees.label(name, root, 1, part)
        Image.new("L", (80, 80)).save(path)
    return "holds no face label", trees.IDS[1]


def break_landmarks(name, root):
    path = trees.landmarks(root, 1)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    return str(path), "'106'"


def break_zero_landmarks(name, root):
    path = trees.landmarks(root, 1)
    path.write_text("106\n" + "0 0\n" * 106)
    return str(path), "must have landmarks that lie apart"


def break_shifted_landmarks(name, root):
    path = trees.landmarks(root, 1)
    places = np.add(np.loadtxt(path, skiprows=1), (8, 0))
    np.savetxt(path, places, header="106", comments="")
    return (
        str(path),
        "must have landmarks within 0.5 of",
        str(trees.label(name, root, 1)),
    )


def break_background(name, root):
    path = trees.label(name, root, 1)
    Image.new("L", (80, 80)).save(path)
    return str(path), "must label a face, all its pixels are background"


def break_empty_masks(name, root):
    for part in trees.PARTS:
        Image.new("L", (80, 80)).save(trees.label(name, root, 1, part))
    return "are all empty", str(trees.image(name, root, 1))


def break_missing_landmarks(name, root):
    path = trees.landmarks(root, 1)
    path.unlink()
    return "names a missing file", str(path)


BREAKS = {function: NAMES for key, function in list(globals().items()) if "break_" in key}
BREAKS[break_missing_image] = LISTED  # elsewhere the photographs themselves are the list
BREAKS[break_unknown_label] = BREAKS[break_colour_label] = NAMES[2:]  # values are not classes
BREAKS[break_faceless] = ("helen", "lapa")  # cut about the face
BREAKS[break_landmarks] = BREAKS[break_missing_landmarks] = ("lapa",)
BREAKS[break_zero_landmarks] = BREAKS[break_shifted_landmarks] = ("lapa",)
BREAKS[break_background] = ("celebamask-mini",)
BREAKS[break_empty_masks] = ("celebamask-hq",)


@pytest.mark.parametrize(
    ("damage", "name"), [(damage, name) for damage, names in BREAKS.items() for name in names]
)
def test_damage_is_one_line_that_names_the_file_or_is_skipped(name, damage, tree):
    words = damage(name, tree)
    with pytest.raises(DataError) as caught:
        open_dataset(name, tree, "train")
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    faces = open_dataset(name, tree, "train", skip_bad=True)
    assert faces.skipped == (message,)
    count = 10 if name == "celebamask-hq" else 3
    assert len(faces.images) == len(faces.labels) == count - 1
    np.testing.assert_allclose(faces.images[1].float(), trees.shade(2), atol=2)


@pytest.mark.parametrize("name", LISTED)
def test_missing_list_says_what_was_looked_for_and_found(name, tree):
    missing = trees.LISTS[name][0]
    (tree / missing).unlink()
    with pytest.raises(DataError) as caught:
        open_dataset(name, tree, "train")
    message = str(caught.value)
    assert f"no '{missing}' in {tree}" in message
    assert "found " in message
    assert "images/" in message
    assert DATASETS[name].HOME in message


@pytest.mark.parametrize("name", NAMES)
def test_missing_folder_says_what_was_looked_for_and_found(name, tree):
    folder = trees.image(name, tree, 0).parent
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(DataError) as caught:
        open_dataset(name, tree, "train")
    message = str(caught.value)
    assert f"no '{folder.relative_to(tree)}' in {tree}" in message
    assert "found " in message
    assert DATASETS[name].HOME in message


@pytest.mark.parametrize("name", NAMES)
def test_no_root_no_folder_an_empty_one_and_a_file_are_told_apart(name, tmp_path):
    with pytest.raises(DataError, match="needs --root DIR"):
        open_dataset(name, None, "train")
    with pytest.raises(DataError, match="there is no such folder"):
        open_dataset(name, tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder is empty"):
        open_dataset(name, tmp_path / "empty", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a file, not a folder"):
        open_dataset(name, tmp_path / "file", "train")


def test_lapa_takes_capital_letters_and_leaves_out_the_files_of_macos(tmp_path):
    tree = trees.write_tree("lapa", tmp_path)
    path = trees.image("lapa", tree, 1)
    path.with_name(f"._{path.name}").write_bytes(b"not a photograph")
    path.rename(path.with_suffix(".JPG"))
    faces = open_dataset("lapa", tree, "train")
    assert len(faces.images) == 3


def test_landmarks_near_their_parts_are_taken(tmp_path):
    """The eyes are 18 pixels apart; people do not annotate to the pixel."""
    tree = trees.write_tree("lapa", tmp_path)
    path = trees.landmarks(tree, 1)
    np.savetxt(path, np.loadtxt(path, skiprows=1) + 3, header="106", comments="")
    path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert len(open_dataset("lapa", tree, "train").images) == 3


def test_landmarks_of_another_photograph_are_noticed(tmp_path):
    tree = trees.write_tree("lapa", tmp_path)
    for path in (trees.image("lapa", tree, 1), trees.label("lapa", tree, 1)):
        Image.open(path).rotate(90).save(path)
    first, second = (trees.landmarks(tree, k) for k in (0, 1))
    turned = np.add(np.loadtxt(second, skiprows=1)[:, ::-1] * (1, -1), (0, 80))
    np.savetxt(second, turned, header="106", comments="")
    assert len(open_dataset("lapa", tree, "train").images) == 3
    stored = first.read_text(), second.read_text()
    first.write_text(stored[1])
    second.write_text(stored[0])
    faces = open_dataset("lapa", tree, "train", skip_bad=True)
    assert len(faces.images) == 1
    for path, line in zip((first, second), faces.skipped, strict=True):
        assert str(path) in line


@pytest.mark.parametrize("name", [*NAMES, "lfw-pl"])
def test_suffixes_may_be_in_capitals(name, tmp_path):
    tree = lfw_tree.write_tree(tmp_path) if name == "lfw-pl" else trees.write_tree(name, tmp_path)
    before = open_dataset(name, tree, "train")
    for path in list(tree.rglob("*")):
        if path.is_file() and path.parent != tree:
            path.rename(path.with_suffix(path.suffix.upper()))
    after = open_dataset(name, tree, "train")
    assert len(after.images) > 0
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.labels, before.labels)


@pytest.mark.parametrize("name", ["celebamask-hq", "lapa"])
def test_empty_image_folder_is_an_error(name, tree):
    for path in trees.image(name, tree, 0).parent.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no '<.*>\.jpg' in .*the folder is empty"):
        open_dataset(name, tree, "train")


@pytest.mark.parametrize("line", ["10001_1", "1 10001_1", ", 10001_1", "one , 10001_1", "2 ,"])
def test_helen_list_line_that_is_not_one_is_an_error(line, tmp_path):
    tree = trees.write_tree("helen", tmp_path)
    (tree / "exemplars.txt").write_text(f"1 , 10000_1\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        open_dataset("helen", tree, "train")
    assert f"{tree / 'exemplars.txt'} line 3" in str(caught.value)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize("name", ["lfw-pl", *NAMES])
def test_another_set_in_the_root_is_recognised(name, tmp_path):
    """Each set is told from every other one, and found one level higher or lower."""
    if name == "lfw-pl":
        tree = lfw_tree.write_tree(tmp_path / "data" / "set")
    else:
        tree = trees.write_tree(name, tmp_path / "data" / "set")
    for other in ("lfw-pl", *NAMES):
        if other != name:
            with pytest.raises(DataError, match=f"looks like {name}: --dataset {name}"):
                open_dataset(other, tree, "train")
    inside = next(p for p in sorted(tree.iterdir()) if p.is_dir())
    for place in (tree.parent, inside):
        with pytest.raises(DataError) as caught:
            open_dataset(name, place, "train")
        assert f"{tree} looks like {name}: --dataset {name} --root {tree}" in str(caught.value)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Real photographs in the layouts of four sets."""
    if not MINI.is_dir() or not TOOL.is_file():
        pytest.skip("no real faces beside this checkout")
    out = tmp_path_factory.mktemp("real")
    sets = ["--sets", "helen", "celebamask-hq", "multi-face"]
    children.run([sys.executable, TOOL, out, "--limit", "12", *sets], check=True)
    return out


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lapa"])
def test_real_photographs_are_read(name, real):
    mini = name == "celebamask-mini"
    root = MINI if mini else real / name
    labels = "coarse" if name == "multi-face" else "fine"
    limit = 5 if mini else None
    faces = [open_dataset(name, root, split, limit=limit, labels=labels) for split in SPLITS]
    counts = {"multi-face": [5, 0, 0], "celebamask-mini": [5, 5, 5]}.get(name, [10, 1, 1])
    assert [len(part.images) for part in faces] == counts
    for part in filter(lambda part: len(part.images), faces):
        # Every portrait has skin before a background, and photographs are not flat.
        assert all({0, 1} <= set(found.unique().tolist()) for found in part.labels)
        assert (part.images.float().std((1, 2, 3)) > 20).all()
    if name == "multi-face":
        return
    points = torch.cat([part.points for part in faces])
    assert (points.isfinite().all((1, 2))).float().mean() > 0.8
    # Eyes above the nose tip, and that above the mouth, in portraits.
    height = points.nan_to_num(64)[..., 1]
    assert (height[:, :2].amax(1) <= height[:, 2]).float().mean() > 0.8
    assert (height[:, 2] <= height[:, 3:].amin(1)).float().mean() > 0.8


def test_real_photographs_are_one_and_the_same_through_two_layouts(real):
    """The mini set's first face is number 0 of the CelebAMask-HQ tree, in twice the size."""
    mini = open_dataset("celebamask-mini", MINI, "train", limit=1, labels="fine")
    whole = open_dataset("celebamask-hq", real / "celebamask-hq", "train", limit=1, labels="fine")
    assert torch.equal(mini.labels, whole.labels)
    assert (mini.images.float() - whole.images.float()).abs().mean() < 3
    torch.testing.assert_close(mini.points, whole.points, equal_nan=True)
