"""The handle of a compiled model: another object that is the same model, but for what calling it does."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _Handle:
    """Marks the classes of handles, and keeps what a model's class does for its subclasses from being done for them."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a registry of model classes is to know the user's own."""


def plain_model(model: nn.Module) -> nn.Module:
    """The model that a handle is one of; anything else as it is."""
    if not issubclass(type(model), _Handle):
        return model
    one: nn.Module = object.__new__(type(model).__bases__[1])
    object.__setattr__(one, "__dict__", model.__dict__)
    return one


def compiled_handle(model: nn.Module, run: Callable[..., Any], **shown: Any) -> nn.Module:
    """A handle whose call, and whose ``forward``, is ``run``; inside of another torch.compile it is called as it is.

    A ``forward`` that is set on it and calls the one that was there, as accelerate's in mixed precision, goes around
    ``run``: set on the model it would be traced, and call itself. Any other is the model's.
    """
    call = torch.compiler.disable(run, reason="a compiled model of mkor_fx is compiled already")
    around = list[Callable[..., Any]]()

    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"this {type(model).__name__} is compiled already: mkor_fx.compile stands in the place of torch.compile and of "
            "Module.compile(). Call it as it is"
        )

    @functools.wraps(type(model).forward)  # whose signature data loaders ask for
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def get_forward(self: nn.Module) -> Callable[..., Any]:
        return around[-1] if around else types.MethodType(forward, self)

    def set_forward(self: nn.Module, value: Callable[..., Any]) -> None:
        around.clear()
        if getattr(value, "__func__", value) is forward:
            return
        if _leads_to(value, forward):
            around.append(value)
        elif getattr(value, "__func__", value) is type(model).forward:  # as it was made
            self.__dict__.pop("forward", None)
        else:
            self.__dict__["forward"] = value

    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (around[-1] if around else call)(*args, **kwargs)

    does = {"__call__": enter, "forward": property(get_forward, set_forward), "compile": compile}
    return _another(model, does, shown)


def _leads_to(function: Any, target: Callable[..., Any], depth: int = 8) -> bool:
    """Whether a function is ``target``, or a wrapper that holds it."""
    if function is target:
        return True
    held = [getattr(function, name, None) for name in ("__wrapped__", "__func__", "func")]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            held.append(cell.cell_contents)
    return depth > 0 and any(callable(one) and _leads_to(one, target, depth - 1) for one in held)


def inside_ddp(ddp: DistributedDataParallel, handle: nn.Module) -> nn.Module:
    """A handle of the wrapper around the compiled ``handle`` of its module, with what that one shows."""
    shown = {name: getattr(handle, name) for name in ("mkor", "graphs", "coverage")}
    return _another(ddp, {"module": property(lambda self: handle)}, shown)


def _another(model: nn.Module, does: dict[str, Any], shown: dict[str, Any]) -> nn.Module:
    """Another object over the attributes of ``model``, all of them and no copy: parameters, modes, counters and whatever is
    set on one of the two is seen on the other. It is of a subclass of the model's class under its name, with what it
    ``does`` otherwise and what is ``shown``. Copies of it, and what is pickled of it, are plain models.
    """
    base = type(model)

    def refuse(self: nn.Module, other: type) -> None:
        raise RuntimeError(
            f"this {base.__name__} is compiled, and its class cannot be changed any more: parametrize it before "
            "mkor_fx.compile"
        )

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__class__": property(lambda self: base, refuse),
        # another of its kind, as by type(handle)(...), is a plain model
        "__new__": lambda cls, *args, **kwargs: base(*args, **kwargs),
        "__reduce_ex__": lambda self, protocol: plain_model(self).__reduce_ex__(protocol),
        "__deepcopy__": lambda self, memo: copy.deepcopy(plain_model(self), memo),
        **does,
        **{name: _Shown(name, value) for name, value in shown.items() if not hasattr(base, name)},
    }
    metaclass: Any = type(base)
    handle = object.__new__(metaclass(base.__name__, (_Handle, base), members))
    object.__setattr__(handle, "__dict__", model.__dict__)
    return handle


class _Shown:
    """An attribute of a handle. One that the model has itself, under the same name, stays the model's."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __get__(self, handle: Any, owner: type) -> Any:
        if handle is not None:
            for held in ("_parameters", "_buffers", "_modules"):
                if self.name in handle.__dict__.get(held, {}):
                    return handle.__dict__[held][self.name]
        return self.value
