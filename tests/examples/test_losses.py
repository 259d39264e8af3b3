"""The three losses against numbers worked by hand."""

import math

import pytest
import torch

from faceparse.models import MODELS, build_model
from faceparse.training.losses import (
    boundary_loss,
    boundary_map,
    label_loss,
    parser_losses,
    resize_labels,
    sample,
    sample_background,
)


def mean(loss):
    return (loss.total / loss.count).item()


def test_boundary_map_is_two_pixels_wide_and_skips_the_rim():
    labels = torch.tensor([[[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]])
    expected = torch.tensor(
        [[[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]], dtype=torch.bool
    )
    assert torch.equal(boundary_map(labels), expected)
    assert not boundary_map(torch.full((2, 3, 3), 7)).any()


def test_resize_labels_takes_every_other_pixel():
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    assert resize_labels(labels, (2, 2)).tolist() == [[[0, 2], [8, 10]]]
    assert resize_labels(labels, (4, 4)) is labels


def test_label_loss_adds_up_the_cross_entropy_and_counts_pixels():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0, 1] = math.log(3)  # probabilities (1/2, 1/2) and (1/4, 3/4)
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    loss = label_loss(logits, labels)
    assert loss.total.item() == pytest.approx(math.log(2) + math.log(4 / 3), rel=1e-6)
    assert loss.count.item() == 2
    loss = label_loss(logits, labels, pixels=torch.tensor([[[False, True]]]))
    assert loss.total.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert loss.count.item() == 1


def test_sample_takes_all_wanted_and_the_ratio_of_others_in_each_image():
    wanted = torch.zeros(3, 20, 20, dtype=torch.bool)
    wanted[0, 0, :10] = wanted[1, :15] = True
    others = ~wanted
    others[0, 10:] = False
    chosen = sample(wanted, others, 3, seeds=[1, 2, 3])
    assert (chosen & ~wanted & ~others).sum() == 0
    assert chosen[wanted].all()
    # 10 wanted: 30 drawn; 300 wanted: all of the 100 others; none wanted: none.
    assert chosen.flatten(1).sum(1).tolist() == [10 + 30, 400, 0]


def test_sample_depends_on_each_images_own_seed_alone():
    wanted = torch.zeros(2, 16, 16, dtype=torch.bool)
    wanted[:, :2] = True
    both = sample(wanted, ~wanted, 2, seeds=[5, 6])
    assert torch.equal(sample(wanted[1:], ~wanted[1:], 2, seeds=[6])[0], both[1])
    assert not torch.equal(both[0], both[1])


def test_every_other_pixel_is_drawn_equally_often():
    wanted = torch.zeros(1, 8, 8, dtype=torch.bool)
    wanted[0, 0, :4] = True
    counts = sum(sample(wanted, ~wanted, 5, seeds=[s]).long() for s in range(900))
    others = counts[~wanted].float()  # each drawn with probability 20 / 60
    assert others.min() > 300 - 6 * 14.2
    assert others.max() < 300 + 6 * 14.2


def test_background_is_five_times_the_rest():
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[0, :4, :5], labels[0, 20:22, :5] = 1, 2
    chosen = sample_background(labels, 5, seeds=[0])
    assert chosen[labels != 0].all()
    assert chosen[labels == 0].sum() == 5 * 30


def test_more_others_than_there_are_are_all_of_them():
    wanted = torch.zeros(2, 4, 4, dtype=torch.bool)
    wanted[0, 0, 0] = True
    assert sample(wanted, ~wanted, 2**62, seeds=[1, 2]).flatten(1).sum(1).tolist() == [16, 0]


def test_boundary_loss_samples_five_others_for_each_boundary_pixel():
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[0, :, 16:] = 1  # 2 x 32 boundary pixels of 1024
    # Open everywhere at 20: right but for e^-20 off the boundary, wrong by 20 on it.
    loss = boundary_loss(torch.full((2, 1, 32, 32), 20.0), labels, seeds=[0, 1])
    assert loss.count.item() == 6 * 64
    assert mean(loss) == pytest.approx(20 / 6, rel=1e-6)
    # And closed on the boundary alone: right everywhere.
    logit = torch.where(boundary_map(labels)[:, None], -20.0, 20.0)
    assert mean(boundary_loss(logit, labels, seeds=[0, 1])) < 1e-6


def test_boundary_loss_draws_anew_but_by_seed():
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, :2, :2] = 1
    logit = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    same = [mean(boundary_loss(logit, labels, seeds=[s])) for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_boundary_loss_with_few_others_or_no_boundary():
    stripes = torch.tensor([[[0, 0, 0, 1, 1]]], dtype=torch.uint8)  # boundary: the middle two
    logit = torch.zeros(1, 1, 1, 5, requires_grad=True)
    assert mean(boundary_loss(logit, stripes, seeds=[0])) == pytest.approx(math.log(2))
    plain = torch.zeros(1, 1, 5, dtype=torch.uint8)
    loss = boundary_loss(logit, plain, seeds=[0])
    loss.total.backward()
    assert loss.total.item() == loss.count.item() == 0
    assert logit.grad.abs().max() == 0


@pytest.mark.parametrize("background", [0, 5])
@pytest.mark.parametrize("name", MODELS)
def test_parser_losses_follow_the_parts_of_the_model(name, background):
    torch.manual_seed(0)
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[:, 14:, 4:] = 2
    output = build_model(name, 3)(torch.rand(2, 3, 16, 16))
    losses = parser_losses(output, labels, seeds=[3, 4], background=background)
    expected = {
        "rnn-g": ["output", "x", "boundary"],
        "rnn-g+": ["output", "x", "boundary"],
        "rnn-g+small": ["output", "x", "boundary"],
        "rnn": ["output", "x"],
        "cnn-deep": ["output", "x"],
        "cnn-s": ["output"],
        "mo": ["output", "boundary"],
        "unet": ["output"],
    }
    assert list(losses) == expected[name]
    assert losses["output"].count.item() == 2 * (24 * 6 if background else 256)
    assert all(loss.total.ndim == 0 and loss.total.isfinite() for loss in losses.values())


def test_losses_add_up_over_the_parts_of_a_batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (4, 4, 4), dtype=torch.uint8)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    output = build_model("rnn-g", 3)(torch.rand(4, 3, 32, 32))
    whole = parser_losses(output, labels, seeds=[1, 2, 3, 4], background=5)
    parts = [
        parser_losses(
            type(output)(*(part[rows] for part in output)),
            labels[rows],
            seeds=[1 + i for i in range(4)[rows]],
            background=5,
        )
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    for name, loss in whole.items():
        torch.testing.assert_close(loss.total, parts[0][name].total + parts[1][name].total)
        assert loss.count == parts[0][name].count + parts[1][name].count
