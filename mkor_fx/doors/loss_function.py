"""What a compiled step captures: a model, and the loss of what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


def loss_function(model: nn.Module, loss_fn: Callable | None, return_outputs: bool) -> Callable[..., Any]:
    """What Dynamo captures: the loss first, then whatever else is wanted, detached."""

    def loss_of(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "a compiled step was about to run without being compiled, which would train nothing: torch.compile is "
                "switched off or has given up (torch.compiler.set_stance, TORCH_COMPILE_DISABLE, a recompile limit)"
            )
        if loss_fn is None:
            outputs = model(*args, **kwargs)
            if isinstance(outputs, Tensor):
                loss = outputs
            elif isinstance(outputs, (tuple, list)):
                loss = outputs[0]
            else:
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
        else:
            outputs = model(*args[:-1], **kwargs)
            loss = loss_fn(outputs, args[-1])
        if return_outputs:
            return loss, pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        return loss

    return loss_of
