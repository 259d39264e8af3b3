"""The example that spreads the directions over two devices."""

import sys

import children
import pytest
import torch
from comparison import F64, assert_close, run
from example_scripts import ROOT

from gatedrnn.functional import spatial_gated_rnn


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import two_devices

    return two_devices


def test_halves_on_two_devices_are_the_whole(two_devices):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, generator=generator, dtype=F64)
        for size in ((2, 3, 7, 5), (2, 3, 7, 5), (4, 3, 3), (4, 3))
    ]
    devices = two_devices.two_devices()
    ours, ours_grads = run(lambda *t: two_devices.scan_on(devices, *t), inputs, torch.ones_like)
    whole, whole_grads = run(spatial_gated_rnn, inputs, torch.ones_like)
    assert_close(ours, whole)
    for one, other in zip(ours_grads, whole_grads, strict=True):
        # Shares of a tie differ only where three or four directions meet: at no pixel here.
        assert_close(one, other)


def test_script_says_what_it_ran_on(script_environment):
    done = children.run(
        [sys.executable, ROOT / "examples" / "two_devices.py"],
        env=script_environment, check=True,
    )  # fmt: skip
    assert "as on one device" in done.stdout
