"""MKOR's options, and what they are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Rule
from .direction import Graft
from .hyper import Hyper, number

PUBLISHED = ("scale_free", "forgetful", "exact", "paper")
FORMS = ("damped", *PUBLISHED)
#: what None stands for, in the damped form and in the published ones
DAMPED_DEFAULTS = {"statistic": "rows", "rank": 8, "momentum": 0.9, "gamma": 0.95, "kappa": 3.0, "bias": "off"}
PUBLISHED_DEFAULTS = {"statistic": "mean", "rank": 1, "momentum": 0.0, "gamma": 0.99, "kappa": 10.0, "bias": "left"}
STATISTICS = ("mean", "rows", "gradient")
BIASES = ("left", "joint", "off")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class MKOROptions(Rule):
    """The fields of :class:`MKOR`, which says what they are. None stands for what is usual for the form.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    form: Literal["damped", "scale_free", "forgetful", "exact", "paper"] = "damped"
    statistic: str | None = None
    rank: int | None = None
    momentum: float | None = None
    nesterov: bool = True
    beta2: float | None = None
    gamma: Hyper = None  # type: ignore[assignment]
    kappa: Hyper = None  # type: ignore[assignment]
    epsilon: Hyper | None = None
    zeta: Hyper | None = None
    rescale: bool = True
    bias: Literal["left", "joint", "off"] | None = None
    clamp: Hyper | None = None
    max_factor: int = 4096
    factor_dtype: torch.dtype = torch.float32
    product_dtype: torch.dtype | Literal["fast"] | None = "fast"

    def __post_init__(self) -> None:
        usual: dict[str, Any] = DAMPED_DEFAULTS if self.form == "damped" else PUBLISHED_DEFAULTS
        for name, default in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.beta2 is None:
            object.__setattr__(self, "beta2", 0.95 if self.form == "damped" and self.momentum else 0.0)
        if self.product_dtype == "fast" and self.form != "damped":
            object.__setattr__(self, "product_dtype", None)
        for name, allowed in (("form", FORMS), ("bias", BIASES), ("factor_dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"MKOR({name}={getattr(self, name)!r}): must be one of {', '.join(map(str, allowed))}")
        self._check_statistics()
        for name in ("momentum", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"MKOR({name}={value!r}): must be a number in [0, 1), e.g. 0.95")
        if self.beta2 and (self.joint_bias or not self.keeps_momentum):
            raise ValueError(
                f"MKOR(beta2={self.beta2!r}): divides what becomes of a momentum, of one matrix; it needs momentum > 0 and "
                "a bias of its own"
            )
        given = {name: getattr(self, name) for name in ("gamma", "kappa", "epsilon", "zeta", "clamp")}
        first = {name: number(value, f"MKOR({name}=") for name, value in given.items() if value is not None}
        gamma, zeta = first.get("gamma", math.nan), first.get("zeta")
        if not 0 < gamma < 1:
            raise ValueError(f"MKOR(gamma={self.gamma!r}): the factor momentum must lie inside (0, 1), e.g. 0.99")
        if zeta is not None and not 0 <= zeta < gamma:
            raise ValueError(
                f"MKOR(zeta={self.zeta!r}): the stabiliser needs 0 <= zeta < gamma={self.gamma}, "
                "or it cannot outrun the growth of unseen directions; lower zeta or raise gamma"
            )
        for name in ("kappa", "epsilon", "clamp"):
            if name in first and not first[name] > 0:
                raise ValueError(f"MKOR({name}={given[name]!r}): must be positive")
        if math.isinf(first["kappa"]):
            raise ValueError(f"MKOR(kappa={self.kappa!r}): must be a positive, finite number, e.g. 3.0")
        if not isinstance(self.max_factor, int) or self.max_factor < 0:
            raise ValueError(f"MKOR(max_factor={self.max_factor!r}): must be an integer, 0 (no factors) or more")

    def _check_statistics(self) -> None:
        damped = self.form == "damped"
        allowed = STATISTICS if damped else ("mean", "gradient")
        if not isinstance(self.statistic, str) or not self.statistics <= {*allowed}:
            raise ValueError(
                f"MKOR(statistic={self.statistic!r}): must be one of {', '.join(allowed)} with form={self.form!r}, or a sum "
                "of them such as 'mean+gradient'"
            )
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1 or not (damped or self.rank == 1):
            most = "an integer of at least 1" if damped else f"1 with form={self.form!r}"
            raise ValueError(f"MKOR(rank={self.rank!r}): must be {most}, sketches a side and step")
        unused = {"epsilon": self.epsilon, "zeta": self.zeta, "bias='joint'": self.bias == "joint" or None}
        for name, value in unused.items() if damped else ():
            if value is not None:
                raise ValueError(f"MKOR({name}): has no meaning for form='damped'; it belongs to MKOR.published()")

    @property
    def statistics(self) -> set[str]:
        """The terms of ``statistic``."""
        return {*(self.statistic or "").split("+")}

    @property
    def reads_gradient(self) -> bool:  # type: ignore[override]
        return "gradient" in self.statistics

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return "rows" in self.statistics

    @property
    def applies(self) -> Literal["gradient", "update"]:  # type: ignore[override]
        return "update" if self.keeps_momentum else "gradient"

    @property
    def keeps_momentum(self) -> bool:
        return isinstance(self.momentum, Tensor) or bool(self.momentum)

    @property
    def follows_optimizer(self) -> bool:  # type: ignore[override]
        return self.keeps_momentum

    @property
    def graft(self) -> Graft | None:  # type: ignore[override]
        if self.keeps_momentum:
            return "rms"
        return "gradient" if self.rescale else None

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        return self.bias == "joint"

    @property
    def blind_to_scale(self) -> bool:
        """Whether statistics are brought to one length: then those that are rounding have to be told from the others."""
        return self.form in ("damped", "scale_free")

    @property
    def stabiliser_threshold(self) -> Any:
        if self.epsilon is not None:
            return self.epsilon
        return 1000.0 if self.form in ("exact", "paper") else math.inf

    @property
    def pull(self) -> Any:
        """``zeta``, or what None stands for."""
        return self.gamma / 2 if self.zeta is None else self.zeta

    def probes(self, size: int) -> int:
        """Unit vectors a step in the place of the identity, of a side so wide: a coordinate decays by about 1/e between two
        visits; of a gamma that changes as if it were 0.95."""
        return min(size, max(8, math.ceil((0.05 if isinstance(self.gamma, Tensor) else 1 - self.gamma) * size)))
