"""Which rule a weight gets, what is accepted as a rule, and rules whose numbers change over time."""

import copy
import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch
from eva import Eva
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR, Rule
from mkor_fx.doors.rule_clock import RuleClock
from mkor_fx.rules import Rules, Sides
from mkor_fx.rules.hyper import Hyper


class Block(nn.Module):
    """Names as in a transformer: ``attn.query``, ``mlp``, ``head``."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"query": nn.Linear(6, 6), "key": nn.Linear(6, 6)})
        self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.mlp(torch.tanh(self.attn["query"](x) * self.attn["key"](x)))))


def block():
    torch.manual_seed(0)
    return Block()


def batches(count=3):
    return [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(count)]


def opened(door, model, rule, **options):
    """The compiled step or handle, and what trains it on a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if door == "compile_step":
        step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, backend="eager", **options)
        return step, step
    handle = mkor_fx.compile(model, rule, backend="eager", **options)

    def train(x, y):
        optimizer.zero_grad()
        functional.mse_loss(handle(x), y).backward()
        optimizer.step()

    return handle, train


def run(door, model, rule, data, **options):
    """The compiled step or handle, behind steps over ``data``."""
    done, train = opened(door, model, rule, **options)
    for x, y in data:
        train(x, y)
    return done


DOORS = pytest.mark.parametrize("door", ["compile_step", "compile"])


# ---- patterns -------------------------------------------------------------------------------------------------------------


@DOORS
def test_each_weight_gets_the_rule_of_the_first_pattern_that_matches(door):
    rules = {"attn.key.*": KFAC(derive_every=1), "attn.*": Eva(), "head.*": None, "*": MKOR.published()}
    model, data = block(), batches()
    done = run(door, model, rules, data)
    keys = {}
    for key in done.mkor.state_dict():
        weight, _, entry = key.rpartition(".")
        keys.setdefault(weight, set()).add(entry)
    assert keys.pop("") == {"step"}
    assert keys == {"attn.key.weight": {"L", "R", "L_inverse", "R_inverse", "seen"}, "attn.query.weight": {"a", "g"},
                    "mlp.weight": {"L", "R"}}  # fmt: skip
    assert done.coverage["head.weight"].declined.reason == "skipped by pattern 'head.*'"
    assert done.coverage["head.bias"].declined.reason == "skipped by pattern 'head.*'"
    assert done.coverage["attn.query.bias"].note == "the state of attn.query.weight"
    assert done.coverage["attn.key.bias"].note == "L_inverse of attn.key.weight"


@DOORS
def test_rules_beside_each_other_are_the_rules_alone(door):
    """A weight is trained as if its rule were everybody's: here the rest stands still."""
    for name, rule in {"attn.query": MKOR.published(factor_dtype=torch.float64), "mlp": KFAC(derive_every=2)}.items():
        data, models = batches(4), [block().double() for _ in range(2)]
        data = [(x.double(), y.double()) for x, y in data]
        for model in models:
            for parameter, p in model.named_parameters():
                p.requires_grad_(parameter.startswith(name))
        run(door, models[0], rule, data)
        both = {f"{name}.*": rule, "*": Eva()}
        run(door, models[1], both, data)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@DOORS
def test_a_pattern_and_skip_decline_alike(door):
    model = block()
    done = run(door, model, {"head.*": None, "*": MKOR.published()}, batches(1), skip=["mlp.*"])
    assert [done.coverage[name].declined.reason for name in ("head.weight", "mlp.weight")] == [
        "skipped by pattern 'head.*'", "skipped by pattern 'mlp.*'"]  # fmt: skip


@DOORS
def test_a_weight_that_no_pattern_names_is_declined_and_said_to_be(door):
    done = run(door, block(), {"attn.*": MKOR.published()}, batches(1))
    assert done.coverage["mlp.weight"].declined.reason == "no pattern of rule= names it"
    assert {key.rpartition(".")[0] for key in done.mkor.state_dict()} == {"attn.query.weight", "attn.key.weight", ""}


@DOORS
def test_a_bias_alone_can_be_left_out(door):
    model, data = block(), batches(1)
    raw = torch.autograd.grad(functional.mse_loss(model(data[0][0]), data[0][1]), model.mlp.bias)[0]
    before = model.mlp.bias.detach().clone()
    done = run(door, model, {"*.bias": None, "*": MKOR.published()}, data)
    torch.testing.assert_close(model.mlp.bias.detach(), before - 0.05 * raw)
    assert done.coverage["mlp.weight"].declined is None


def test_a_method_that_is_no_rule_says_why():
    """FOSI takes products with the Hessian. That torch cannot is held here as well: when it can, there is more to do."""
    for name, said in (("FOSI", r"has no attribute 'FOSI': FOSI \(arXiv"), ("SOPA", r"has no attribute 'SOPA'$")):
        assert not hasattr(mkor_fx, name)
        with pytest.raises(AttributeError, match=said):
            getattr(mkor_fx, name)
    FOSI = type("FOSI", (), {})
    for given in (FOSI, FOSI(), {"head.*": FOSI()}):
        with pytest.raises(ValueError, match=r"rule=.*: FOSI \(arXiv 2302\.08484\) finds eigenvectors"):
            mkor_fx.compile(block(), given, backend="eager")
    model, ((x, y),) = block(), batches(1)
    loss = functional.mse_loss(mkor_fx.compile(model, Eva(), backend="eager")(x), y)
    (slope,) = torch.autograd.grad(loss, [model.head.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(slope.square().sum(), [model.head.weight])


PATTERNS = {
    "no match": ({"attn.*": MKOR.published(), "encoder.*": Eva(), "*": MKOR.published()},
                 r"rule pattern 'encoder\.\*' matches no parameter\. Parameters: attn\.query\.weight, "),
    "shadowed": ({"*": MKOR.published(), "head.*": None}, r"'head\.\*' matches only what earlier patterns take: move it up"),
    "no pattern": ({0: MKOR.published()}, r"rule=\{0: \.\.\.\}: keys are patterns"),
    "empty": ({}, r"rule=\{\}: names no weight; use rule=None"),
    "no rule": ({"*": "mkor"}, r"rule='mkor' for '\*': must be an update rule"),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("look", ["compile_step", "compile", "explain"])
def test_bad_patterns(case, look):
    rules, message = PATTERNS[case]
    model = block()
    with pytest.raises(ValueError, match=message):
        if look == "explain":
            mkor_fx.explain(model, batches(1)[0][0], rule=rules)
        else:
            run(look, model, rules, [])


def test_explain_shows_patterns_too():
    report = mkor_fx.explain(block(), torch.randn(8, 6), rule={"head.*": None, "attn.*": Eva(), "*": MKOR.published()})
    assert report["head.weight"].declined.reason == "skipped by pattern 'head.*'"
    assert set(report["attn.key.weight"].factors) == {"a", "g"} and set(report["mlp.weight"].factors) == {"L", "R"}


def test_without_any_rule_compile_has_nothing_to_add():
    with pytest.raises(ValueError, match=r"rule=None: without a rule there is nothing to add; use torch\.compile\(model\)"):
        mkor_fx.compile(block(), None)


def test_patterns_follow_a_model_that_changes():
    """A new head under a name that no rule of a pattern has now is refused, before it trains."""
    model = block()
    step = run("compile_step", model, {"head.*": Eva(), "*": MKOR.published()}, batches(1))
    model.final, model.head = model.head, nn.Identity()
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter"):
        step(*batches(1)[0])


# ---- what is a rule -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain(Rule):
    """The least that a rule can be: an identity on the left."""

    def init(self, shape, device):
        return {"L": torch.eye(shape.O, device=device)}

    def summarize(self, shape, a_NI, g_NO):
        return (g_NO.sum(0),)

    def update(self, state, uses, grad, step):
        return state

    def sides(self, state):
        return Sides(state["L"], None)


@dataclass
class Thawed(Plain.__bases__[0]):
    init, summarize, update, sides = Plain.init, Plain.summarize, Plain.update, Plain.sides


@dataclass(frozen=True)
class Listed(Plain):
    ranks: list = dataclasses.field(default_factory=list)


class Bare(Rule):
    init, summarize, update, sides = Plain.init, Plain.summarize, Plain.update, Plain.sides


@dataclass(frozen=True)
class Aimless(Rule):
    init, summarize, update = Plain.init, Plain.summarize, Plain.update


@dataclass(frozen=True, kw_only=True)
class Twice(MKOR):
    def precondition(self, state, grad):
        return super().precondition(state, grad)


def option(**options):
    return dataclass(frozen=True)(type("Odd", (Plain,), options))()


BAD = {
    "not frozen": (Thawed, r"rule=Thawed: programs are made for a rule as it is.*@dataclass\(frozen=True\)"),
    "no dataclass": (Bare, r"rule=Bare: .*declare the class as @dataclass\(frozen=True\)"),
    "not hashable": (Listed, r"rule=.*Listed\(ranks=\[\]\) cannot be hashed \(unhashable type: 'list'\).*Use tuples"),
    "no direction": (Aimless, r"Aimless gives no direction: define sides\(state\) or precondition\(state, grad\)"),
    "two directions": (Twice, r"Twice\.precondition takes the place.*define one of both \(MKOR with beta2=0"),
    "applies": (lambda: option(applies="step"), r"Odd\.applies='step': must be one of 'gradient', 'update'"),
    "graft": (lambda: option(graft="norm"), r"Odd\.graft='norm': must be one of None, 'gradient', 'rms'"),
    "derive_every": (lambda: option(derive_every=0), r"Odd\.derive_every=0: must be an integer of at least 1"),
    "product_dtype": (lambda: option(product_dtype=torch.int8), r"Odd\.product_dtype=torch\.int8: must be a floating"),
}


@DOORS
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_rule_is_refused_before_anything_happens(case, door):
    make, message = BAD[case]
    model = block()
    with pytest.raises(ValueError, match=message):
        run(door, model, make(), [])
    with pytest.raises(ValueError, match=r"for 'mlp\.\*'|Odd|Aimless|Twice"):
        run(door, model, {"mlp.*": make(), "*": MKOR.published()}, [])


@DOORS
def test_a_simple_rule_pays_nothing(door):
    """No default leaves a trace in the programs: no moments, no size, no cast, and nothing of its own behind the step."""
    done = run(door, block(), Plain(), batches(2))
    graphs = done.graphs if door == "compile_step" else done.graphs.updates[0]
    counts = graphs.op_counts("rewrite")
    assert not any("rescale" in name or "graft" in name for name in counts)
    assert counts["mkor_fx.precondition.default"] == 8 and done.mkor.step == 2
    assert all(torch.equal(t, torch.eye(len(t))) for key, t in done.mkor.state_dict().items() if key != "step")


# ---- numbers that change --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Leaning(Rule):
    """``D = scale G``, of the step; refuses what is not positive."""

    scale: Hyper = 1.0
    once: float = 1.0

    def __post_init__(self):
        if not isinstance(self.scale, torch.Tensor) and not callable(self.scale) and not self.scale > 0:
            raise ValueError(f"Leaning(scale={self.scale!r}): must be positive")

    def init(self, shape, device):
        return {"seen": torch.zeros((), device=device)}

    def summarize(self, shape, a_NI, g_NO):
        return (g_NO.sum(0),)

    def update(self, state, uses, grad, step):
        return {"seen": state["seen"] + self.scale}

    def precondition(self, state, grad):
        return grad._replace(weight=grad.weight * self.scale, bias=None if grad.bias is None else grad.bias * self.scale)


def programs(done):
    return done.compilations if hasattr(done, "compilations") else len(done.graphs.updates) + len(done.graphs.captured)


@DOORS
@pytest.mark.parametrize("kind", ["function", "tensor", "number"])
def test_hyper_parameters_change_over_time_and_compile_nothing_again(kind, door):
    values = [0.5, 2.0, 0.25, 1.5] if kind != "number" else [2.0] * 4
    box = torch.tensor(values[0])
    rule = Leaning(scale={"function": lambda step: values[step], "tensor": box, "number": 2.0}[kind])
    model = nn.Linear(6, 4)
    twin, data = copy.deepcopy(model), batches(4)
    done, train = opened(door, model, rule)
    made = []
    for number, (x, y) in enumerate(data):
        box.fill_(values[number])
        train(x, y)
        made.append(programs(done))
        grads = torch.autograd.grad(functional.mse_loss(twin(x), y), list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p -= 0.05 * values[number] * g
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert made == [made[0]] * 4
    assert float(done.mkor.state_dict()["weight.seen"]) == pytest.approx(sum(values))


@DOORS
@pytest.mark.parametrize(("gives", "message"), [
    (lambda step: "much", r"Leaning\(scale=.*gives 'much' at step 1, which must be a number"),
    (lambda step: torch.ones(2), r"Leaning\(scale=.*at step 1, which must be a number"),
    (lambda step: -1.0, r"Leaning\(scale=-1\.0\): must be positive"),
])  # fmt: skip
def test_a_function_that_gives_no_number_is_an_error_of_that_step_and_changes_nothing(gives, message, door):
    rule = Leaning(scale=lambda step: gives(step) if step else 1.0)
    model, data = nn.Linear(6, 4), batches(2)
    done, train = opened(door, model, rule)
    train(*data[0])
    before = [p.detach().clone() for p in model.parameters()], done.mkor.state_dict()
    with pytest.raises(ValueError, match=message):
        train(*data[1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True))
    assert all(torch.equal(t, before[1][key]) for key, t in done.mkor.state_dict().items())


def test_a_tensor_is_not_read_on_the_host_at_a_step(monkeypatch):
    clock = RuleClock(Rules.of(Leaning(scale=torch.tensor(0.5))))
    for read in ("__float__", "__bool__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, read, lambda self: pytest.fail("a tensor was read"))
    packed = clock.numbers(0, torch.device("cpu"))
    monkeypatch.undo()
    assert packed.tolist() == [0.5]


@DOORS
def test_mkors_own_numbers_may_change(door):
    box = torch.tensor(0.99, dtype=torch.float64)
    plain = MKOR.published(factor_dtype=torch.float64)
    timed = MKOR.published(gamma=lambda step: 0.99, kappa=10.0, factor_dtype=torch.float64)
    held = dataclasses.replace(plain, gamma=box)
    data = [(x.double(), y.double()) for x, y in batches()]
    found = []
    for rule in (plain, timed, held):
        model = block().double()
        run(door, model, rule, data)
        found.append([p.detach() for p in model.parameters()])
    for other in found[1:]:
        for p, q in zip(found[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_kfac_says_what_is_wrong_with_its_options():
    for options, message in {
        "damping": ({"damping": 0.0}, r"KFAC(damping=0.0): must be positive"),
        "decay": ({"decay": 1.0}, r"KFAC(decay=1.0): the weight of the old average must lie in [0, 1)"),
        "max_factor": ({"max_factor": -1}, r"KFAC(max_factor=-1): must be an integer, 0 (no factors) or more"),
        "damping's kind": ({"damping": "1e-3"}, r"KFAC(damping='1e-3'): must be a number, a 0-dim tensor, or a function"),
    }.values():
        with pytest.raises(ValueError, match=re.escape(message)):
            KFAC(**options)


# ---- code of a rule that cannot be compiled ------------------------------------------------------------------------------


class Written(MKOR):
    """MKOR whose refresh is what a test says."""

    def update(self, state, uses, grad, step):
        return {key: t * type(self).number(uses[0].rows) for key, t in super().update(state, uses, grad, step).items()}


HOST = {
    "item": (lambda rows: rows.item() * 1.0, "reads a value on the host"),
    "float": (lambda rows: 1.0 / float(rows), "reads a value on the host"),
    "if": (lambda rows: 1.0 if rows > 3 else 2.0, r"reads a value on the host \(item\(\), float\(\), bool\(\), or an if"),
    "constant": (lambda rows: torch.tensor([1.0, 2.0]).mean(), r"holds a tensor of its own.*x\.new_full\(size, value\)"),
}


@DOORS
@pytest.mark.parametrize("case", HOST)
def test_a_rule_that_waits_for_the_device_is_refused_where_it_does(case, door):
    number, message = HOST[case]
    rule = type("Waits", (Written,), {"number": staticmethod(number)})()
    model = block()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"attn\.query\.weight: .*{message}"):
        run(door, model, rule, batches(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
