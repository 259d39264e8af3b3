"""What a scan is, besides its tensors; and the directions by their codes."""

from typing import NamedTuple

from .reference import DIRECTIONS

# A direction's code is its index in DIRECTIONS, as in csrc/geometry.h.
REVERSED = (1, 0, 3, 2)  # the code of the direction that runs against each direction
ALONG_WIDTH = (True, True, False, False)
FROM_END = (False, True, False, True)


class Options(NamedTuple):
    """What a scan is, besides its tensors; `directions` are codes, indices of DIRECTIONS."""

    directions: tuple[int, ...]
    merge: str = "none"  # "none" | "max" | "mean" | "sum"
    nonlinearity: str = "identity"
    gate_norm: str = "none"


# No property of Options: PyTorch 2.10 cannot compile one of a named tuple.
def op_arguments(options: Options):
    """Options as the ops take them."""
    return list(options.directions), options.merge, options.nonlinearity, options.gate_norm


def direction_code(name: str) -> int:
    return DIRECTIONS.index(name)
