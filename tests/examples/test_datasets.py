"""LFW-PL in its genuine layout, good and bad; the synthetic faces; the label tables."""

import sys

import children
import lfw_tree
import numpy as np
import pytest
import torch
from example_scripts import ROOT
from PIL import Image

from faceparse.data import FINE, LABEL_SETS, SPLITS, DataError, open_dataset
from faceparse.data.labels import POINTS, POINTS_MIRROR
from faceparse.data.synthetic import draw_face


@pytest.fixture
def tree(tmp_path):
    return lfw_tree.write_tree(tmp_path / "lfw-pl")


def test_lfw_pl_loads_the_splits_in_list_order(tree):
    faces = open_dataset("lfw-pl", tree, "train")
    assert faces.images.shape == (3, 3, 128, 128)
    assert faces.images.dtype == faces.labels.dtype == torch.uint8
    assert faces.label_set.names == ("background", "skin", "hair")
    # The tree's photographs are uniformly 40 * number (mod 256); JPEG may be off by a little.
    shades = [image.float().mean().item() for image in faces.images]
    assert shades == pytest.approx([40, 40 * 12 % 256, 80], abs=3)
    assert len(open_dataset("lfw-pl", tree, "validation").images) == 1
    assert len(open_dataset("lfw-pl", tree, "test").images) == 2
    assert len(open_dataset("lfw-pl", tree, "train", limit=2).images) == 2


def test_lfw_pl_colours_become_the_right_labels(tree):
    labels = open_dataset("lfw-pl", tree, "test").labels[0]
    expected = torch.zeros(128, 128, dtype=torch.uint8)
    expected[:64], expected[64:, :64] = 2, 1
    torch.testing.assert_close(labels, expected)


def test_lfw_pl_counts_unlike_the_published_ones_are_a_notice(tree, capsys):
    open_dataset("lfw-pl", tree, "train")
    error = capsys.readouterr().err
    assert "parts_train.txt lists 3 faces, the published list 1500" in error


def break_missing_images_folder(root):
    (root / "lfw_funneled").rename(root / "elsewhere")
    return "no 'lfw_funneled' in", "found elsewhere/, parts_lfw_funneled_gt_images/"


def break_missing_list(root):
    (root / "parts_train.txt").unlink()
    return "no 'parts_train.txt' in", "http://"


def break_missing_image(root):
    path = lfw_tree.image_path(root, "Ann_Lee", 2)
    path.unlink()
    return "parts_train.txt names a missing file", str(path)


def break_missing_label(root):
    path = lfw_tree.label_path(root, "Ann_Lee", 2)
    path.unlink()
    return "parts_train.txt names a missing file", str(path)


def break_corrupt_image(root):
    path = lfw_tree.image_path(root, "Ann_Lee", 2)
    path.write_bytes(path.read_bytes()[:300])
    return "cannot decode", str(path)


def break_truncated_label(root):
    path = lfw_tree.label_path(root, "Ann_Lee", 2)
    path.write_bytes(path.read_bytes()[:-1000])
    return "cannot decode", str(path)


def break_empty_image(root):
    path = lfw_tree.image_path(root, "Ann_Lee", 2)
    path.write_bytes(b"")
    return "cannot decode", str(path)


def break_depth(root):
    path = lfw_tree.image_path(root, "Ann_Lee", 2)
    deep = Image.fromarray(np.full((250, 250), 40_000, np.uint16))
    deep.save(path, format="PNG")  # whose values would be cut off at 255
    return str(path), "must have 8 bits a channel, not be of mode I;16"


def break_unknown_colour(root):
    path = lfw_tree.label_path(root, "Ann_Lee", 2)
    colours = np.array(Image.open(path))
    colours[7, 9] = (255, 255, 0)
    Image.fromarray(colours).save(path)
    return str(path), "unknown colour (255, 255, 0) at row 7, column 9 (1 such pixels)"


def break_size(root):
    path = lfw_tree.label_path(root, "Ann_Lee", 2)
    Image.open(path).resize((200, 250), Image.Resampling.NEAREST).save(path)
    return str(path), "is 200 x 250", "is 250 x 250"


def break_background(root):
    path = lfw_tree.label_path(root, "Ann_Lee", 2)
    Image.new("RGB", (250, 250), lfw_tree.BLUE).save(path)
    return str(path), "must label a face, all its pixels are background"


def break_list_line(root):
    path = root / "parts_train.txt"
    path.write_text("Ann_Lee 1\nAnn_Lee_0002\n")
    return str(path), "line 2", "'Ann_Lee_0002'"


def test_zero_byte_in_a_list_is_one_line(tree):
    path = tree / "parts_train.txt"
    path.write_bytes(b"Ann_Lee 1\nAnn\0Lee 2\n")
    with pytest.raises(DataError, match="line 2 holds a zero byte"):
        open_dataset("lfw-pl", tree, "train")


def test_a_list_may_be_of_windows_but_must_be_utf_8(tree):
    path = tree / "parts_train.txt"
    path.write_bytes(b"\xef\xbb\xbfAnn_Lee 1\r\n\r\n \t\r\nAnn_Lee 2\r\n")
    assert len(open_dataset("lfw-pl", tree, "train").images) == 2
    path.write_text("Ann_Lee 1\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"parts_train.txt must be text in UTF-8"):
        open_dataset("lfw-pl", tree, "train")


BAD_TREES = [function for name, function in list(globals().items()) if name.startswith("break_")]
BAD_FILES = BAD_TREES[2:-1]


@pytest.mark.parametrize("damage", BAD_TREES)
def test_lfw_pl_damage_is_one_line_that_names_the_file(tree, damage):
    words = damage(tree)
    with pytest.raises(DataError) as caught:
        open_dataset("lfw-pl", tree, "train")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("damage", BAD_FILES)
def test_lfw_pl_skip_bad_leaves_out_and_counts(tree, damage):
    damage(tree)
    faces = open_dataset("lfw-pl", tree, "train", skip_bad=True)
    assert len(faces.images) == len(faces.labels) == 2
    assert len(faces.skipped) == 1
    assert "Ann_Lee_0002" in faces.skipped[0]


def test_lfw_pl_without_root_or_with_fine_labels_is_an_error(tree):
    with pytest.raises(DataError, match="needs --root DIR"):
        open_dataset("lfw-pl", None, "train")
    with pytest.raises(DataError, match="there is no such folder"):
        open_dataset("lfw-pl", tree / "nowhere", "train")
    with pytest.raises(DataError, match="do not give the labels 'fine'"):
        open_dataset("lfw-pl", tree, "train", labels="fine")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("lfw-portraits", [10, 1, 1]),
        pytest.param("lfw-pl", [1500, 500, 927], marks=pytest.mark.slow),  # writes 530 MB
    ],
)
def test_lfw_pl_reads_real_photographs(name, counts, tmp_path):
    tool = ROOT.parent / "shared" / "tools" / "make_face_sets.py"
    if not (ROOT.parent / "shared" / "data" / "celebamask-mini").is_dir() or not tool.is_file():
        pytest.skip("no real faces beside this checkout")
    command = [sys.executable, tool, tmp_path, "--sets", name, "--limit", "12"]
    children.run(command, check=True)
    faces = [open_dataset("lfw-pl", tmp_path / name, split) for split in SPLITS]
    assert [len(split.images) for split in faces] == counts
    for split in faces:
        # Every portrait has skin before a background, and photographs are not flat.
        assert all({0, 1} <= set(labels.unique().tolist()) for labels in split.labels)
        assert (split.images.float().std((1, 2, 3)) > 20).all()
    assert faces[0].labels.unique().tolist() == [0, 1, 2]


def test_open_dataset_names_what_it_knows(tree):
    with pytest.raises(ValueError, match=r"data set must be one of .*lfw-pl.*, got 'nowhere'"):
        open_dataset("nowhere", tree, "train")
    with pytest.raises(ValueError, match="split must be one of"):
        open_dataset("lfw-pl", tree, "dev")
    with pytest.raises(ValueError, match="label set must be one of"):
        open_dataset("lfw-pl", tree, "train", labels="medium")


def test_synthetic_face_depends_on_seed_and_index_only():
    first, again = draw_face(3, 7), draw_face(3, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (draw_face(3, 8)[0] != first[0]).any()
    assert (draw_face(4, 7)[0] != first[0]).any()


def test_synthetic_splits_share_no_face_and_limits_nest():
    train = open_dataset("synthetic", None, "train", limit=3)
    test = open_dataset("synthetic", None, "test", limit=2)
    assert not (train.images[:2] == test.images).flatten(1).all(1).any()
    longer = open_dataset("synthetic", None, "train", limit=4)
    assert torch.equal(longer.images[:3], train.images)


def test_synthetic_labels_and_points_agree():
    faces = open_dataset("synthetic", None, "train", limit=40, labels="fine")
    assert faces.images.shape == (40, 3, 128, 128)
    assert faces.points.shape == (40, 5, 2)
    assert faces.label_set is FINE
    assert faces.labels.unique().tolist() == list(range(11))
    column, row = faces.points.long().clamp(0, 127).unbind(-1)
    at = faces.labels[torch.arange(40)[:, None], row, column]
    # Fringes and dark glasses hide an eye now and then.
    for i, part in enumerate(POINTS[:2]):
        assert (at[:, i] == FINE.names.index(part)).float().mean() > 0.7
    assert (at[:, 2] == FINE.names.index("nose")).float().mean() > 0.9
    # Left is the subject's, so on the viewer's right.
    assert (faces.points[:, 0, 0] > faces.points[:, 1, 0]).all()

    coarse = open_dataset("synthetic", None, "train", limit=40)
    assert torch.equal(
        coarse.labels, torch.tensor(FINE.coarse, dtype=torch.uint8)[faces.labels.long()]
    )


def test_synthetic_background_holds_the_colours_of_skin_and_hair():
    """What misleads a small window: much of the background is as near to skin as skin is."""
    faces = open_dataset("synthetic", None, "train", limit=24)
    alike = 0
    for image, labels in zip(faces.images.float(), faces.labels, strict=True):
        skin = image[:, labels == 1]
        centre, spread = skin.mean(1, keepdim=True), skin.std(1, keepdim=True)
        near = ((image[:, labels == 0] - centre).abs() < 1.5 * spread).all(0)
        alike += near.float().mean().item() / len(faces.images)
    assert alike > 0.1


@pytest.mark.parametrize("name", LABEL_SETS)
def test_label_tables_are_complete_and_mirror_is_an_involution(name):
    labels = LABEL_SETS[name]
    n = len(labels.names)
    assert len(labels.colours) == len(labels.coarse) == len(labels.mirror) == n
    assert len(set(labels.colours)) == n
    assert [labels.mirror[i] for i in labels.mirror] == list(range(n))
    for label, other in zip(labels.names, labels.mirror, strict=True):
        swap = {"left": "right", "right": "left"}
        side, _, part = label.partition(" ")
        assert labels.names[other] == (f"{swap[side]} {part}" if side in swap else label)


def test_point_table_mirror_is_an_involution():
    assert [POINTS_MIRROR[i] for i in POINTS_MIRROR] == list(range(len(POINTS)))
