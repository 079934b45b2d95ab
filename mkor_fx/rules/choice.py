"""Which rule a weight gets: one for all, or by pattern of its name; and what is accepted as a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..kinds import Kind
from .base import Rule
from .hybrid import Hybrid
from .hyper import describe_rule

#: what the doors take as ``rule``
RuleChoice = Rule | Mapping[str, Rule | None] | Hybrid | None

#: methods that cannot be rules, by their name, and why
NO_RULES = {
    "FOSI": (
        "FOSI (arXiv 2302.08484) finds eigenvectors of the whole loss's Hessian by products with it, but a rule sees rows "
        "and gradients of one weight, and a compiled backward cannot be differentiated again. For curvature inverted by "
        "products use mkor_fx.CGFAC(), for steps in eigenbases mkor_fx.EKFAC() or mkor_fx.SOAP()"
    )
}


@dataclass(frozen=True)
class Rules:
    """Rules by glob pattern of a weight's name, in order; the first pattern that matches decides. Empty: no rule at all."""

    entries: tuple[tuple[str, Rule | None], ...] = ()

    @classmethod
    def of(cls, choice: RuleChoice) -> Rules:
        """What a door was given: a rule for every weight, a dict of patterns, or None.

        Raises:
            ValueError: something in it is no rule, or a rule that cannot be compiled; names it and says what is missing.
        """
        if isinstance(choice, Hybrid):
            return cls.of(choice.rule)
        if choice is None:
            return cls()
        if not isinstance(choice, Mapping):
            check_rule(choice)
            return cls((("*", choice),))
        for pattern, rule in choice.items():
            if not isinstance(pattern, str):
                raise ValueError(f"rule={{{pattern!r}: ...}}: keys are patterns of parameter names, such as 'head.*'")
            if rule is not None:
                check_rule(rule, f" for {pattern!r}")
        if not choice:
            raise ValueError("rule={}: names no weight; use rule=None for the plain step, or {'*': mkor_fx.MKOR()}")
        return cls(tuple(choice.items()))

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __iter__(self) -> Iterator[Rule]:
        """The distinct rules in order."""
        return iter(dict.fromkeys(rule for _, rule in self.entries if rule is not None))

    def match(self, name: str) -> tuple[str, Rule | None] | None:
        """The first pattern that a name matches, with its rule (None: to be left alone); None if no pattern matches."""
        return next((entry for entry in self.entries if fnmatchcase(name, entry[0])), None)

    def check_names(self, names: Collection[str]) -> None:
        """Raises ValueError for a pattern that decides for no parameter."""
        if len(self.entries) == 1 and self.entries[0][0] == "*":
            return
        used = {entry[0] for name in names if (entry := self.match(name)) is not None}
        for pattern, _ in self.entries:
            if pattern not in used:
                earlier = any(fnmatchcase(name, pattern) for name in names)
                why = "matches only what earlier patterns take: move it up" if earlier else "matches no parameter"
                raise ValueError(f"rule pattern {pattern!r} {why}. Parameters: {first_of(names)}")

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {describe_rule(rule)}" for pattern, rule in self.entries) or "None"


def first_of(names: Collection[str], most: int = 8) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def check_rule(rule: object, where: str = "") -> None:
    """Hold a rule to what compiling it takes: frozen, hashable, complete.

    Raises:
        ValueError: it is not; says what to do.
    """
    if isinstance(rule, Hybrid):
        raise ValueError(f"rule{where} is a Hybrid, which decides for a whole model: put it around, as Hybrid({{...}})")
    if not isinstance(rule, Rule):
        given = f"the class {rule.__name__}, which needs its brackets" if isinstance(rule, type) else repr(rule)
        called = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
        why = NO_RULES.get(called.upper(), "must be an update rule such as mkor_fx.MKOR(), or None")
        raise ValueError(f"rule={given}{where}: {why}")
    name = type(rule).__name__
    if not dataclasses.is_dataclass(rule) or not rule.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(
            f"rule={name}{where}: programs are made for a rule as it is, so it must not change: declare the class as "
            "@dataclass(frozen=True), with its options as fields"
        )
    try:
        hash(rule)
    except TypeError as error:
        raise ValueError(
            f"rule={rule!r}{where} cannot be hashed ({error}): programs are kept by rule. Use tuples and numbers as "
            "options in the place of lists, dicts and sets"
        ) from None
    rule.at_first_step  # noqa: B018  which reads tensors: not while anything is traced
    loose = [field.name for field in dataclasses.fields(rule) if not field.compare]
    if loose:
        raise ValueError(
            f"{name}.{loose[0]}{where}: programs are kept by rule, and two rules that differ in it would be taken for one: "
            "declare the field without compare=False"
        )
    odd = [key for key, kind in rule.kinds.items() if not isinstance(kind, Kind)]
    if odd:
        raise ValueError(f"{name}.kinds[{odd[0]!r}]={rule.kinds[odd[0]]!r}: must be a mkor_fx.kinds.Kind")
    choices = {"applies": ("gradient", "update"), "graft": (None, "gradient", "rms")}
    for option, allowed in choices.items():
        if getattr(rule, option) not in allowed:
            raise ValueError(f"{name}.{option}={getattr(rule, option)!r}: must be one of {', '.join(map(repr, allowed))}")
    every, dtype = rule.derive_every, rule.product_dtype
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name}.derive_every={every!r}: must be an integer of at least 1, steps between two")
    if dtype not in (None, "fast") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"{name}.product_dtype={dtype!r}: must be a floating-point dtype, 'fast', or None for the gradient's"
        )
    if not rule.overrides("sides") and not rule.overrides("precondition"):
        raise ValueError(f"{name} gives no direction: define sides(state) or precondition(state, grad)")
    if rule.kl_clip is not None and rule.graft is not None:
        raise ValueError(
            f"{name}(kl_clip={rule.kl_clip!r}, graft={rule.graft!r}): either sizes directions, each by itself or all "
            "together: use graft=None with kl_clip"
        )
    if rule.overrides("normalize") and rule.overrides("precondition"):
        raise ValueError(
            f"{name}.precondition takes the place of the two sides and of normalize, whose state would stand still: define "
            "one of both (MKOR with beta2=0 does not normalize)"
        )
