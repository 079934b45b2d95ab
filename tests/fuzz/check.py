"""The property: a compiled program and the recorded reference agree on everything, or a parameter is declined."""

from __future__ import annotations

import copy
import itertools
import logging
import traceback
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from joint import capture, rows
from reference import Reference
from torch import Tensor

import mkor_fx
from mkor_fx import MKOR

from .program import Plan, Program, build, draw
from .tape import Use, recording

#: kinds of uses that the op table knows; a weight all of whose uses are among them should become a site
SUPPORTED = {
    "linear", "product", "einsum", "heads", "experts", "broadcast", "stack", "slice", "cell", "embedding", "index",
    "lora", "symmetric", "derived",
    *(f"conv{t}{n}d{g}" for t in ("", "-transpose") for n in (1, 2, 3) for g in ("", "-grouped")),
}  # fmt: skip
#: batches of products in one operation, whose rows may be routed: those without a gradient take no part
ROUTED = {"experts", "broadcast", "einsum-of-one"}
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


class Failure(Exception):
    """``args``: what failed (kept while a program is made smaller), and the numbers."""


class Recorded(Reference):
    """The eager reference over recorded rows: the equations of ``Reference``, no hooks on modules."""

    def __init__(self, model, optimizer, rule, refresh_every, tolerance):
        super().__init__(
            torch.nn.Module(), optimizer, form=rule.form, statistic=rule.statistic, gamma=rule.gamma, kappa=rule.kappa,
            epsilon=rule.stabiliser_threshold, zeta=rule.pull, rescale=rule.rescale, bias=rule.bias, clamp=rule.clamp,
            max_factor=rule.max_factor, factor_dtype=rule.factor_dtype, refresh_every=refresh_every,
        )  # fmt: skip
        self.names = {p: name for name, p in model.named_parameters()}
        self.math, self.doubtful, self.tolerance = torch.float64, False, tolerance

    def unless_noise(self, v, rows):
        """Sums that rounding may decide are not for comparing."""
        self.doubtful |= self.form == "scale_free" and bool(0 < v.norm() < 1e-6 * rows.norm())
        return super().unless_noise(v, rows)

    @torch.no_grad()
    def take(self, tape: list[Use], coverage) -> None:
        """One step: statistics off the tape, factors of what ``coverage`` says is a site, directions into ``.grad``."""
        uses = defaultdict(list)
        for use in tape:
            uses[use.weight].append(use)
        biases = {entry.bias_of: entry.name for entry in coverage.covered if entry.bias_of}
        params = {name: p for p, name in self.names.items()}
        for entry in coverage.covered:
            if not entry.bias_of:
                bias = params[biases[entry.name]] if entry.name in biases else None
                self.site(entry.name, params[entry.name], bias, uses[params[entry.name]])
        self.steps += 1

    def site(self, name: str, W: Tensor, b: Tensor | None, uses: list[Use]) -> None:
        if W.grad is None:
            return
        if not uses or any(use.matrix is None for use in uses):
            raise Failure("a site that is no product", name)
        (matrix, *others) = {use.matrix for use in uses}
        if others:
            raise Failure("a site whose uses are different matrices", f"{name}: {[matrix, *others]}")
        flip = all(use.inputs == "first" for use in uses)
        G = matrix.of(W.grad).to(self.math)
        G = G[0] if len(G) == 1 and G.dim() == 3 else G  # a batch of one
        self.doubtful |= self.form == "scale_free" and bool(G.norm() < 1e-9)
        G = G.mT if flip else G
        joint = b is not None and self.bias == "joint"
        base = [use for use in uses if (use.inputs == "first") == flip]
        if b is not None:
            sums = [use.g.double().sum(-2).reshape(b.shape) for use in base]
            some = [sum(chosen) for n in range(len(sums), 0, -1) for chosen in itertools.combinations(sums, n)]
            total = min(some[:4000], key=lambda total: (total - b.grad.double()).norm())
            close(f"bias of {name} is no row sum of g", b.grad.double(), total, self.tolerance)
            if joint:
                G = torch.cat([G, b.grad.reshape(*G.shape[:-1], 1).to(self.math)], -1)
        members = range(G.shape[0]) if G.dim() == 3 else [None]
        sides = {f"{name}.{s}": n for s, n in zip("LR", G.shape[-2:]) if n <= self.max_factor}
        if all(use.kind in ("embedding", "index") for use in uses):
            sides.pop(f"{name}.R", None)
        for key, n in sides.items():
            eye = torch.eye(n, dtype=self.factor_dtype)
            self.state.setdefault(key, eye if G.dim() == 2 else eye.expand(len(G), n, n).clone())
        directions, bias_directions = [], []
        for e in members:
            one = G if e is None else G[e]
            self.rows = self.rows_of(uses, flip, e)
            factors = []
            pairs = list(zip(*self.vectors("w", one), strict=True))
            for key, vs, n in zip((f"{name}.L", f"{name}.R"), pairs, one.shape):
                if key not in self.state:
                    factors.append(torch.eye(n, dtype=self.math))
                    continue
                at = self.state[key] if e is None else self.state[key][e]
                if self.steps % self.refresh_every == 0:
                    at.copy_(self.refreshed(at.to(self.math), vs))
                factors.append(at.to(self.math))
            D = self.rescaled(factors[0] @ one @ factors[1], one)
            directions.append(D[:, :-1] if joint else D)
            if b is not None:
                g = b.grad.reshape(-1, len(D))[e or 0].to(self.math)
                bias_directions.append(D[:, -1] if joint else self.rescaled(factors[0] @ g, g))
        D = directions[0] if G.dim() == 2 else torch.stack(directions)
        W.grad.copy_(matrix.back(D.mT if flip else D, W.shape))
        if b is not None:
            b.grad.copy_(torch.stack(bias_directions).reshape(b.shape))

    def rows_of(self, uses, flip, e):
        """As ``Reference.vectors`` wants them; it calls uses in the opposite orientation embeddings."""
        found = {}
        for use in uses:
            if use.kind in ROUTED and use.g.dim() == 3 and len(use.g) > 1:
                live = (use.g[e] != 0).any(-1)
                pair = [r[e][live].to(self.math).clamp(-self.clamp, self.clamp) for r in (use.a, use.g)]
                found.setdefault(("w", (use.inputs == "first") != flip), []).append(pair)
                continue
            pair = [
                (r if r.dim() == 2 else r[e or 0]).to(self.math).clamp(-self.clamp, self.clamp) for r in (use.a, use.g)
            ]
            found.setdefault(("w", (use.inputs == "first") != flip), []).append(pair)
        return found


def close(what: str, value: Tensor, expected: Tensor, relative: float = 1e-7, absolute: float = 1e-11) -> None:
    if value.shape != expected.shape:
        raise Failure(what, f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    error, bound = (value - expected).norm(), relative * expected.norm() + absolute
    if not error <= bound:
        raise Failure(what, f"off by {error:.3g} of {expected.norm():.3g}")


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
    rule = MKOR(**{**plan.rule, **({"form": "forgetful"} if plan.autocast else {})}, factor_dtype=torch.float64)
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
                1e-9 if not plan.autocast else 1e-3,
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


def check_seed(seed: int) -> Outcome:
    plan = draw(seed)
    return check(plan)


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
