"""The networks: size, shapes, parts, layout."""

import pytest
import torch
from torch import nn

from faceparse.models import MODELS, PartParser, PartsParser, build_model, fuse_bn
from faceparse.models.first_stage import trunk
from faceparse.models.pooling import MaxPool

# Worked by hand, with biases: trunk 1216 + 4640 + 9248 = 15104; Deconv6 513 a channel; the RNN
# 4 (64 + 8) = 288; a 3x3 convolution from 8 channels to 3 labels 219; the gate's 1x1 9.
PARAMETERS = {
    "rnn-g": 15104 + 16 * 513 + 288 + 219 + 219 + 9,  # 24047
    "rnn": 15104 + 8 * 513 + 288 + 219 + 219,
    "cnn-s": 15104 + 16 * 513 + (16 * 9 + 0) * 3 + 3,
    "cnn-deep": 15104 + 16 * 513 + 435 + (16 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + 32 * 9 * 3 + 3,
    "mo": 15104 + 16 * 513 + (16 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + 32 * 9 * 3 + 3 + 33,
}
# A scene's trunk: two 3x3x16 units of 2320 and a deconvolution of 32 * 32 * 16 + 32 more.
SCENE = 2 * 2320 + 16416


@pytest.mark.parametrize("side", [128, 512])
@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_the_parameters_counted_by_hand(name, side):
    model = build_model(name, 3, side=side)
    extra = SCENE if side == 512 else 0
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name] + extra
    widths = [m.out_channels for m in model.modules() if hasattr(m, "out_channels")]
    assert max(widths) <= 32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [3, 11])
@pytest.mark.parametrize("side", [128, 512])
def test_model_returns_the_stated_shapes(name, classes, side):
    model = build_model(name, classes, side=side)
    output = model(torch.zeros(2, 3, 96, 64))
    height, width = (96, 64) if side == 128 else (48, 32)
    assert output.logits.shape == (2, classes, height, width)
    half = (height // 2, width // 2)
    if name in ("cnn-s", "mo", "unet"):
        assert output.x_logits is None
    else:
        assert output.x_logits.shape == (2, classes, *half)
    if name in ("rnn-g", "rnn-g+", "rnn-g+small", "mo"):
        assert output.gate_logit.shape == (2, 1, *half)
    else:
        assert output.gate_logit is None
    if name in ("rnn-g", "rnn-g+", "rnn-g+small"):
        assert output.gate.shape[0] == 2
        assert output.gate.shape[2:] == half
    else:
        assert output.gate is None


@pytest.mark.parametrize("side", [128, 512])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name, side):
    torch.manual_seed(0)
    model = build_model(name, 3, side=side)
    output = model(torch.rand(2, 3, 64, 64) - 0.5)
    sum(part.square().sum() for part in output[:3] if part is not None).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_leaves_out_what_only_a_loss_reads(name):
    torch.manual_seed(0)
    model = build_model(name, 3)
    images = torch.rand(1, 3, 32, 32) - 0.5
    model(images)  # batch normalisation has seen something
    with torch.no_grad():
        output = model.eval()(images)
    assert output.x_logits is None
    assert (output.gate_logit is None) == (name != "mo")
    torch.testing.assert_close(output.logits, model(images).logits)  # pooled in the other way


def test_pooling_without_gradients_is_torch_pooling():
    for size in ((2, 3, 8, 6), (1, 2, 7, 5), (1, 1, 3, 2)):
        x = torch.randn(size)
        x[..., 0] = torch.nan
        pooled = MaxPool()(x)
        with torch.no_grad():
            torch.testing.assert_close(MaxPool()(x), pooled, rtol=0, atol=0, equal_nan=True)


def test_pooling_before_relu_equals_the_papers_order():
    torch.manual_seed(0)
    swapped = trunk(16, scene=False)
    order = [0, 2, 1, 3, 5, 4, 6, 7, 8]  # conv, ReLU, pool
    paper = nn.Sequential(*[swapped[i] for i in order])
    x = torch.randn(2, 3, 16, 16)
    a, b = swapped(x), paper(x)
    assert torch.equal(a, b)
    parameters = list(swapped.parameters())
    r = torch.randn_like(a)
    for p, q in zip(
        torch.autograd.grad(a, parameters, r), torch.autograd.grad(b, parameters, r), strict=True
    ):
        torch.testing.assert_close(p, q)


def test_gates_start_open():
    torch.manual_seed(0)
    gate = build_model("rnn-g", 3)(torch.rand(4, 3, 32, 32) - 0.5).gate
    assert gate.mean().item() == pytest.approx(0.8, abs=0.05)
    assert (gate.abs() < 1).float().mean() > 0.9  # beyond 1 the clamp passes no gradient


@pytest.mark.parametrize("name", PARAMETERS)
def test_only_the_rnn_reaches_beyond_the_trunk(name):
    """A far pixel's logits have a gradient at the other end of the image, or none at all."""
    torch.manual_seed(0)
    images = (torch.rand(1, 3, 96, 16) - 0.5).requires_grad_()
    far = build_model(name, 3)(images).logits[:, :, 80:]
    (gradient,) = torch.autograd.grad(far.square().sum(), images)
    assert (gradient[:, :, :16] != 0).any() == name.startswith("rnn")


def test_channels_last_and_contiguous_images_give_the_same():
    torch.manual_seed(0)
    model = build_model("rnn-g", 3)
    assert model.trunk[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 16, 16)
    a, b = model(x).logits, model(x.contiguous(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(a, b)


def test_build_model_names_what_it_knows():
    with pytest.raises(ValueError, match=r"model must be one of rnn-g, rnn, cnn-s, .*, got 'vgg'"):
        build_model("vgg", 3)
    with pytest.raises(ValueError, match="side must be 64, 128 or 512, got 96"):
        build_model("rnn-g", 3, side=96)


def trained_part(classes):
    """A part's network in evaluation, whose normalisations are none of them the identity."""
    network = build_model("part", classes, side=64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("faces", [1, 2])
def test_parts_together_are_the_parts_one_by_one(faces, fold, layout):
    torch.manual_seed(0)
    eye, nose, mouth = (trained_part(classes) for classes in (3, 2, 4))
    if fold:
        fuse_bn(nose)
    networks = [eye, eye, nose, mouth, mouth]
    sizes = [(64, 64), (64, 64), (64, 64), (32, 64), (48, 20)]
    parts = PartsParser(networks, sizes)
    # Also beyond what is small there is something.
    images = torch.rand(faces, 15, 64, 64).to(memory_format=layout)
    given = images.clone()
    logits = parts(images)
    assert torch.equal(images, given)
    for i, (network, (height, width)) in enumerate(zip(networks, sizes, strict=True)):
        expected = network(images[:, 3 * i : 3 * i + 3, :height, :width]).logits
        torch.testing.assert_close(logits[i], expected, atol=2e-5, rtol=1e-5)


def test_parts_that_do_not_go_together_are_refused():
    first, second = build_model("part", 2, side=64), PartParser(2, widths=(4, 8, 16))
    with pytest.raises(ValueError, match=r"same widths, got \(8, 16, 32\), \(4, 8, 16\)"):
        PartsParser([first, second], [(64, 64)] * 2)
    with pytest.raises(ValueError, match="same widths, got none"):
        PartsParser([], [])
    for sizes in ([(64, 64)], [(64, 64), (30, 64)], [(64, 64), (64, -4)]):
        with pytest.raises(ValueError, match="h, w divisible by 4 of 2 pictures"):
            PartsParser([first, first], sizes)
