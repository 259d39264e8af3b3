"""Four-directional spatially variant RNN for PyTorch, on CPU and CUDA.

"Face Parsing via Recurrent Propagation" (BMVC 2017), Eq. (3):
h_i = theta(x_i + g_i * (w h_{i-1} + b)).
"""

import importlib
from types import ModuleType

from .functional import spatial_gated_rnn
from .modules import SpatialGatedRNN, fold_weight_constraint
from .reference import DIRECTIONS

# After the others, one of which explains where the native library is missing.
from . import _C  # isort: skip

__all__ = ["DIRECTIONS", "SpatialGatedRNN", "fold_weight_constraint", "spatial_gated_rnn"]

__version__ = _C.build_info()["version"]


def __getattr__(name: str) -> ModuleType:
    """`gatedrnn.onnx`, which few need, is imported when it is first used."""
    if name == "onnx":
        return importlib.import_module(".onnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
