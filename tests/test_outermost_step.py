"""Preconditioning belongs to the outermost step of an optimizer that holds the parameters: once, whoever wraps it, in
whichever thread, and also where it fails."""

import copy
import threading
import warnings

import processes
import pytest
import torch
from held_rules import Leading
from test_hooks import RULE, batch, close, pair
from test_lockstep import reference_for
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR


class Wrapper(torch.optim.Optimizer):
    """As many of them are written: the groups are the inner one's."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step() if closure is None else self.inner.step(closure)


class Lookahead(Wrapper):
    """Zhang et al., 2019: every ``every`` steps the slow weights take half of the way."""

    def __init__(self, inner, every=2):
        super().__init__(inner)
        self.every, self.count = every, 0
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        if self.count % self.every == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, [p for g in self.param_groups for p in g["params"]], strict=True):
                    slow += 0.5 * (p - slow)
                    p.copy_(slow)
        return loss


class Sam(Wrapper):
    """Foret et al., 2021: climbs along the raw gradient, takes the gradient there, and steps from where it was."""

    def climb(self):
        with torch.no_grad():
            self.climbed = [(p, 0.05 * p.grad / p.grad.norm()) for group in self.param_groups for p in group["params"]]
            for p, e in self.climbed:
                p.add_(e)
        self.zero_grad()

    def descend(self):
        with torch.no_grad():
            for p, e in self.climbed:
                p.sub_(e)
        self.inner.step()

    def step(self, closure):
        self.climb()
        with torch.enable_grad():
            closure()
        self.descend()


class Sub(torch.optim.SGD):
    """A subclass that does something around the step of its base class."""

    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class Decayed(Sub):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        return loss


class Twice(torch.optim.Optimizer):
    """Two optimizers over the same weights: both see the one direction."""

    def __init__(self, params):
        super().__init__(list(params), {"lr": 0.1})
        self.inner = [torch.optim.SGD(self.param_groups[0]["params"], lr=lr) for lr in (0.02, 0.03)]

    def step(self, closure=None):
        for inner in self.inner:
            inner.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


WRAPPERS = {
    "alone": sgd,
    "wrapper": lambda model: Wrapper(sgd(model)),
    "wrapper of a wrapper": lambda model: Wrapper(Wrapper(sgd(model))),
    "lookahead": lambda model: Lookahead(sgd(model)),
    "subclass": lambda model: Sub(model.parameters(), lr=0.1, momentum=0.9),
    "subclass of a subclass": lambda model: Decayed(model.parameters(), lr=0.1, momentum=0.9),
    "wrapper of a subclass": lambda model: Lookahead(Sub(model.parameters(), lr=0.1)),
    "two inside": lambda model: Twice(model.parameters()),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_whoever_wraps_it_directions_are_made_once(name):
    model, compiled, twin = pair(refresh_every=2)
    optimizer, other = WRAPPERS[name](model), WRAPPERS[name](twin)
    reference = reference_for(twin, RULE, other, refresh_every=2)
    for number in range(4):
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True))
        functional.cross_entropy(twin(x), y).backward()
        reference.step()
        close(model, twin)
        assert compiled.mkor.step == number + 1


@pytest.mark.parametrize("name", ["alone", "wrapper", "lookahead", "subclass"])
def test_a_closure_goes_through(name):
    model, compiled, twin = pair()
    optimizer, other = WRAPPERS[name](model), WRAPPERS[name](twin)
    reference = reference_for(twin, RULE, other)
    for _ in range(3):
        x, y = batch()

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = functional.cross_entropy(compiled(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        torch.testing.assert_close(loss, functional.cross_entropy(twin(x), y))
        functional.cross_entropy(twin(x), y).backward()
        reference.step()
        close(model, twin)


@pytest.mark.parametrize("closure", [False, True])
def test_sam_climbs_along_raw_gradients_and_steps_along_a_direction(closure):
    """As it is used: behind a backward, with a closure for the second one or by its two halves."""
    model, compiled, twin = pair()
    optimizer, other = Sam(torch.optim.SGD(model.parameters(), lr=0.1)), torch.optim.SGD(twin.parameters(), lr=0.1)
    reference = reference_for(twin, RULE, other)
    for number in range(3):
        x, y = batch()

        def backward(x=x, y=y):
            functional.cross_entropy(compiled(x), y).backward()

        backward()
        if closure:
            optimizer.step(backward)
        else:
            optimizer.climb()
            backward()
            optimizer.descend()
        optimizer.zero_grad()
        grads = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin.parameters()))
        climbs = [(p, 0.05 * g / g.norm()) for p, g in zip(twin.parameters(), grads, strict=True)]
        reference.rows.clear()
        for sign in (1, -1):
            with torch.no_grad():
                for p, e in climbs:
                    p.add_(sign * e)
            if sign == 1:
                functional.cross_entropy(twin(x), y).backward()
        reference.step()
        close(model, twin)
        assert compiled.mkor.step == number + 1


@pytest.mark.parametrize("name", ["wrapper", "subclass", "wrapper of a wrapper"])
def test_a_rule_that_steps_itself_steps_once(name):
    model, compiled, twin = pair(Leading())
    alone = mkor_fx.compile(twin, Leading(), backend="eager")
    optimizers = [(compiled, WRAPPERS[name](model)), (alone, sgd(twin))]
    for _ in range(4):
        x, y = batch()
        for handle, optimizer in optimizers:
            optimizer.zero_grad()
            functional.cross_entropy(handle(x), y).backward()
            optimizer.step()
        close(model, twin)


def test_what_stands_behind_the_inner_step_finds_weights_that_have_moved():
    """Lookahead averages what a rule that steps itself has made of them."""
    model, compiled, twin = pair(Leading())
    optimizer, other = Lookahead(sgd(model), every=1), sgd(twin)
    alone = mkor_fx.compile(twin, Leading(), backend="eager")
    for _ in range(3):
        before, (x, y) = [p.detach().clone() for p in twin.parameters()], batch()
        for handle, own in ((compiled, optimizer), (alone, other)):
            own.zero_grad()
            functional.cross_entropy(handle(x), y).backward()
            own.step()
        with torch.no_grad():
            for p, old in zip(twin.parameters(), before, strict=True):
                p.copy_((p + old) / 2)
        close(model, twin)


@pytest.mark.parametrize("rule", [RULE, Leading()], ids=["direction", "own step"])
@pytest.mark.parametrize("caught_inside", [False, True])
def test_a_step_that_raises_leaves_raw_gradients_and_the_next_one_is_whole(rule, caught_inside):
    class Fragile(torch.optim.SGD):
        fail = False

        @torch.no_grad()
        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory")
            return super().step(closure)

    class Patient(Wrapper):
        def step(self, closure=None):
            try:
                return self.inner.step()
            except RuntimeError:
                return None

    model, compiled, _ = pair(rule)
    inner = Fragile(model.parameters(), lr=0.1)
    optimizer = Patient(inner) if caught_inside else inner
    for inner.fail in (False, True, False, True, True, False):
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        raw, before = ([t.clone() for t in tensors] for tensors in
                       ([p.grad for p in model.parameters()], [p.detach() for p in model.parameters()]))  # fmt: skip
        if inner.fail and not caught_inside:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        else:
            optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True))
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        if rule is RULE:
            assert all(moved) == any(moved) == (not inner.fail)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_closure_that_raises_leaves_nothing_behind():
    model, compiled, twin = pair()
    optimizer, other = sgd(model), sgd(twin)
    reference = reference_for(twin, RULE, other)

    def broken():
        functional.cross_entropy(compiled(batch()[0]), batch()[1]).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    assert compiled.mkor.step == 0
    optimizer.zero_grad()
    x, y = batch()
    functional.cross_entropy(compiled(x), y).backward()
    optimizer.step()
    functional.cross_entropy(twin(x), y).backward()
    reference.step()
    close(model, twin)


def test_steps_in_other_threads():
    """Two models trained in two threads at once, and one whose step is taken in another thread than its backward."""
    found = {}

    def train(name, elsewhere):
        generator = torch.Generator().manual_seed(0)
        model = models[name]
        handle, optimizer = handles[name], sgd(model)
        for _ in range(4):
            x, y = torch.randn(12, 6, generator=generator, dtype=torch.float64), torch.arange(12) % 4
            optimizer.zero_grad()
            functional.cross_entropy(handle(x), y).backward()
            if elsewhere:
                thread = threading.Thread(target=optimizer.step)
                thread.start()
                thread.join()
            else:
                optimizer.step()
        found[name] = [p.detach().clone() for p in model.parameters()]

    model, _, _ = pair()
    models = {name: copy.deepcopy(model) for name in ("here", "elsewhere", "first", "second")}
    handles = {name: mkor_fx.compile(one, RULE, backend="eager") for name, one in models.items()}
    for handle in handles.values():  # compiled by one thread at a time
        functional.cross_entropy(handle(torch.randn(12, 6, dtype=torch.float64)), torch.arange(12) % 4).backward()
        handle.zero_grad()
    train("here", False)
    train("elsewhere", True)
    threads = [threading.Thread(target=train, args=(name, False)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("elsewhere", "first", "second"):
        for p, q in zip(found["here"], found[name], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def zero_optimizer(rank, size):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        handle = mkor_fx.compile(DistributedDataParallel(model), RULE, backend="eager")
        optimizer = (ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9) if sharded
                     else sgd(model))  # fmt: skip
        for number in range(3):
            generator = torch.Generator().manual_seed(10 * number + rank)
            x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            functional.cross_entropy(handle(x), torch.arange(12) % 4).backward()
            optimizer.step()
        found.append(([p.detach() for p in model.parameters()], handle.mkor.step))
    return found


def test_zero_on_two_ranks():
    for plain, sharded in processes.values(zero_optimizer, 2):
        assert plain[1] == sharded[1] == 3
        for p, q in zip(plain[0], sharded[0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_an_optimizer_over_a_part_inside_of_one_over_all():
    """The outer one's direction is what the inner one sees; nothing is preconditioned a second time."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, model):
            super().__init__(model.parameters(), {"lr": 0.1})
            self.parts = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]

        def step(self, closure=None):
            for part in self.parts:
                part.step()

    model, compiled, twin = pair()
    optimizer, other = Outer(model), torch.optim.SGD(twin.parameters(), lr=0.1)
    reference = reference_for(twin, RULE, other)
    for number in range(3):
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        functional.cross_entropy(twin(x), y).backward()
        reference.step()
        close(model, twin)
        assert compiled.mkor.step == number + 1


def test_a_wrapper_that_clears_gradients_itself_finds_them_cleared():
    class Clearing(Wrapper):
        def step(self, closure=None):
            self.inner.step()
            self.zero_grad()

    model, compiled, _ = pair()
    optimizer = Clearing(sgd(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3):
            x, y = batch()
            functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
            assert all(p.grad is None for p in model.parameters()) and compiled.mkor.step == number + 1


# ---- what a new step is ---------------------------------------------------------------------------------------------------


CLEARED = {
    "None": lambda model: model.zero_grad(set_to_none=True),
    "zero": lambda model: model.zero_grad(set_to_none=False),
    "new zeros": lambda model: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()],
}


@pytest.mark.parametrize("how", CLEARED)
def test_a_dropped_batch_leaves_nothing_however_gradients_are_cleared(how):
    def run(dropped):
        torch.manual_seed(0)
        model, compiled, _ = pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for number in range(3):
            if dropped and number:
                CLEARED[how](model)
                compiled(50 * torch.ones(12, 6, dtype=torch.float64)).square().mean().backward()
            CLEARED[how](model)
            x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
            functional.cross_entropy(compiled(x), torch.arange(12) % 4).backward()
            optimizer.step()
        return model

    close(run(True), run(False))


def test_gradients_that_are_kept_and_added_to_are_one_step():
    """Accumulation with ``set_to_none=False``, clipped and unscaled in place in between."""
    model, compiled, twin = pair()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    reference = reference_for(twin, RULE, other)
    for _ in range(3):
        batches = [batch(), batch()]
        optimizer.zero_grad(set_to_none=False)
        for x, y in batches:
            functional.cross_entropy(compiled(x), y).backward()
        for p in model.parameters():
            p.grad.mul_(0.5)
        optimizer.step()
        for x, y in batches:
            functional.cross_entropy(twin(x), y).backward()
        for p in twin.parameters():
            p.grad.mul_(0.5)
        reference.step()
        close(model, twin)


@pytest.mark.parametrize("how", CLEARED)
def test_in_the_backward_mode_a_step_ends_where_gradients_are_cleared(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    compiled = mkor_fx.compile(model, MKOR.published(), precondition="backward", backend="eager")
    for number in range(4):
        for _ in range(2):  # micro-batches are one step
            x, y = batch()
            functional.cross_entropy(compiled(x), y).backward()
        assert compiled.mkor.step == number + 1
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        CLEARED[how](model)
    assert compiled.mkor.state_dict()["step"] == 4


# ---- where things go wrong, or are cleared, inside of a step --------------------------------------------------------------


class Breaking(mkor_fx.KFAC):
    """Derives until it is told to fail."""

    def derive(self, state):
        if self.fails:
            raise RuntimeError("out of memory")
        return super().derive(state)


def test_an_error_behind_the_update_leaves_raw_gradients():
    rule = Breaking(derive_every=1)
    model, compiled, _ = pair(rule, torch.float32)
    optimizer = sgd(model)
    for number, Breaking.fails in enumerate((False, True, False)):
        x, y = batch(torch.float32)
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        raw = [p.grad.clone() for p in model.parameters()]
        if Breaking.fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        else:
            optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True))
        assert compiled.mkor.step == number + 1


def test_so_does_a_warning_that_is_an_error():
    model, compiled, _ = pair()
    head = nn.Linear(4, 2).double()
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    whole = mkor_fx.compile(nn.Sequential(model, head), RULE, backend="eager")  # of which only a part is called
    del compiled
    functional.cross_entropy(whole(batch()[0]), torch.arange(12) % 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    head(torch.randn(5, 4).double()).sum().backward()
    raw = head.weight.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"does not precondition 1\.weight"):
            optimizer.step()
    assert torch.equal(head.weight.grad, raw)


@pytest.mark.parametrize("rule", [RULE, Leading()], ids=["direction", "own step"])
def test_an_optimizer_that_clears_its_gradients_in_its_step_finds_them_cleared(rule):
    class Clearing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    model, compiled, _ = pair(rule)
    optimizer = Clearing(model.parameters(), lr=0.1)
    for _ in range(2):
        functional.cross_entropy(compiled(batch()[0]), batch()[1]).backward()
        optimizer.step()
        assert all(p.grad is None for p in model.parameters()) and "zero_grad" not in vars(optimizer)


# ---- weights and biases in several optimizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULE, Leading()], ids=["direction", "own step"])
@pytest.mark.parametrize("biases_first", [False, True])
def test_a_bias_that_is_stepped_apart_keeps_its_raw_gradient_and_is_named(rule, biases_first):
    model, compiled, _ = pair(rule)
    parts = [torch.optim.SGD([p for p in model.parameters() if p.dim() == dim], lr=0.1) for dim in (2, 1)]
    said = []
    for _ in range(3):
        model.zero_grad()
        x, y = batch()
        functional.cross_entropy(compiled(x), y).backward()
        before, raw = model[0].bias.detach().clone(), model[0].bias.grad.clone()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for part in reversed(parts) if biases_first else parts:
                part.step()
        said += [str(warning.message) for warning in heard]
        torch.testing.assert_close(model[0].bias.detach(), before - 0.1 * raw)
    assert len(said) == 2 and "0.bias" in said[0] and "Put it into the optimizer of its weight" in said[0]
    assert compiled.coverage["0.bias"].declined.reason == "it is not stepped together with its weight 0.weight"


@pytest.mark.parametrize("door", ["compile", "compile_step"])
def test_a_bias_that_was_frozen_for_a_while_is_preconditioned_again(door):
    def run(frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if door == "compile_step":
            train = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, RULE, backend="eager")
        else:
            handle = mkor_fx.compile(model, RULE, backend="eager")

            def train(x, y):
                optimizer.zero_grad()
                functional.cross_entropy(handle(x), y).backward()
                optimizer.step()

        found = []
        for number in range(6):
            model[0].bias.requires_grad_(number not in frozen)
            x, y = torch.randn(12, 6, generator=torch.Generator().manual_seed(number)).double(), torch.arange(12) % 4
            raw = torch.autograd.grad(functional.cross_entropy(model(x), y), [p for p in model.parameters()
                                                                              if p.requires_grad])[1]  # fmt: skip
            before = model[0].bias.detach().clone()
            train(x, y)
            found.append(torch.allclose((before - model[0].bias.detach()) / 0.1, raw)
                         if number not in frozen else not torch.equal(before, model[0].bias))  # fmt: skip
        return found

    for frozen in ({0, 1}, {2, 3}, {0, 3}):
        # never raw where it is trained, never moved where it is frozen; at the very first step L b is along b
        assert run(frozen)[1:] == [False] * 5


# ---- scalers --------------------------------------------------------------------------------------------------------------


SCALED = {"mkor": MKOR.published(form="forgetful"), "kfac": mkor_fx.KFAC(derive_every=1), "own step": Leading()}


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_gradients_that_are_unscaled_to_be_clipped(rule, fused, unscaled):
    """With a fused optimizer torch leaves no scale on it then, and the statistics still have theirs."""

    def run(scale):
        torch.manual_seed(0)
        model, compiled, _ = pair(rule, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for number in range(3):
            x = torch.randn(12, 6, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(compiled(x), torch.arange(12) % 4)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
        return {key: t for key, t in compiled.mkor.state_dict().items() if key != "step"}

    for key, plain in run(1.0).items():
        torch.testing.assert_close(run(1024.0)[key], plain, rtol=1e-3, atol=1e-6)
