"""Scenes of many synthetic faces, and several data sets in one."""

import lfw_tree
import numpy as np
import pytest
import torch
import trees

from faceparse.data import (
    DATASETS,
    FINE,
    SPLITS,
    DataError,
    open_dataset,
    open_mixed,
    synthetic_multi,
)
from faceparse.data.synthetic_multi import draw_scene


def test_a_scene_depends_on_seed_and_index_only():
    first, again = draw_scene(3, 7), draw_scene(3, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (draw_scene(3, 8)[0] != first[0]).any()
    assert (draw_scene(4, 7)[0] != first[0]).any()


def test_scenes_have_their_sizes_and_splits_differ():
    assert DATASETS["synthetic-multi"].COUNTS == {"train": 200, "validation": 20, "test": 40}
    parts = [open_dataset("synthetic-multi", None, split, limit=1) for split in SPLITS]
    for part in parts:
        assert part.images.shape == (1, 3, 512, 512)
        assert part.labels.shape == (1, 512, 512)
        assert part.images.dtype == part.labels.dtype == torch.uint8
        assert part.labels.unique().tolist() == [0, 1, 2]
        assert part.points is None
    assert not torch.equal(parts[0].images, parts[1].images)
    assert not torch.equal(parts[1].images, parts[2].images)
    fine = open_dataset("synthetic-multi", None, "test", limit=1, labels="fine")
    assert fine.label_set is FINE
    table = torch.tensor(FINE.coarse, dtype=torch.uint8)
    assert torch.equal(table[fine.labels.long()], parts[2].labels)


def heads(labels):
    """The number of noses in a label map: regions that a flood from each pixel tells apart."""
    rest = {(int(y), int(x)) for y, x in np.argwhere(labels == FINE.names.index("nose"))}
    count = 0
    while rest:
        front, size = [rest.pop()], 0
        while front:
            y, x = front.pop()
            size += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in rest:
                    rest.remove(near)
                    front.append(near)
        count += size > 20
    return count


def test_scenes_hold_several_heads_and_much_background():
    labels = [draw_scene((1, 0), i)[1] for i in range(8)]
    counts = [heads(found) for found in labels]
    assert all(1 <= count <= 6 for count in counts)  # a near head may hide a far one's nose
    assert len(set(counts)) > 2
    assert np.mean(counts) > 2
    assert all(0.4 < (found == 0).mean() < 0.99 for found in labels)


def test_nothing_but_the_heads_is_taken_from_the_single_pictures(monkeypatch):
    """Another background in those changes a scene at the very edges of the heads only."""
    draw = synthetic_multi.draw_face
    scenes = []
    for colour in ((255, 0, 255), (0, 255, 0)):

        def with_background(seed, index, colour=colour):
            image, labels, key_points = draw(seed, index)
            return np.where(labels[..., None] == 0, np.uint8(colour), image), labels, key_points

        monkeypatch.setattr(synthetic_multi, "draw_face", with_background)
        scenes.append(draw_scene((1, 0), 2))
    (first, labels), (second, others) = scenes
    np.testing.assert_array_equal(labels, others)
    changed = (first != second).any(-1)
    near_background = np.zeros((512, 512), bool)
    near_head = np.zeros((512, 512), bool)
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            near_background |= np.roll(labels == 0, (dy, dx), (0, 1))
            near_head |= np.roll(labels > 0, (dy, dx), (0, 1))
    assert not (changed & ~near_background).any()
    # A speck that nearest leaves out of the labels may still show.
    assert (changed & ~near_head).mean() < 1e-3
    assert changed.mean() < 0.05


def test_scene_background_holds_the_colours_of_skin_and_hair():
    """Much of the background is as near to somebody's skin as skin is."""
    alike = []
    for i in range(6):
        image, labels = draw_scene((1, 0), i)
        coarse = np.array(FINE.coarse)[labels]
        image = image.astype(np.float32)
        skin = image[coarse == 1]
        near = (np.abs(image[coarse == 0] - skin.mean(0)) < 1.5 * skin.std(0)).all(1)
        alike.append(near.mean())
    assert np.mean(alike) > 0.1


@pytest.fixture
def specs(tmp_path):
    """A set with points and one without."""
    hq = trees.write_tree("celebamask-hq", tmp_path / "hq")
    lfw = lfw_tree.write_tree(tmp_path / "lfw")
    return [("celebamask-hq", hq), ("lfw-pl", lfw), ("synthetic", None)]


def test_mixed_sets_follow_one_another(specs):
    mixed = open_mixed(specs, "train", limit=2)
    parts = [open_dataset(name, root, "train", limit=2) for name, root in specs]
    assert torch.equal(mixed.images, torch.cat([part.images for part in parts]))
    assert torch.equal(mixed.labels, torch.cat([part.labels for part in parts]))
    torch.testing.assert_close(mixed.points[:2], parts[0].points)
    assert mixed.points[2:4].isnan().all()
    torch.testing.assert_close(mixed.points[4:], parts[2].points)
    assert mixed.label_set is parts[0].label_set
    assert open_mixed(specs[1:2], "train").points is None


def test_mixed_sets_with_fine_labels(specs, tmp_path):
    fine = [specs[0], specs[2], ("helen", trees.write_tree("helen", tmp_path / "helen"))]
    mixed = open_mixed(fine, "test", limit=1, labels="fine")
    assert mixed.label_set is FINE
    assert len(mixed.images) == 3
    with pytest.raises(DataError, match=r"lfw-pl has 3 classes .* do not give the labels 'fine'"):
        open_mixed(specs, "train", labels="fine")


def test_mixed_sets_keep_what_was_skipped(specs):
    lfw_tree.image_path(specs[1][1], "Ann_Lee", 1).write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot decode"):
        open_mixed(specs, "train")
    mixed = open_mixed(specs, "train", limit=3, skip_bad=True)
    assert len(mixed.images) == 8
    assert len(mixed.skipped) == 1


def test_sets_of_different_sizes_are_not_mixed(specs):
    with pytest.raises(ValueError, match=r"cannot be mixed: .*128 x 128.*512 x 512"):
        open_mixed([specs[2], ("synthetic-multi", None)], "train")
    with pytest.raises(ValueError, match="no data set"):
        open_mixed([], "train")
    with pytest.raises(ValueError, match="data set must be one of"):
        open_mixed([("nowhere", None)], "train")
