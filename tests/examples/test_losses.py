"""The three losses against numbers worked by hand."""

import math

import pytest
import torch
from losses import boundary_loss, boundary_map, label_loss, parser_losses, resize_labels
from models import MODELS, build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_label_loss_is_the_mean_cross_entropy():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0, 1] = math.log(3)  # probabilities (1/2, 1/2) and (1/4, 3/4)
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert label_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_boundary_loss_samples_five_others_for_each_boundary_pixel():
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[0, :, 16:] = 1  # 2 x 32 boundary pixels of 2048
    # Open everywhere at 20: right but for e^-20 off the boundary, wrong by 20 on it.
    loss = boundary_loss(torch.full((2, 1, 32, 32), 20.0), labels, generator=generator())
    assert loss.item() == pytest.approx(20 / 6, rel=1e-6)
    # And closed on the boundary alone: right everywhere.
    logit = torch.where(boundary_map(labels)[:, None], -20.0, 20.0)
    assert boundary_loss(logit, labels, generator=generator()).item() < 1e-6


def test_boundary_loss_draws_anew_but_by_generator():
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, :2, :2] = 1
    logit = torch.randn(1, 1, 32, 32, generator=generator(1))
    same = [boundary_loss(logit, labels, generator=generator(s)).item() for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_boundary_loss_with_few_others_or_no_boundary():
    stripes = torch.tensor([[[0, 0, 0, 1, 1]]], dtype=torch.uint8)  # boundary: the middle two
    logit = torch.zeros(1, 1, 1, 5, requires_grad=True)
    assert boundary_loss(logit, stripes, generator=generator()).item() == pytest.approx(math.log(2))
    plain = torch.zeros(1, 1, 5, dtype=torch.uint8)
    loss = boundary_loss(logit, plain, generator=generator())
    loss.backward()
    assert loss.item() == 0
    assert logit.grad.abs().max() == 0


@pytest.mark.parametrize("name", MODELS)
def test_parser_losses_follow_the_parts_of_the_model(name):
    torch.manual_seed(0)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, 8:] = 2
    output = build_model(name, 3)(torch.zeros(1, 3, 16, 16))
    losses = parser_losses(output, labels, generator=generator())
    expected = {
        "rnn-g": ["output", "x", "boundary"],
        "rnn": ["output", "x"],
        "cnn-deep": ["output", "x"],
        "cnn-s": ["output"],
    }
    assert list(losses) == expected[name]
    assert losses["output"].item() == pytest.approx(label_loss(output.logits, labels).item())
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
