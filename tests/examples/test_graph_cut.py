"""The graph cut against all labellings of tiny grids."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch

from faceparse.inference import graph_cut
from faceparse.inference.graph_cut import (
    LARGEST,
    SMOOTHNESS,
    energy,
    expand,
    expansion,
    expansions,
    search,
    total,
)


def random_energy(rng, classes, height, width):
    """Costs of the size of those in use; some are equal, some are zero."""
    costs = rng.integers(0, 12, (classes, height, width))
    across = rng.integers(0, 7, (height, width - 1))
    down = rng.integers(0, 7, (height - 1, width))
    return costs, across, down


def energies(grids, costs, across, down):
    """The energy of each of the labellings (M, H, W), worked out pair by pair."""
    _, height, width = costs.shape
    value = np.zeros(len(grids), int)
    for i, j in np.ndindex(height, width):
        value += costs[grids[:, i, j], i, j]
        if j + 1 < width:
            value += across[i, j] * (grids[:, i, j] != grids[:, i, j + 1])
        if i + 1 < height:
            value += down[i, j] * (grids[:, i, j] != grids[:, i + 1, j])
    return value


def all_grids(classes, height, width):
    grids = itertools.product(range(classes), repeat=height * width)
    return np.array(list(grids)).reshape(-1, height, width)


def test_energy_by_hand():
    probabilities = torch.tensor([[[0.5, 0.8]], [[0.5, 0.2]]])
    costs, across, down = energy(probabilities, torch.tensor([[[0.1, 0.3]]]), 2.0)
    # 10000 ln 2, -10000 ln 0.8, -10000 ln 0.2; a boundary only if both sides say so: 2 * 0.3.
    assert costs.tolist() == [[[6931, 2231]], [[6931, 16094]]]
    assert across.tolist() == [[6000]]
    assert down.shape == (0, 2)
    assert total(np.array([[1, 0]]), costs, across, down) == 6931 + 2231 + 6000
    assert total(np.array([[0, 0]]), costs, across, down) == 6931 + 2231
    column = energy(probabilities.transpose(1, 2), torch.tensor([[[0.1], [0.3]]]), 2.0)
    assert column[1].shape == (2, 0)
    assert column[2].tolist() == [[6000]]


def test_boundary_of_half_the_size_is_brought_to_the_pixels():
    probabilities = torch.full((2, 4, 4), 0.5)
    boundary = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    _, across, _ = energy(probabilities, boundary, 1.0)
    # Bilinear: columns 1, 3/4, 1/4, 0; the higher of each two.
    assert across.tolist() == [[10000, 7500, 2500]] * 4


@pytest.mark.parametrize("seed", range(4))
def test_expansion_is_the_best_of_all_its_moves(seed):
    rng = np.random.default_rng(seed)
    parts = random_energy(rng, 3, 3, 4)
    labels = rng.integers(0, 3, (3, 4))
    changed = all_grids(2, 3, 4) == 1
    for label in range(3):
        moved = expansion(labels, label, *parts)
        assert np.all((moved == labels) | (moved == label))
        best = energies(np.where(changed, label, labels), *parts).min()
        assert energies(moved[None], *parts)[0] == best == total(moved, *parts)


@pytest.mark.parametrize("seed", range(12))
def test_two_labels_reach_the_minimum(seed):
    rng = np.random.default_rng(seed)
    parts = random_energy(rng, 2, 3, 4)
    found = expansions(*parts)
    assert total(found, *parts) == energies(all_grids(2, 3, 4), *parts).min()


def test_three_labels_stay_within_the_bound_and_below_the_start():
    grids, above = all_grids(3, 2, 4), 0
    for seed in range(40):
        parts = costs, across, down = random_energy(np.random.default_rng(seed), 3, 2, 4)
        value = total(expansions(*parts), *parts)
        each = energies(grids, *parts)
        minimum = each.min()
        pairwise = minimum - energies(grids[[each.argmin()]], costs, 0 * across, 0 * down)[0]
        assert minimum <= value <= minimum + pairwise
        assert value <= total(costs.argmin(0), *parts)
        above += value > minimum
    assert above < 10  # mostly the minimum itself


def test_a_border_runs_where_a_boundary_is_predicted():
    # Every pixel prefers its half's label but for four that are unsure and wrong.
    side = 16
    probabilities = torch.full((1, 2, side, side), 0.2)
    probabilities[0, 0, :, :8] = probabilities[0, 1, :, 8:] = 0.8
    probabilities[0, :, 5:7, 6:8] = torch.tensor([0.4, 0.6])[:, None, None]
    boundary = torch.full((1, 1, side, side), 0.95)
    boundary[..., 7:9] = 0.05
    wanted = torch.zeros(1, side, side, dtype=torch.uint8)
    wanted[:, :, 8:] = 1
    cut = expand(probabilities, boundary, smoothness=1.5, progress=True)
    assert cut.dtype == torch.uint8
    assert torch.equal(cut, wanted)
    assert torch.equal(
        expand(probabilities, boundary, smoothness=0).long(), probabilities.argmax(1)
    )
    assert not torch.equal(cut.long(), probabilities.argmax(1))
    # A cost far above all others leaves one label.
    assert expand(probabilities, boundary.clamp(min=1), smoothness=LARGEST).unique().numel() == 1


def test_images_and_classes_are_treated_alike():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(2, 4, 9, 7, generator=generator).mul(2).softmax(1)
    boundary = torch.rand(2, 1, 5, 4, generator=generator)
    both = expand(probabilities, boundary, smoothness=0.7)
    assert torch.equal(expand(probabilities[1:], boundary[1:], smoothness=0.7)[0], both[1])
    order = torch.tensor([1, 0])
    # Left-right and up-down: the same energy, hence here the same labels.
    flipped = expand(probabilities.flip(3), boundary.flip(3), smoothness=0.7).flip(2)
    assert torch.equal(flipped, both)
    turned = expand(
        probabilities.transpose(2, 3), boundary.transpose(2, 3), smoothness=0.7
    ).transpose(1, 2)
    assert torch.equal(turned, both)
    two = probabilities[:, :2]
    swapped = order[expand(two[:, order], boundary, smoothness=0.7).long()]
    assert torch.equal(swapped, expand(two, boundary, smoothness=0.7).long())


def test_search_finds_a_smoothness_or_zero():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 24, 24, dtype=torch.uint8)
    labels[:, 6:18, 4:20] = 1
    onehot = torch.nn.functional.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    noise = torch.randn(onehot.shape, generator=generator)
    probabilities = (1.5 * onehot + noise).softmax(1)
    boundary = torch.full((2, 1, 12, 12), 0.9)
    best, score = search(probabilities, boundary, labels, progress=True)
    assert best in SMOOTHNESS[1:]
    cut = expand(probabilities, boundary, smoothness=best)
    assert score == pytest.approx((cut == labels).double().mean().item())
    assert score > (probabilities.argmax(1) == labels).double().mean() + 0.05
    doubled = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert search(probabilities, boundary, doubled) == (best, score)
    assert search(onehot, boundary, labels) == (0, 1.0)


def test_only_a_cut_needs_the_package_under_the_gpl(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxflow", None)
    importlib.reload(graph_cut)
    parts = random_energy(np.random.default_rng(0), 2, 3, 4)
    with pytest.raises(ImportError, match="maxflow"):
        graph_cut.expansion(np.zeros((3, 4), int), 0, *parts)


def test_what_does_not_fit_is_refused():
    probabilities, boundary = torch.full((1, 2, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.5)
    with pytest.raises(ValueError, match=r"probabilities must be \(N, K, H, W\)"):
        expand(probabilities, boundary[0], smoothness=1)
    for smoothness in (-1, float("nan"), 2 * LARGEST):
        with pytest.raises(ValueError, match=r"smoothness must be in 0 \.\. 1000"):
            expand(probabilities, boundary, smoothness=smoothness)
