"""Each matched weight gets the rule that its name asks for."""

from __future__ import annotations

from dataclasses import replace

import torch

from ... import reasons
from ...ir import Decline, Site, StepGraph, source_line
from ...rules import Rule, Rules, Shape
from ..core import graph_pass
from .layout import Layout
from .uses import together


@graph_pass(stage="match", exact=True)
def assign_rules(step: StepGraph, *, rules: Rules) -> None:
    """Give every site its rule. A weight that no pattern names, for which its rule keeps no state, or whose rows a rule that
    gathers would find in several sums, is declined with its bias; so is a bias that the rule leaves alone. A bias goes with
    its weight."""
    for index, site in list(step.sites.items()):
        entry = rules.match(site.parameter.name)
        rule = None if entry is None else entry[1]
        if rule is None:
            _decline(step, index, Decline(reasons.NO_PATTERN))
            continue
        site.rule = rule
        shape = Layout.of(site).shape
        _check_state(step, index, site, rule, shape)


def _check_state(step: StepGraph, index: int, site: Site, rule: Rule, shape: Shape) -> None:
    name, weight, bias = type(rule).__name__, site.parameter.name, site.bias
    if not rule.at_first_step.init(shape, torch.device("meta")):
        why = rule.without_state(shape)
        reason = reasons.NO_STATE.format(rule=name, O=shape.O, I=shape.I, why=f": {why}" if why else "")
        _decline(step, index, Decline(reason, str(site.taps[0].node.target)))
    elif rule.gathers is not None and len(together(site.taps)) > len(site.kinds):
        _decline(step, index, Decline(reasons.GATHERED_TWICE.format(rule=name), str(site.taps[0].node.target)))
    elif bias is not None and not (rule.preconditions_bias(shape) and _has_a_direction(site, rule)):
        site.bias = None
        step.declines[bias.index] = Decline(reasons.BIAS_ALONE.format(rule=name, weight=weight), source=_line(site))


def _decline(step: StepGraph, index: int, decline: Decline) -> None:
    site = step.sites.pop(index)
    step.declines[index] = replace(decline, source=_line(site))
    if site.bias is not None:
        reason = reasons.WEIGHT_DECLINED.format(weight=site.parameter.name)
        step.declines[site.bias.index] = Decline(reason, source=_line(site))


def _line(site: Site) -> str:
    """Where it is used first."""
    return next(filter(None, (source_line(tap.node) for tap in site.taps)), "")


def _has_a_direction(site: Site, rule: Rule) -> bool:
    """Whether a rule makes anything of a bias: of one with a right side alone there is nothing to multiply it by."""
    own = rule.joint_bias or rule.overrides("precondition") or rule.overrides("moment")
    return own or Layout.of(site).sides[0] is not None
