"""What a model, its wrapper and its loss must be like, checked before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..runtime.census import hooked


def check_model(model: object) -> None:
    """A module with at least one trainable parameter."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}: pass an instance" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model: must be a torch.nn.Module, got {what}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: nothing to precondition. Set requires_grad, "
            "or use torch.compile for inference"
        )


def check_materialised(model: nn.Module) -> None:
    """Raises ValueError for parameters without memory."""
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values to train: call model.to_empty(device=...) and initialise it"
            )


def check_loss(loss_fn: object) -> None:
    """None, or a function of outputs and target: not its name, its class, or what stands next to it among the arguments."""
    if loss_fn is None or (callable(loss_fn) and not isinstance(loss_fn, type)):
        return
    if isinstance(loss_fn, type):
        wrong = f"={loss_fn.__name__}: a class. Pass an instance, {loss_fn.__name__}()"
    elif isinstance(loss_fn, Optimizer):
        wrong = f"={type(loss_fn).__name__}: an optimizer. The order is compile_step(model, loss_fn, optimizer)"
    elif isinstance(loss_fn, Tensor):
        wrong = ": a tensor, as of a loss that is computed already. Pass the function that computes it"
    else:
        wrong = f"={loss_fn!r}: must be callable as loss_fn(outputs, target)"
    raise ValueError(
        f"loss_fn{wrong}, e.g. torch.nn.functional.cross_entropy or torch.nn.CrossEntropyLoss(); None for a model that "
        "returns its loss"
    )


def check_not_compiled(model: nn.Module) -> None:
    """Raises ValueError for what torch.compile has returned."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ValueError(
            "the model is compiled by torch.compile already, in whose place mkor_fx.compile stands: pass the model itself "
            "(model._orig_mod)"
        )


def check_gradient_hooks(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for hooks on gradients: a compiled step gives parameters no gradient to hook."""
    for name, kind in hooked(named):
        raise ValueError(
            f"{name} has a hook on its gradient ({kind}), which a compiled step cannot run: remove it, or use "
            "mkor_fx.compile(model) with your own loop, where it acts"
        )


def check_memory(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for parameters that share elements without being one: each would be stepped, and the last one wins.
    Different parts of one memory are fine."""
    tenants: dict[int, list[tuple[str, Tensor]]] = {}
    for name, param in named:
        if param.device.type != "meta" and param.numel():
            tenants.setdefault(param.untyped_storage().data_ptr(), []).append((name, param))
    for held in tenants.values():
        for at, (name, param) in enumerate(held):
            for first, other in held[:at]:
                if _overlap(first=other, second=param):
                    raise ValueError(
                        f"{first} and {name} share memory but are two parameters, which one step cannot update together: "
                        "tie them as one (module.weight = other.weight), or give each its own "
                        "(param.data = param.data.clone())"
                    )


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common: decided on the host, from their geometry alone."""
    ends = [1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) for t in (first, second)]
    starts = [t.storage_offset() for t in (first, second)]
    low, high = max(starts), min(start + end for start, end in zip(starts, ends))
    if low >= high or first.dtype != second.dtype:
        return False
    taken = torch.zeros(max(start + end for start, end in zip(starts, ends)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), second.storage_offset()).any())


def check_call(model: nn.Module, has_target: bool, args: tuple, kwargs: dict) -> None:
    """Raises TypeError for arguments of a compiled step that the model's forward cannot take."""
    if has_target and not args:
        raise TypeError("a compiled step is called with the target as its last positional argument: step(x, y)")
    try:
        inspect.signature(model.forward).bind(*(args[:-1] if has_target else args), **kwargs)
    except TypeError as error:
        target = "the last positional argument is the target, and " if has_target else ""
        named = f" and {', '.join(kwargs)}" if kwargs else ""
        raise TypeError(
            f"the step was called with {len(args)} positional arguments{named}: {target}{type(model).__name__}.forward "
            f"cannot take the rest ({error})"
        ) from None


def without_ddp(model: nn.Module, process_group: ProcessGroup | None) -> tuple[nn.Module, Any]:
    """The module inside a DistributedDataParallel, and the process group to use: its own unless another is given.

    Raises:
        ValueError: the wrapper has been told to do what a compiled step does itself.
    """
    if not isinstance(model, DistributedDataParallel):
        return model, process_group
    asked = {
        "a communication hook": bool(model._comm_hooks),
        "find_unused_parameters=True": model.find_unused_parameters,
        "mixed_precision": model.mixed_precision is not None,
        "join": model._join_config.enable,
    }
    for what, there in asked.items():
        if there:
            raise ValueError(
                f"compile_step writes its own collectives and cannot honour DistributedDataParallel's {what}: pass the "
                "module inside, or use mkor_fx.compile with your own loop"
            )
    return model.module, process_group or model.process_group


def check_sharding(model: nn.Module, precondition: str, *, whole_step: bool = False) -> None:
    """Preconditioning multiplies whole matrices, so it has to happen where gradients are whole.

    Raises:
        ValueError: parameters are sharded, and this way of preconditioning would not see their whole gradients.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError("FullyShardedDataParallel flattens parameters into vectors: use torch's fully_shard instead")
    if any(isinstance(module, FSDPModule) for module in modules):
        if precondition != "backward":
            raise ValueError(
                "fully_shard leaves each rank a part of every gradient, and preconditioning needs whole ones: use "
                "mkor_fx.compile(model, MKOR.published(), precondition='backward'), which sees them before they are "
                "scattered"
            )
        return
    parts = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if parts and whole_step:
        raise ValueError(
            f"{len(parts)} parameters are tensor-parallel ({parts[0]}, ...), and a compiled step does not know whose sum "
            "each of their gradients is: use mkor_fx.compile, which leaves these to the base optimizer"
        )


def check_still_alone() -> None:
    """A step that was made for one process must not go on silently in several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "torch.distributed was initialised after mkor_fx was called: ranks would train apart. Call init_process_group "
            "first"
        )
