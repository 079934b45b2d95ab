"""Whether a model is still what it was when its programs were made: cheap enough to be asked at every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from .checkpoint import some

_KINDS = ("_modules", "_parameters")


class Census:
    """The submodules and parameters of a model, by place, as they were when it was taken.

    Replaced, new and gone ones are seen, and so are ties; values are not looked at. It holds nothing alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (prefix, weakref.ref(module), kind, [(key, _ref(value)) for key, value in getattr(module, kind).items()])
            for prefix, module in model.named_modules()
            for kind in _KINDS
        ]

    def changed(self) -> bool:
        return next(self._changes(), None) is not None

    def lent(self) -> bool:
        """Whether tensors that are no parameters stand where parameters are to be."""
        modules = {ref() for _, ref, kind, _ in self._held if kind == "_parameters"}
        held = (value for module in modules if module is not None for value in module._parameters.values())
        return any(value is not None and not isinstance(value, nn.Parameter) for value in held)

    def changes(self) -> str:
        """What is different, for people."""
        return some(list(dict.fromkeys(self._changes())))

    def _changes(self) -> Iterator[str]:
        for prefix, ref, kind, items in self._held:
            module = ref()
            held = {} if module is None else getattr(module, kind)
            for key, known in items:
                if held.get(key) is not known():
                    yield f"{prefix}.{key}".lstrip(".")
            if len(held) != len(items):
                yield prefix or "the model itself"


def _ref(value: object) -> Callable[[], object]:
    return (lambda: None) if value is None else weakref.ref(value)


def hooked(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Parameters with hooks that autograd would run on their gradients: ``(name, kind of hook)``."""
    for name, param in named:
        if param._backward_hooks:
            yield name, "register_hook"
        if param._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
            yield name, "register_post_accumulate_grad_hook"
