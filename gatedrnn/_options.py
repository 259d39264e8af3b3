"""What a scan is, besides its tensors: names for Python, integer codes for the native ops.

The code of an option is its index here, and its value in the enum of csrc/scan.h.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

from .reference import DIRECTIONS as DIRECTIONS
from .reference import Direction, GateActivation, Merge, Nonlinearity

MERGES: tuple[Merge | None, ...] = (None, *get_args(Merge))
NONLINEARITIES: tuple[Nonlinearity, ...] = get_args(Nonlinearity)
GATE_ACTIVATIONS: tuple[GateActivation | None, ...] = (None, *get_args(GateActivation))

# By a direction's code, its index in DIRECTIONS as in csrc/geometry.h.
REVERSED = (1, 0, 3, 2)  # the code of the opposite direction
ALONG_WIDTH = (True, True, False, False)
FROM_END = (False, True, False, True)


class Options(NamedTuple):
    """The options of a scan; `directions` are codes, the others are names."""

    directions: tuple[int, ...]
    merge: Merge | None = None
    nonlinearity: Nonlinearity = "identity"
    gate_activation: GateActivation | None = None


# No methods of Options: PyTorch 2.10 cannot compile one of a named tuple.
def op_arguments(options: Options) -> tuple[list[int], int, int, int]:
    """The options as the ops take them. Integers: PyTorch 2.13 leaks each `str` argument."""
    return (
        list(options.directions),
        MERGES.index(options.merge),
        NONLINEARITIES.index(options.nonlinearity),
        GATE_ACTIVATIONS.index(options.gate_activation),
    )


def options_of(
    directions: Sequence[int], merge: int, nonlinearity: int, gate_activation: int
) -> Options:
    """The options of an op's arguments."""
    return Options(
        tuple(directions),
        MERGES[merge],
        NONLINEARITIES[nonlinearity],
        GATE_ACTIVATIONS[gate_activation],
    )


def direction_code(name: Direction) -> int:
    return DIRECTIONS.index(name)


def unknown(option: str, name: object) -> AssertionError:
    """The error of a table that lacks an option which the others have."""
    return AssertionError(f"gatedrnn: {option} {name!r} is missing here")
