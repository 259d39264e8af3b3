"""Every option stands in every table: a place that was forgotten must not be silently wrong."""

import re
from pathlib import Path

import pytest
import torch

from gatedrnn import DIRECTIONS, SpatialGatedRNN, _derivatives, functional, onnx, reference
from gatedrnn._options import GATE_ACTIVATIONS, MERGES, NONLINEARITIES, Options

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"Merge": MERGES, "Nonlinearity": NONLINEARITIES, "GateActivation": GATE_ACTIVATIONS}


@pytest.mark.parametrize("enum", OPTIONS)
def test_codes_are_those_of_the_native_enums(enum):
    header = (ROOT / "csrc/scan.h").read_text()
    (body,) = re.findall(rf"enum class {enum} : int {{(.*?)}}", header)
    names = [name.strip().removeprefix("k").lower() for name in body.split(",")]
    assert names == [name or "none" for name in OPTIONS[enum]]


def test_direction_codes_are_rows_of_the_native_table():
    header = (ROOT / "csrc/geometry.h").read_text()
    rows = re.findall(r"\{(true|false), (true|false)\},\s+// (\w+)", header)
    assert tuple(name for *_, name in rows) == DIRECTIONS
    for code, (along_width, reverse, name) in enumerate(rows):
        assert reference._SCANS[name] == (3 if along_width == "true" else 2, reverse == "true")
        assert _derivatives.ALONG_WIDTH[code] == (along_width == "true")
        assert _derivatives.FROM_END[code] == (reverse == "true")


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (reference._MERGE, MERGES),
        (reference._THETA, NONLINEARITIES),
        (reference._GATE_ACTIVATION, GATE_ACTIVATIONS),
        (onnx._MERGE, MERGES[1:]),
        (onnx._NONLINEARITY, NONLINEARITIES),
        (onnx._GATE_ACTIVATION, GATE_ACTIVATIONS),
    ],
)
def test_table_has_every_option(table, names):
    assert set(table) == set(names)


def test_functions_by_option_know_every_name_and_no_other():
    t, mask = torch.rand(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.uint8)

    def shares(merge):
        return _derivatives._shares(mask, Options((0,), merge), torch.float32)

    for function, names in (
        (lambda name: _derivatives._slope(name, t), NONLINEARITIES),
        (lambda name: _derivatives._activated(t, name), GATE_ACTIVATIONS),
        (lambda name: _derivatives._gate_slope(t, name), GATE_ACTIVATIONS),
        (shares, MERGES[1:]),
    ):
        for name in names:
            function(name)
        with pytest.raises(AssertionError, match="'forgotten' is missing"):
            function("forgotten")


@pytest.mark.parametrize("owner", [functional.spatial_gated_rnn, SpatialGatedRNN])
def test_docstring_names_every_option(owner):
    for names in OPTIONS.values():
        for name in names:
            assert (f'"{name}"' if name else "None") in owner.__doc__


def test_guide_names_every_option():
    text = (ROOT / "docs" / "guide.md").read_text()
    for name in (*MERGES, *NONLINEARITIES, *GATE_ACTIVATIONS):
        assert name is None or name in text
