"""Augmentation moves image, labels and key points together, and repeats itself by its draws."""

import torch

from faceparse.data import COARSE, FINE
from faceparse.data.labels import POINTS_MIRROR
from faceparse.data.transforms import (
    augment,
    change_colours,
    draw,
    normalise,
    random_similarity,
    warp,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normalise_maps_bytes_to_half_around_zero():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(image).flatten(), torch.tensor([-0.5, -0.3, 0.5]))


def test_warp_by_the_identity_changes_nothing():
    images, labels = torch.rand(2, 3, 9, 7), torch.randint(0, 11, (2, 9, 7), dtype=torch.uint8)
    points = torch.rand(2, 5, 2)
    matrix = torch.eye(2, 3).expand(2, 2, 3)
    out = warp(images, labels, matrix, points=points)
    torch.testing.assert_close(out[0], images, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], labels)
    torch.testing.assert_close(out[2], points)


def test_warp_shifts_and_turns_as_worked_by_hand():
    image = torch.zeros(1, 3, 5, 5)
    image[..., 1, 3] = 1  # row 1, column 3; its centre is (3.5, 1.5)
    labels = image[:, 0].to(torch.uint8)
    points = torch.tensor([[[3.5, 1.5]]])

    shift = torch.tensor([[[1.0, 0, -1], [0, 1, 2]]])
    moved, moved_labels, moved_points = warp(image, labels, shift, points=points)
    assert moved_labels[0].nonzero().tolist() == [[3, 2]]
    assert moved[0, 0, 3, 2] > 0.99
    torch.testing.assert_close(moved_points, torch.tensor([[[2.5, 3.5]]]))

    # y points down, so this turns clockwise about the middle (2.5, 2.5): (1, -1) to (1, 1).
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    _, moved_labels, moved_points = warp(image, labels, turn, points=points)
    assert moved_labels[0].nonzero().tolist() == [[3, 3]]
    torch.testing.assert_close(moved_points, torch.tensor([[[3.5, 3.5]]]))


def test_random_similarity_stays_within_the_stated_ranges():
    matrix = random_similarity(500, (128, 64), generator=generator())
    scale = torch.linalg.det(matrix[:, :, :2]).sqrt()
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert 0.9 <= scale.min() < 0.92
    assert 1.08 < scale.max() <= 1.1001
    assert 14 < angle.abs().max() <= 15.001
    assert 5.8 < matrix[:, 0, 2].abs().max() <= 6.4001  # a tenth of the width
    assert 12 < matrix[:, 1, 2].abs().max() <= 12.8001


def test_augment_keeps_labels_and_points_on_the_image():
    """An image that shows its own labels still shows them afterwards, at its points too."""
    labels = torch.zeros(16, 64, 64, dtype=torch.uint8)
    labels[:, 20:36, 36:46] = FINE.names.index("left eye")
    labels[:, 20:36, 18:28] = FINE.names.index("right eye")
    images = (labels * 20)[:, None].expand(-1, 3, -1, -1).contiguous()
    points = torch.tensor([[41.0, 28], [23, 28], [32, 40], [40, 50], [24, 50]]).expand(16, 5, 2)
    moved, moved_labels, moved_points = augment(
        images,
        labels,
        draw(16, (64, 64), generator=generator(1)),
        label_set=FINE,
        points=points,
        points_mirror=POINTS_MIRROR,
    )
    assert moved.dtype == torch.float32
    assert moved_labels.dtype == torch.uint8
    left = moved_points[:, 0]
    assert (moved_points[:, 0, 0] > moved_points[:, 1, 0]).all()  # also where mirrored
    for i, part in enumerate(("left eye", "right eye")):
        column, row = moved_points[:, i].long().unbind(-1)
        assert (moved_labels[torch.arange(16), row, column] == FINE.names.index(part)).all()
    # Eye pixels are where the image is brighter, except where colours were changed.
    bright = moved.mean(1) > -0.35
    assert ((moved_labels > 0) == bright).float().mean() > 0.9
    assert not torch.equal(left, points[:, 0])


def draws(n, seed=0, size=(32, 32)):
    return draw(n, size, generator=generator(seed))


def test_augment_repeats_by_draws_and_leaves_its_input_alone():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 3, (8, 32, 32), dtype=torch.uint8)
    before = images.clone(), labels.clone()
    a = augment(images, labels, draws(8, 5), label_set=COARSE)
    b = augment(images, labels, draws(8, 5), label_set=COARSE)
    c = augment(images, labels, draws(8, 6), label_set=COARSE)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_augment_of_a_part_is_the_part_of_the_whole():
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 3, (20, 32, 32), dtype=torch.uint8)
    whole, rows = draws(20), slice(1, None, 3)
    assert (whole.colour == 2).any()
    all_images, all_labels, _ = augment(images, labels, whole, label_set=COARSE)
    some, some_labels, _ = augment(images[rows], labels[rows], whole.part(rows), label_set=COARSE)
    torch.testing.assert_close(some, all_images[rows], rtol=0, atol=1e-6)
    assert torch.equal(some_labels, all_labels[rows])


def test_change_colours_touches_one_image_in_five():
    images = torch.rand(400, 3, 8, 8) - 0.5
    drawn = draws(400)
    out = change_colours(images.clone(), drawn)
    changed = (out != images).flatten(1).any(1)
    assert torch.equal(changed, drawn.colour >= 0)
    assert 0.14 < changed.float().mean() < 0.26
    assert sorted(drawn.colour.unique().tolist()) == [-1, 0, 1, 2]
    assert out.min() >= -0.5
    assert out.max() <= 0.5
