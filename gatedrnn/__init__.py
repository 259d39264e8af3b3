"""Four-directional spatially variant RNN for PyTorch, on CPU and CUDA.

"Face Parsing via Recurrent Propagation" (BMVC 2017), Eq. (3):
h_i = theta(x_i + g_i * (w h_{i-1} + b)).
"""

from .functional import spatial_gated_rnn
from .modules import SpatialGatedRNN, fold_weight_constraint
from .reference import DIRECTIONS

__all__ = ["DIRECTIONS", "SpatialGatedRNN", "fold_weight_constraint", "spatial_gated_rnn"]
