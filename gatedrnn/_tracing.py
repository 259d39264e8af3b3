"""What a function that is traced asks for. Importing this imports Dynamo, which takes seconds."""

from typing import Any

import torch
from torch import Tensor

from . import _ops

_GRAD, _JVP = torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp


@torch.compiler.assume_constant_result
def func_differentiates() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() in (_GRAD, _JVP) for level in stack)


@torch.compiler.assume_constant_result
def in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@torch.compiler.disable(reason="gatedrnn: derivatives of torch.func are not traced through a scan")
def scan_eagerly(*arguments: Any) -> Tensor:
    return _ops.scan(*arguments)
