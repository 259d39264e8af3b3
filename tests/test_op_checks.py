"""The native ops' own checks: what a direct call of torch.ops.gatedrnn cannot get past."""

import pytest
import torch

from gatedrnn._options import MERGES

MAX = MERGES.index("max")
X = torch.zeros(2, 6, 4, 5)
W = torch.zeros(2, 6, 3)
FORWARD = dict(
    x=X, g=None, weight=W, bias=None, directions=[0, 2], merge=MAX, nonlinearity=0,
    gate_activation=0, keep_mask=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X[0]), "x must have 4 dimensions, got 3"),
        (dict(x=X[:, :0], weight=W[:, :0]), "x must have at least one channel"),
        (dict(x=X.long()), "x must be float64, float32, bfloat16 or float16"),
        (dict(directions=[]), "there must be one to four directions, got 0"),
        (dict(directions=[0] * 5), "there must be one to four directions, got 5"),
        (dict(directions=[0, 4]), "a direction must be 0 to 3, got 4"),
        (dict(directions=[0, -1]), "a direction must be 0 to 3, got -1"),
        (dict(directions=[1, 1]), "a direction is given twice: 1"),
        (dict(merge=4), "merge must be 0 to 3, got 4"),
        (dict(nonlinearity=4), "nonlinearity must be 0 to 3, got 4"),
        (dict(gate_activation=-1), "gate_activation must be 0 to 3, got -1"),
        (dict(weight=W[:1]), r"weight must be \(D, C, C / groups\)"),
        (dict(weight=torch.zeros(2, 6, 4)), r"weight must be \(D, C, C / groups\)"),
        (dict(weight=W.double()), "weight must be contiguous and of the state's type"),
        (
            dict(weight=torch.zeros(2, 3, 6).mT),
            "weight must be contiguous and of the state's type",
        ),
        (dict(bias=torch.zeros(2)), r"bias must be \(D, C\)"),
        (dict(bias=torch.zeros(2, 6).half()), "bias must be contiguous and of the state's type"),
        (dict(g=X.double()), "g must have 4 or 5 dimensions and x's dtype"),
        (dict(g=X[0]), "g must have 4 or 5 dimensions and x's dtype"),
        (dict(g=X[:, :2]), r"g must be \(N, 1\|C, H, W\) or \(N, D, 1\|C, H, W\)"),
        (dict(g=X[:, None]), r"g must be \(N, 1\|C, H, W\) or \(N, D, 1\|C, H, W\)"),
    ],
)
def test_op_refuses_what_it_cannot_read(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gatedrnn.scan(**(FORWARD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad=X[0]), "grad must have y's shape"),
        (dict(grad=X[..., :3]), "grad must have y's shape"),
        (dict(grad=X.double()), "grad must have x's dtype"),
        (dict(needs_g=True), "needs_g without g"),
        (dict(mask=X), "mask must be bytes"),
        (dict(mask=torch.zeros(0, dtype=torch.uint8)), "mask must be bytes"),
        (dict(mask=torch.zeros(2, 6, 4, 4, dtype=torch.uint8)), "mask must have x's shape"),
        (dict(merge=0), "grad must have y's shape"),
    ],
)
def test_backward_op_refuses_what_it_cannot_read(change, message):
    arguments = {k: v for k, v in FORWARD.items() if k != "keep_mask"}
    arguments |= dict(grad=X, mask=torch.ones(2, 6, 4, 5, dtype=torch.uint8))
    arguments |= dict(needs_g=False, needs_weight=True, needs_bias=True)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gatedrnn.scan_backward(**(arguments | change))


def test_ops_read_and_write_a_mask_of_one_layout():
    # A mask of other strides than y's, as a direct call could hand in.
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 6, 4, 5, generator=generator) for _ in range(2))
    weight = torch.randn(2, 6, 3, generator=generator)
    arguments = FORWARD | dict(x=x, weight=weight)
    _, mask = torch.ops.gatedrnn.scan(**arguments)
    arguments.pop("keep_mask")
    arguments |= dict(grad=grad, needs_g=False, needs_weight=True, needs_bias=True)
    expected = torch.ops.gatedrnn.scan_backward(mask=mask, **arguments)
    strided = mask.contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(
        torch.ops.gatedrnn.scan_backward(mask=strided, **arguments), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


KEPT = torch.zeros(4, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=W[0]), r"weight must be contiguous, \(D, C, C / groups\)"),
        (dict(weight=W.mT), r"weight must be contiguous, \(D, C, C / groups\)"),
        (dict(weight=torch.zeros(2, 6, 4)), r"weight must be contiguous, \(D, C, C / groups\)"),
        (dict(weight=W.half()), "weight must be float32 or float64"),
    ],
)
def test_clamp_op_refuses_what_it_cannot_read(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gatedrnn.clamp_spectral(**(dict(weight=W, keep=True) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=W[0]), r"weight must be contiguous, \(D, C, C / groups\)"),
        (dict(weight=W.half(), grad=W.half()), "weight must be float32 or float64"),
        (dict(grad=W[:1]), "grad must be contiguous, of weight's shape and dtype"),
        (dict(grad=W.view(2, 3, 6)), "grad must be contiguous, of weight's shape and dtype"),
        (dict(grad=W.double()), "grad must be contiguous, of weight's shape and dtype"),
        (dict(kept=KEPT[:3]), "kept must be what the clamp of weight keeps"),
        (dict(kept=KEPT.float()), "kept must be what the clamp of weight keeps"),
    ],
)
def test_derivative_of_the_clamp_refuses_what_it_cannot_read(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gatedrnn.clamp_spectral_backward(**(dict(grad=W, weight=W, kept=KEPT) | change))
