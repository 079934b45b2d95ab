"""What graphs have said of the parameters that they use."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from .steps import Step


class Known:
    """What the graphs so far say about one parameter: its layout and bias, or that it is declined."""

    def __init__(self, param: nn.Parameter) -> None:
        self.ref = weakref.ref(param)
        self.layout: Any = None
        self.bias: weakref.ref[nn.Parameter] | None = None
        #: without a bias: what was frozen in every graph that has shown the weight, its bias maybe
        self.frozen: frozenset[int] = frozenset()
        self.declined = False

    @property
    def param(self) -> nn.Parameter:
        param = self.ref()
        assert param is not None
        return param

    def join(self, layout: Any, bias: nn.Parameter | None, frozen: frozenset[int], merge: Any) -> None:
        """Take over what another graph says. A bias that was frozen there is not one that the weight is used without."""
        own = None if self.bias is None else self.bias()
        if own is None and bias is not None and id(bias) in self.frozen:
            self.bias = weakref.ref(bias)
        elif own is not bias and not (bias is None and id(own) in frozen):
            self.bias = None
        self.frozen = self.frozen & frozen if bias is None and own is None else frozenset()
        self.layout = merge(self.layout, layout, self.bias is not None)

    def bias_with_gradient(self, step: Step) -> nn.Parameter | None:
        """Its bias, if that has a gradient that nobody has seen to."""
        bias = self.bias() if self.bias is not None and self.layout.bias else None
        return None if bias is None or bias.grad is None or id(bias) in step.handled else bias
