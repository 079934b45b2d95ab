"""Second-order methods as libraries of module hooks have them, eager: what compiled rules are held against.

Shape suffixes: ``N`` rows, ``O`` outputs and ``I`` inputs of a layer, ``D`` either.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Hooked(torch.optim.Optimizer):
    """Turns gradients of linear layers and convolutions into directions, in place; stands in front of the optimizer that
    applies them. Hooks need the modules to run as they are: the model cannot be compiled."""

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.requires_grad]
        super().__init__([layer.weight for layer in layers], {"lr": 0.0})  # the rate is the next optimizer's
        self.layers: list[Any] = list(layers)
        self.rows: dict[nn.Module, list[Tensor]] = {}
        for layer in layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._keep, layer, inputs[0].detach()))

    def _keep(self, layer: Any, a: Tensor, g: Tensor) -> None:
        if a.dim() == 4:
            a = functional.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
            g = g.flatten(2).mT
        self.rows[layer] = [a.flatten(0, -2), g.flatten(0, -2)]

    def direct(self, layer: Any, left: Tensor, right: Tensor) -> None:
        """``left @ G @ right`` in the place of a gradient and ``left @ b`` in that of a bias, with their norms."""
        weight = layer.weight.grad.flatten(1)
        _replace(weight, left @ weight @ right)
        if layer.bias is not None:
            _replace(layer.bias.grad, left @ layer.bias.grad)


def _replace(grad: Tensor, direction: Tensor) -> None:
    grad.copy_(direction * (grad.norm() / direction.norm()))


class HookedKFAC(Hooked):
    """The equations of :class:`mkor_fx.KFAC` (Martens and Grosse, 2015, arXiv 1503.05671): averages of ``a^T a / N`` and
    ``N g^T g``, inverted every ``every`` steps with factored damping, used from the step behind."""

    def __init__(self, model: nn.Module, damping: float = 1e-3, decay: float = 0.95, every: int = 10) -> None:
        super().__init__(model)
        self.damping, self.decay, self.every = damping, decay, every

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for layer in self.layers:
            a_NI, g_NO = self.rows.pop(layer)
            state = self.state[layer.weight]
            step = state["step"] = state.get("step", -1) + 1
            moments = {"R": a_NI.T @ a_NI / len(a_NI), "L": len(a_NI) * g_NO.T @ g_NO}
            for name, moment in moments.items():
                state[name] = self.decay * state[name] + (1 - self.decay) * moment if name in state else moment
            if "L_inverse" in state:
                self.direct(layer, state["L_inverse"], state["R_inverse"])
            if step % self.every == 0:
                mean = {name: state[name].diagonal().mean() for name in "LR"}
                pi = (mean["R"] / mean["L"]).sqrt()
                for name, damping in (("L", self.damping**0.5 / pi), ("R", self.damping**0.5 * pi)):
                    damped = state[name] + damping * torch.eye(len(state[name]), dtype=pi.dtype)
                    state[f"{name}_inverse"] = torch.cholesky_inverse(torch.linalg.cholesky(damped))


class HookedMKOR(Hooked):
    """The equations of :meth:`mkor_fx.MKOR.published` (Mozaffari et al., 2023, arXiv 2306.01685, in their scale-free form):
    with ``v`` the mean of ``a``, or the sum of ``g``, brought to ``|v|^2 = kappa``, a factor from the identity takes
    ``B = gamma F + (1 - gamma) I``, ``F <- B - B v (B v)^T / (1 + v^T B v)``."""

    def __init__(self, model: nn.Module, gamma: float = 0.99, kappa: float = 10.0) -> None:
        super().__init__(model)
        self.gamma, self.kappa = gamma, kappa

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for layer in self.layers:
            a_NI, g_NO = self.rows.pop(layer)
            state = self.state[layer.weight]
            for name, v_D in (("L", g_NO.sum(0)), ("R", a_NI.mean(0))):
                factor_DD = state.get(name)
                if factor_DD is None:
                    factor_DD = state[name] = torch.eye(len(v_D), dtype=v_D.dtype)
                factor_DD.mul_(self.gamma).diagonal().add_(1 - self.gamma)
                u_D = factor_DD @ (v_D := v_D * (self.kappa**0.5 / v_D.norm()))
                factor_DD.addr_(u_D, u_D / -(1 + v_D @ u_D))
            self.direct(layer, state["L"], state["R"])
