"""The fully connected CRF against dense kernels of all pairs, and against numbers by hand."""

import math

import pytest
import torch

from faceparse.inference.crf import (
    NONE,
    CrfParameters,
    appearance_kernel,
    mean_field,
    refine,
    search,
)
from faceparse.inference.crf import smoothness_kernel as smoothness
from faceparse.inference.lattice import Lattice
from faceparse.reporting.metrics import accuracy, confusion_matrix

HEIGHT, WIDTH = 26, 22
PARAMETERS = CrfParameters(0.5, 1.5, 2.0, 6.0, 13.0, 5)


def scene(*, seed=0, height=HEIGHT, width=WIDTH):
    """Labels (H, W) uint8 of three regions, and an image of their colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(height, width, dtype=torch.uint8)
    labels[height // 4 :, width // 3 :] = 1
    labels[height // 2 :, : width // 2] = 2
    colours = torch.tensor([[60.0, 90, 120], [190, 140, 110], [40, 30, 60]])
    image = colours[labels.long()] + 6 * torch.randn(height, width, 3, generator=generator)
    return labels, image.clamp(0, 255).to(torch.uint8).permute(2, 0, 1)


def noisy(labels, *, seed=1, noise=1.5):
    """Probabilities (3, H, W) that point to the labels, with much noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.nn.functional.one_hot(labels.long(), 3).permute(2, 0, 1) * 1.5
    return (logits + noise * torch.randn(logits.shape, generator=generator)).softmax(0)


def dense_kernel(image, position_sigma, colour_sigma):
    """The normalised kernel of all pairs of pixels (HW, HW), float64; no colour without a sigma."""
    height, width = image.shape[1:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    squares = ((place[:, None] - place) / position_sigma).square().sum(2)
    if colour_sigma:
        colours = image.flatten(1).T.double()
        squares += ((colours[:, None] - colours) / colour_sigma).square().sum(2)
    kernel = (-0.5 * squares).exp()
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale


def error(kernel, dense, maps):
    """Root mean square difference of the two kernels' answers."""
    expected = (maps.flatten(1).double() @ dense).view_as(maps)
    return (kernel(maps) - expected).square().mean().sqrt().item()


def test_smoothness_is_the_dense_kernel():
    labels, image = scene()
    maps = noisy(labels)
    dense = dense_kernel(image, 2.5, None)
    expected = (maps.flatten(1).double() @ dense).view_as(maps)
    actual = smoothness((HEIGHT, WIDTH), 2.5)(maps)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", [(3.0, 13.0), (6.0, 25.0), (12.0, 8.0), (2.0, 60.0)])
def test_appearance_is_near_the_dense_kernel_and_to_no_other_sigma(sigmas):
    labels, image = scene()
    maps = torch.nn.functional.one_hot(labels.long(), 3).permute(2, 0, 1).float()
    kernel = appearance_kernel(image, *sigmas)
    right = error(kernel, dense_kernel(image, *sigmas), maps)
    assert right < 0.04  # of answers with a standard deviation of 0.4
    # Also for maps that vary faster than the kernel: there a wrong sigma shows.
    maps = (torch.arange(WIDTH) % 4 < 2).float().expand(1, HEIGHT, WIDTH)
    right = error(kernel, dense_kernel(image, *sigmas), maps)
    for factor in (0.5, 2):
        position, colour = sigmas
        assert right < error(kernel, dense_kernel(image, factor * position, colour), maps)
        assert right < error(kernel, dense_kernel(image, position, factor * colour), maps)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_lattice_spreads_an_impulse_as_a_gaussian_of_sigma_one(d):
    generator = torch.Generator().manual_seed(d)
    # Dense points about a line, so that the corners' neighbours all exist along it.
    points = torch.rand(d, 6000, generator=generator) * 0.4
    points[0] = torch.linspace(-5, 5, 6000)
    lattice = Lattice(points)
    near = points[0].abs() < 0.3
    response = lattice.blur(near.float()[None])[0]
    # The second moment, from what reaches each place per point there.
    x = points[0]
    mean = (response * x).sum() / response.sum()
    deviation = ((response * (x - mean) ** 2).sum() / response.sum()).sqrt().item()
    # The impulse itself is 0.6 wide, which adds 0.6^2 / 12 to the variance.
    assert deviation == pytest.approx(math.sqrt(1 + 0.03), rel=0.06)


def test_lattice_weights_add_up_to_one_at_each_point():
    points = torch.randn(5, 500, generator=torch.Generator().manual_seed(0)) * 20
    lattice = Lattice(points)
    assert lattice.weights.min() > -1e-4
    torch.testing.assert_close(lattice.weights.sum(1), torch.ones(500))
    assert (lattice.slots >= 0).all()
    assert (lattice.slots < lattice.count).all()


def test_lattice_has_the_same_answer_wherever_the_points_lie():
    generator = torch.Generator().manual_seed(0)
    points, values = torch.rand(3, 400, generator=generator), torch.rand(2, 400)
    # Along the first axis the lattice repeats itself: sqrt(2/3) (1, -1) / sqrt(2) times sqrt(3) is
    # (1, -1), in units of d + 1.
    shifted = points.clone()
    shifted[0] += 12 * math.sqrt(3)
    a, b = Lattice(points).blur(values), Lattice(shifted).blur(values)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_one_step_by_hand():
    # Two pixels, sigma 1: e = exp(-1/2), the normalised kernel is (1, e; e, 1) / (1 + e).
    probabilities = torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])
    image = torch.zeros(3, 1, 2, dtype=torch.uint8)
    marginals = mean_field(probabilities, image, CrfParameters(2.0, 1.0, 0.0, 1.0, 1.0, 1))
    e = math.exp(-0.5)
    # The right pixel's message for label 1 over label 0: its own opinion, and the left one's by e.
    message = 2 * ((0.6 + 0.1 * e) - (0.4 + 0.9 * e)) / (1 + e)
    expected = 1 / (1 + math.exp(-(math.log(0.6 / 0.4) + message)))
    assert marginals[1, 0, 1].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(marginals.sum(0), torch.ones(1, 2))


def test_mean_field_is_near_that_of_dense_kernels():
    labels, image = scene()
    probabilities = noisy(labels)
    kernels = [(0.5, dense_kernel(image, 1.5, None)), (2.0, dense_kernel(image, 6.0, 13.0))]
    unary = probabilities.double().log().flatten(1)
    expected = unary.softmax(0)
    for _ in range(5):
        message = sum(weight * (expected @ kernel) for weight, kernel in kernels)
        expected = (unary + message).softmax(0)
    actual = mean_field(probabilities, image, PARAMETERS)
    assert (actual.flatten(1) - expected).square().mean().sqrt() < 0.03
    agreement = (actual.flatten(1).argmax(0) == expected.argmax(0)).double().mean()
    assert agreement > 0.98
    assert (probabilities.flatten(1).argmax(0) == expected.argmax(0)).double().mean() < 0.9


def test_refine_removes_speckles_and_moves_a_border_to_the_edge_in_the_image():
    labels, image = scene()
    before = noisy(labels, noise=1.0)
    parameters = PARAMETERS._replace(appearance_weight=4.0)
    after = refine(before[None], image[None], parameters)[0]
    assert (before.argmax(0) == labels).double().mean() < 0.9
    assert (after == labels).double().mean() > 0.98
    # Certain but for three columns that claim the wrong side of an edge.
    certain = torch.nn.functional.one_hot(labels.long(), 3).permute(2, 0, 1) * 0.7 + 0.1
    wrong = certain.clone()
    edge = WIDTH // 3
    wrong[:, 8:12, edge : edge + 3] = torch.tensor([0.5, 0.3, 0.2])[:, None, None]
    assert torch.equal(refine(wrong[None], image[None], parameters)[0], labels)


def test_refine_treats_images_and_classes_alike():
    scenes = [scene(seed=seed) for seed in (1, 2)]
    images = torch.stack([image for _, image in scenes])
    maps = torch.stack([noisy(labels, seed=i) for i, (labels, _) in enumerate(scenes)])
    both = refine(maps, images, PARAMETERS, progress=True)
    assert both.dtype == torch.uint8
    assert torch.equal(refine(maps[1:], images[1:], PARAMETERS)[0], both[1])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(order[refine(maps[:, order], images, PARAMETERS).long()], both.long())


def test_refine_brings_the_image_to_the_maps_and_takes_no_faces():
    labels, image = scene()
    large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    maps = noisy(labels)[None]
    same = refine(maps, image[None], PARAMETERS)
    assert (refine(maps, large[None], PARAMETERS) == same).double().mean() > 0.98
    assert refine(maps[:0], image[None][:0], PARAMETERS).shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "parameters", [NONE, PARAMETERS._replace(steps=0), CrfParameters(0, 1, 0, 1, 1, 5)]
)
def test_no_crf_takes_the_maximum(parameters):
    labels, image = scene()
    maps = noisy(labels)[None]
    assert torch.equal(refine(maps, image[None], parameters).long(), maps.argmax(1))


def test_search_beats_the_maximum_or_says_that_nothing_does():
    scenes = [scene(seed=seed) for seed in range(3)]
    labels = torch.stack([labels for labels, _ in scenes])
    images = torch.stack([image for _, image in scenes])
    maps = torch.stack([noisy(each, seed=i) for i, each in enumerate(labels)])
    large = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found, score = search(maps, images, large, trials=6, seed=0, progress=True)

    def measured(parameters):
        return accuracy(confusion_matrix(refine(maps, images, parameters), labels, 3))

    assert score == measured(found) > measured(NONE) + 0.05
    assert search(maps, images, large, trials=6, seed=0) == (found, score)
    assert search(maps, images, large, trials=6, seed=1)[0] != found
    assert all(type(value) in (int, float) for value in found)  # they go into a JSON file
    certain = torch.nn.functional.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    assert search(certain, images, labels, trials=3, seed=0) == (NONE, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour_sigma": 0.0}, "colour_sigma of the CRF cannot be 0.0"),
        ({"smooth_weight": -1.0}, "smooth_weight of the CRF cannot be -1.0"),
        ({"position_sigma": math.nan}, "position_sigma of the CRF cannot be nan"),
        ({"position_sigma": 0.001, "colour_sigma": 0.001}, "too small"),
        ({"colour_sigma": 1e-30}, "too small"),
    ],
)
def test_parameters_out_of_range_are_refused(change, words):
    labels, image = scene()
    with pytest.raises(ValueError, match=words):
        refine(noisy(labels)[None], image[None], PARAMETERS._replace(**change))


def test_shapes_that_do_not_fit_are_refused():
    labels, image = scene()
    maps = noisy(labels)[None]
    with pytest.raises(ValueError, match=r"probabilities must be \(N, K, H, W\) float"):
        refine(maps[0], image[None], PARAMETERS)
    with pytest.raises(ValueError, match=r"images must be \(1, 3, H, W\) uint8"):
        refine(maps, image[None].repeat(2, 1, 1, 1), PARAMETERS)
    with pytest.raises(ValueError, match="at least one image"):
        search(maps[:0], image[None][:0], labels[None][:0], trials=1, seed=0)
