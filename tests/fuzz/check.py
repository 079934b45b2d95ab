"""The property: a compiled program and the recorded reference agree on everything, or a parameter is declined."""

from __future__ import annotations

import copy
import logging
import traceback
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from joint import capture, rows
from torch import Tensor

import mkor_fx
from mkor_fx import MKOR

from .program import Plan, Program, build, draw
from .recorded import Failure, Recorded, close
from .tape import Use, recording

#: kinds of uses that the op table knows; a weight all of whose uses are among them should become a site
SUPPORTED = {
    "linear", "product", "einsum", "heads", "experts", "broadcast", "stack", "slice", "cell", "embedding", "index",
    "lora", "symmetric", "derived",
    *(f"conv{t}{n}d{g}" for t in ("", "-transpose") for n in (1, 2, 3) for g in ("", "-grouped")),
}  # fmt: skip
LEARNING_RATE = 0.05

LIBRARY = Path(mkor_fx.__file__).resolve().parents[1]

logging.getLogger("torch").setLevel(logging.CRITICAL)  # a failure carries its own traceback


@dataclass
class Outcome:
    """What one seed has shown. ``failure`` is empty where everything holds."""

    plan: Plan
    program: str = ""
    failure: str = ""
    detail: str = ""
    supported: dict[str, str] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)
    missed: dict[str, str] = field(default_factory=dict)
    refused: str = ""


def loss_fn(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean() + 0.1 * y.sin().sum()


class Compiled:
    """Either door behind one call: ``train(x, y) -> loss``."""

    def __init__(self, plan: Plan, model: Program, rule: MKOR, backend: str) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        options = {"refresh_every": plan.refresh_every, "backend": backend, "dynamic": plan.dynamic}
        self.whole = plan.door == "step"
        if self.whole:
            self.handle = mkor_fx.compile_step(model, loss_fn, self.optimizer, rule, **options)
        else:
            self.handle = mkor_fx.compile(model, rule, **options)

    def train(self, x: Tensor, y: Tensor) -> Tensor:
        if self.whole:
            return self.handle(x, y)
        self.optimizer.zero_grad()
        loss = loss_fn(self.handle(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def check(plan: Plan, backend: str = "eager") -> Outcome:
    """Runs one plan; what is wrong is returned, not raised."""
    outcome = Outcome(plan)
    torch._dynamo.reset()
    try:
        model, batches = build(plan)
        outcome.program = repr(model.chain)
        try:
            _agree(plan, model, batches, outcome, backend)
        except Doubtful:
            torch._dynamo.reset()
            _agree(replace(plan, rule={**plan.rule, "form": "forgetful"}), model, batches, outcome, backend)
        if not outcome.refused:
            _identity(plan, model, batches[0][0])
    except Failure as failure:
        outcome.failure, outcome.detail = failure.args
    except Exception as error:
        if isinstance(error, ValueError) and Path(
            traceback.extract_tb(error.__traceback__)[-1].filename
        ).is_relative_to(LIBRARY):
            outcome.refused = str(error)
            return outcome
        message = next((line for line in str(error).splitlines() if line.strip() and "raised:" not in line), "")
        outcome.failure = f"crash: {type(error).__name__}: {message[:90]}"
        outcome.detail = traceback.format_exc()
    return outcome


def _agree(plan: Plan, model: Program, batches: list, outcome: Outcome, backend: str) -> None:
    """Loss, outputs, parameters, buffers and factors, step by step."""
    tolerance = 0.1 if plan.autocast else 1e-7
    rule = MKOR.published(**{**plan.rule, **({"form": "forgetful"} if plan.autocast else {})}, factor_dtype=torch.float64)
    own, twin = copy.deepcopy(model), copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=LEARNING_RATE)
    reference = Recorded(twin, other, rule, plan.refresh_every, tolerance)
    try:
        tape, loss = _eager(twin, *batches[0])
    except RuntimeError as error:  # autograd does not allow this program
        outcome.refused = str(error)
        return
    if not loss.requires_grad:
        return
    _rows_make_the_gradient(tape, 1e-2 if plan.autocast else 1e-9)
    outcome.supported = _supported(tape, twin)
    compiled = Compiled(plan, own, rule, backend)
    for i, (x, y) in enumerate(batches):
        if i:
            tape, loss = _eager(twin, x, y)
        before = {name: p.detach().clone() for name, p in own.named_parameters()}
        value = compiled.train(x.clone(), y)
        close("loss", value.double(), loss.detach().double(), tolerance)
        coverage = compiled.handle.coverage
        outcome.sites = {entry.name for entry in coverage.covered if not entry.bias_of}
        outcome.missed = {e.name: str(e.declined) for e in coverage.declined if e.name in outcome.supported}
        reference.take(tape, coverage)
        if reference.doubtful and plan.rule["form"] == "scale_free":
            raise Doubtful
        for (name, p), q in zip(own.named_parameters(), twin.named_parameters(), strict=True):
            q = q[1]
            expected = torch.zeros_like(q) if q.grad is None or not q.requires_grad else q.grad
            role = (
                "site"
                if name in outcome.sites
                else "bias"
                if name in {e.name for e in coverage.covered}
                else "declined"
            )
            moved = (before[name] - p.detach()) / LEARNING_RATE
            close(
                f"direction of a {role}: {_kinds(tape, q)}",
                moved,
                expected,
                tolerance,
                1e-9 if not plan.autocast else 1e-3 + reference.noise.get(name, 0),
            )
        if not plan.autocast:
            state = compiled.handle.mkor.state_dict()
            own_keys = {key for key in state if key.rpartition(".")[0]}
            if own_keys != reference.state.keys():
                raise Failure("factors kept", f"{sorted(state)}, expected {sorted(reference.state)}")
            for key, factor in reference.state.items():
                owner = next(q for n, q in twin.named_parameters() if n == key.rpartition(".")[0])
                close(f"factor: {_kinds(tape, owner)}", state[key].reshape(factor.shape), factor, tolerance)
            for b, c in zip(own.buffers(), twin.buffers(), strict=True):
                close("buffer", b.double(), c.double(), tolerance)
        other.step()
        other.zero_grad()
        with torch.no_grad():
            for p, q in zip(own.parameters(), twin.parameters(), strict=True):
                q.copy_(p)


class Doubtful(Exception):
    """A statistic is zero but for rounding: the default form cannot be compared."""


def _eager(twin: Program, x: Tensor, y: Tensor) -> tuple[list[Use], Tensor]:
    with recording() as tape:
        loss = loss_fn(twin(x.clone()), y)
        if loss.requires_grad:
            loss.backward()
    return tape, loss


def _kinds(tape: list[Use], weight: Tensor) -> str:
    return ", ".join(sorted({use.kind for use in tape if use.weight is weight})) or "no product"


def _supported(tape: list[Use], twin: Program) -> dict[str, str]:
    kinds = defaultdict(set)
    for use in tape:
        kinds[use.weight].add(use.kind)
    names = {p: name for name, p in twin.named_parameters()}
    return {
        names[w]: ", ".join(sorted(k))
        for w, k in kinds.items()
        if w.requires_grad and w.grad is not None and k <= SUPPORTED
    }


def _rows_make_the_gradient(tape: list[Use], tolerance: float) -> None:
    """The reference is right: the rows that it has recorded multiply to autograd's gradient."""
    weights = {use.weight: [u for u in tape if u.weight is use.weight] for use in tape}
    for weight, uses in weights.items():
        if weight.grad is None or not all(use.exact and use.matrix for use in uses):
            continue
        total = torch.zeros_like(weight.grad)
        for use in uses:
            product = use.g.mT.to(weight.dtype) @ use.a.to(weight.dtype)
            total += use.matrix.back(product.mT if use.inputs == "first" else product, weight.shape)
        close(f"the reference's own rows: {uses[0].kind}", total, weight.grad, tolerance, tolerance)


def _identity(plan: Plan, model: Program, x: Tensor) -> None:
    """Every site of every captured graph: the rows of its taps multiply to its gradient in that graph."""
    torch._dynamo.reset()
    for joint in capture(model, x.clone()):
        env = joint.run()
        for site in joint.step.sites.values():
            if site.parametrized:
                continue
            total = 0
            for tap in site.taps:
                first, last = rows(env, tap.rows_first), rows(env, tap.rows_last)
                total = total + first.mT.double() @ last.double()
            grad = env[site.parameter.grad]
            tolerance = 2e-2 if plan.autocast else 1e-9
            close(
                f"identity: {'+'.join(t.op for t in site.taps)}",
                site.view.store(total, grad.shape),
                grad.double(),
                tolerance,
                1e-12,
            )


def shrink(outcome: Outcome, attempts: int = 30) -> Outcome:
    """The smallest program found that fails in the same way."""
    again = True
    while again and attempts > 0:
        again = False
        for plan in outcome.plan.smaller():
            attempts -= 1
            smaller = check(plan)
            if smaller.failure == outcome.failure:
                outcome, again = smaller, True
                break
            if attempts <= 0:
                break
    return outcome


def outcome_of(seed: int, smallest: bool) -> tuple[Outcome, str]:
    """What a seed has shown, and the text of its failure: of the smallest program found that fails alike."""
    outcome = check(draw(seed))
    if not outcome.failure:
        return outcome, ""
    least = shrink(outcome) if smallest else outcome
    kept = ("door", "shape", "sizes", "autocast", "frozen", "refresh_every", "dynamic", "rule")
    plan = {name: getattr(least.plan, name) for name in kept}
    return outcome, "\n".join([least.detail.strip()[-1500:], least.program, str(plan)])
