"""The package on a GPU: PyTorch's own checks, autocast, messages, far offsets, and no kernels."""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import children
import pytest
import torch
from comparison import BF16, DTYPES, F32, F64, assert_close, within_norm
from gpu_cases import assert_all_close, forward_and_backward, make_inputs, truth
from test_scan_large import FAR

from gatedrnn import SpatialGatedRNN
from gatedrnn._options import Options, op_arguments
from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", ["max", "sum", None])
def test_ops_pass_opcheck(merge, dtype):
    x, g, weight, bias, _ = make_inputs((2, 4, 5, 6), 2, dtype)
    leaves = [t.requires_grad_() for t in (x, g, weight, bias)]
    options = op_arguments(Options((0, 1, 2, 3), merge, "tanh", "clamp"))
    torch.library.opcheck(
        torch.ops.gatedrnn.scan.default,
        (*leaves, *options, True),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )
    x, g, weight, bias = (t.detach() for t in leaves)
    y, mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *options, True)
    torch.library.opcheck(
        torch.ops.gatedrnn.scan_backward.default,
        (torch.randn_like(y), x, g, weight, bias, mask, *options, True, True, True),
        test_utils=["test_schema", "test_faketensor"],
    )


@pytest.mark.parametrize("elsewhere", [1, 2, 3])
def test_ops_refuse_tensors_of_two_devices(elsewhere):
    inputs = list(make_inputs((2, 4, 5, 6), 2, F32)[:4])
    inputs[elsewhere] = inputs[elsewhere].cpu()
    with pytest.raises(RuntimeError, match="must be on x's device"):
        torch.ops.gatedrnn.scan(*inputs, *op_arguments(Options((0, 1, 2, 3), "max")), False)


@pytest.mark.parametrize("autocast", [BF16, torch.float16])
def test_layer_trains_under_autocast(autocast):
    conv, layer = torch.nn.Conv2d(3, 8, 3, padding=1).cuda(), SpatialGatedRNN(8).cuda()
    image = torch.randn(2, 3, 15, 16, device="cuda")
    with torch.autocast("cuda", dtype=autocast):
        y = layer(conv(image), conv(image))
        loss = y.float().pow(2).mean()
    assert y.dtype == autocast
    loss.backward()
    assert {p.grad.dtype for p in (*conv.parameters(), *layer.parameters())} == {F32}
    assert all(p.grad.isfinite().all() for p in (*conv.parameters(), *layer.parameters()))


def test_layer_moves_between_devices():
    layer = SpatialGatedRNN(8)
    x, g, *_ = make_inputs((2, 8, 20, 24), 8, device="cpu")
    expected = layer(x, g).detach()
    torch.testing.assert_close(layer.cuda()(x.cuda(), g.cuda()).cpu(), expected)
    assert torch.equal(layer.cpu()(x, g), expected)


def test_tensors_on_two_devices_are_refused_in_words():
    x, g, weight, bias, _ = make_inputs((2, 4, 5, 6), 2)
    with pytest.raises(RuntimeError, match="g must be on x's device cuda:0, got cpu"):
        spatial_gated_rnn(x, g.cpu(), weight, bias)
    with pytest.raises(RuntimeError, match="weight must be on x's device cuda:0, got cpu"):
        spatial_gated_rnn(x, g, weight.cpu(), bias)


@pytest.mark.parametrize("dim", range(4))
def test_offsets_above_2_to_31_reach_the_right_pixels(dim):
    generator = torch.Generator().manual_seed(5)
    shape = [3, 4, 5, 6]
    shape[dim] = 2
    strides = list(torch.empty(shape).stride())
    strides[dim] = FAR
    views = []
    for _ in range(3):
        memory = torch.empty(2 * (FAR + 4096), dtype=BF16, device="cuda")
        view = memory.as_strided(shape, strides)
        views.append(view.copy_(torch.randn(shape, generator=generator)))
    x, g, grad = views
    weight = within_norm(torch.randn(4, shape[1], 2, generator=generator)).float().cuda()
    bias = torch.randn(4, shape[1], generator=generator).cuda()
    tensors, options = (x, g, weight, bias, grad), dict(merge="sum", gate_activation="tanh")
    assert_all_close(forward_and_backward(*tensors, **options), truth(tensors, **options))


@pytest.mark.parametrize("images", [2**11 + 1, 1])
def test_map_of_more_than_2_to_31_elements_is_right(images):
    # One strip of 2^20 pixels, repeated over channels (in one image) or over images.
    generator = torch.Generator().manual_seed(6)
    copies = 2**11 + 1
    strip = torch.randn(1, 1, 64, 2**14, generator=generator).to(BF16)
    n, c = images, copies // images
    weight, bias = torch.tensor([[[0.5]]]), torch.tensor([[0.25]])
    options = dict(directions=["bottom_to_top"])
    y = spatial_gated_rnn(
        strip.cuda().expand(n, c, 64, 2**14),
        None,
        weight.cuda().expand(1, c, 1),
        bias.cuda().expand(1, c),
        **options,
    )
    assert y.numel() > 2**31
    expected = reference(strip.double(), None, weight.double(), bias.double(), **options)
    flat = y.view(copies, 64, 2**14)
    assert_close(flat[0].cpu(), expected[0, 0])
    assert all(torch.equal(each, flat[0]) for each in flat)


def test_command_checks_every_gpu():
    result = children.run([sys.executable, "-m", "gatedrnn"], cwd=sys.prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    for index in range(torch.cuda.device_count()):
        assert f"\ncuda:{index}: " in result.stdout
        assert torch.cuda.get_device_name(index) in result.stdout


def test_build_without_cuda_runs_the_reference_after_one_warning(tmp_path):
    for folder in ("csrc", "gatedrnn"):
        ignore = shutil.ignore_patterns("_C.*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "GATEDRNN_CUDA": "0"}
    children.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    (archive,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    code = """
import torch
from gatedrnn import SpatialGatedRNN, _C
assert _C.build_info()["cuda_version"] is None
layer, x = SpatialGatedRNN(4), torch.randn(2, 4, 5, 6)
expected = layer(x, x).detach()
layer.cuda()
y = layer(x.cuda(), x.cuda())
layer(x.cuda(), x.cuda()).sum().backward()
torch.testing.assert_close(y.detach().cpu(), expected)
"""
    result = children.run(
        [sys.executable, "-c", code],
        cwd=sys.prefix,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
    )
    assert result.returncode == 0, result.stderr
    warnings = re.findall("gatedrnn has no kernels for 'cuda' tensors", result.stderr)
    assert len(warnings) == 1


@pytest.mark.parametrize("weight_constraint", ["spectral", "frobenius"])
@pytest.mark.parametrize("k", [2, 7, 32, 40])
def test_gradient_through_the_clamp_is_that_of_the_cpu(k, weight_constraint):
    generator = torch.Generator().manual_seed(k)
    layer = SpatialGatedRNN(k, weight_constraint=weight_constraint, dtype=F64)
    layer.raw_weight.data.copy_(torch.randn(4, k, k, generator=generator, dtype=F64))
    cotangent = torch.randn(4, k, k, generator=generator, dtype=F64)
    (expected,) = torch.autograd.grad(layer.weight, layer.raw_weight, cotangent)
    layer.cuda()
    (ours,) = torch.autograd.grad(layer.weight, layer.raw_weight, cotangent.cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-9, atol=1e-9)
