"""MKOR-H: second-order steps for as long as they pay (Mozaffari et al., 2023, arXiv 2306.01685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Rule
from .hyper import number

#: the rate that Adam and its relatives take where a rule has steps of their size, over that of the rule
ADAM_FOR_RULE = 0.25


@dataclass(frozen=True)
class Hybrid:
    """A rule that gives way to the base optimizer where the loss says that it no longer pays.

    The paper says that MKOR-H falls back when second-order updates no longer speed up the run, by the rate at which the loss
    falls, and gives no formula; its code has a switch that nobody sets. Here the two ways of stepping are compared by
    trials. Steps are looked at in windows of ``window``; with ``x_j`` the mean loss of window ``j`` and ``c`` what a step
    costs (1 by the rule, ``cost`` without), the gain of a window is

        ``rho_j = (x_{j-1} - x_j) / (window c)``

    A gain below ``threshold`` times the best since the last trial, ``patience`` windows running, starts a trial of the other
    way: one window is passed over, the mean gain of the next two is compared with that of the windows below the threshold.
    Away from the rule it has to be as large at least; back to it larger by ``hysteresis``, and positive. A trial that fails
    goes back, and the patience doubles, up to 64 windows; one that succeeds sets it back. Losses are noisy: the scatter
    within a window says how far its mean can be trusted, and what differs by less than two standard errors does not differ.
    Then the rule stays, unless its own gain cannot be told from none: a plateau is left where the trial is not worse. A loss
    that rises in steps without the rule ends a trial of them at once, and later starts one of the rule without patience. The
    device is waited for once a window.

    Steps without the rule are the base optimizer's: no statistics, no products; factors stay as they are. Where they are
    smaller (``rate``), they grow to that size over the window that is passed over, in which its averages are still of few
    gradients.

    Args:
        rule: what a door takes as ``rule``.
        window: steps, 2 or more; long enough that the loss falls by more in it than its mean is uncertain. A trial is three.
        threshold: of the best gain, in [0, 1).
        patience: windows, 1 or more.
        hysteresis: how much better the rule has to be to come back, 0 or more.
        cost: of a step of the base optimizer, over one with the rule, in (0, 1]; None: counted from the graphs' products
            when the first window ends; what a rule derives outside of the step is not counted, give a number for such
            ones. 1 compares what steps gain, whatever they cost.
        rate: of the base optimizer's steps on the rule's weights, over the learning rate of their group. None: 1/4 where the
            rule's steps are sized as Adam's, since the best rates of the two lie that far apart (``docs/measurements.md``),
            else 1.
        one_way: never come back.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    rule: Any
    window: int = 50
    threshold: float = 0.25
    patience: int = 2
    hysteresis: float = 0.2
    cost: float | None = None
    rate: float | None = None
    one_way: bool = False

    @property
    def about(self) -> str:
        """All but the rule."""
        return ", ".join(f"{name} {value}" for name, value in vars(self).items() if name != "rule")

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("patience", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Hybrid({name}={value!r}): must be an integer of at least {least}")
        if not 0 <= number(self.threshold, "Hybrid(threshold=") < 1:
            raise ValueError(f"Hybrid(threshold={self.threshold!r}): must lie in [0, 1), e.g. 0.25")
        if not number(self.hysteresis, "Hybrid(hysteresis=") >= 0:
            raise ValueError(f"Hybrid(hysteresis={self.hysteresis!r}): must not be negative, e.g. 0.2")
        if self.cost is not None and not 0 < number(self.cost, "Hybrid(cost=") <= 1:
            raise ValueError(f"Hybrid(cost={self.cost!r}): must lie in (0, 1], or be None to be counted")
        if self.rate is not None and not number(self.rate, "Hybrid(rate=") > 0:
            raise ValueError(f"Hybrid(rate={self.rate!r}): must be positive, or None for what suits the rule and optimizer")
        if not isinstance(self.one_way, bool):
            raise ValueError(f"Hybrid(one_way={self.one_way!r}): must be True or False")
        ruled = [*self.rule.values()] if isinstance(self.rule, Mapping) else [self.rule]
        if not any(isinstance(rule, Rule) for rule in ruled) or isinstance(self.rule, Hybrid):
            raise ValueError(f"Hybrid(rule={self.rule!r}): must be a rule, or a dict of them by pattern")
