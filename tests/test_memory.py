"""What the user drops, dies: models, optimizers, batches, graphs. And what is kept on purpose is bounded."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import dataclass

import processes
import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR
from mkor_fx.api import compiled_model
from mkor_fx.doors.drop_in import CompiledGraph
from mkor_fx.doors.run import Run
from mkor_fx.options import Options
from mkor_fx.passes import sources
from mkor_fx.passes.joint_pass import StatisticsPass
from mkor_fx.passes.torch_api import tracing
from mkor_fx.rules import Rules
from mkor_fx.runtime import ranks, steps

PUBLISHED = mkor_fx.MKOR.published()


@pytest.fixture(autouse=True)
def real_collector():
    """Other tests collect seldom: here it has to happen when asked for, among what is new."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def network(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


def batch():
    return torch.randn(8, 8), torch.randn(8, 4)


class Trained:
    """A model in training behind one of the doors; ``graph`` is what Dynamo was given in the place of its own."""

    def __init__(self, door, model=None, rule=PUBLISHED, optimizer=torch.optim.AdamW, backend="eager", **options):
        self.model = network() if model is None else model
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        if door == "compile_step":
            self.done = self.step = mkor_fx.compile_step(
                self.model, functional.mse_loss, self.optimizer, rule, backend=backend, **options
            )
        else:
            mode = "backward" if door == "backward" else "step"
            self.done = mkor_fx.compile(self.model, rule, precondition=mode, backend=backend, **options)

    def step(self, x, y):
        self.optimizer.zero_grad()
        functional.mse_loss(self.done(x), y).backward()
        self.optimizer.step()

    @property
    def graphs(self):
        return self.done.graphs if hasattr(self.done, "variants") else self.done.graphs.captured[0]


DOORS = pytest.mark.parametrize("door", ["compile_step", "compile", "backward"])
RULES = {"mkor": MKOR.published(), "kfac": KFAC(derive_every=1), "timed": MKOR.published(gamma=lambda step: 0.9)}


@DOORS
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_model_its_optimizer_and_its_graphs_die_with_their_last_user(door, rule):
    trained = Trained(door, rule=rule)
    for _ in range(2):
        trained.step(*batch())
    held = {
        "model": trained.model, "weight": trained.model[0].weight, "optimizer": trained.optimizer, "door": trained.done,
        "factor": next(iter(trained.done.mkor.tensors().values())), "lowered graph": trained.graphs["lower"].graph,
        "captured graph": trained.graphs["capture"].graph, "state": next(iter(trained.optimizer.state.values()))["exp_avg"],
    }  # fmt: skip
    alive = {name: weakref.ref(value) for name, value in held.items()}
    del held, trained
    gc.collect()
    assert [name for name, ref in alive.items() if ref() is not None] == []


@DOORS
def test_under_inductor_too(door):
    trained = Trained(door, backend="inductor")
    trained.step(*batch())
    alive = weakref.ref(trained.model[0].weight), weakref.ref(trained.optimizer), weakref.ref(trained.graphs["lower"].graph)
    del trained
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@DOORS
def test_the_last_batch_dies_while_training_goes_on(door):
    trained, alive = Trained(door), []
    for _ in range(3):
        x, y = batch()
        alive += [weakref.ref(x), weakref.ref(y)]
        trained.step(x, y)
        trained.optimizer.zero_grad()
        del x, y
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6
    trained.step(*batch())


@DOORS
def test_a_batch_whose_step_fails_dies_too(door):
    trained = Trained(door)
    x, y = torch.randn(8, 8), torch.randn(3, 4)
    alive = weakref.ref(x), weakref.ref(y)
    with pytest.raises((RuntimeError, ValueError)) as failure:
        trained.step(x, y)
    del x, y, failure
    gc.collect()
    assert [ref() for ref in alive] == [None] * 2
    trained.step(*batch())


@DOORS
@pytest.mark.filterwarnings("ignore:mkor_fx")
def test_a_replaced_weight_dies(door):
    trained = Trained(door, optimizer=torch.optim.SGD)
    trained.step(*batch())
    alive = weakref.ref(trained.model[2].weight), weakref.ref(trained.model[2])
    trained.model[2] = nn.Linear(16, 4)
    trained.optimizer.param_groups[0]["params"] = list(trained.model.parameters())
    trained.optimizer.state.clear()
    trained.optimizer.zero_grad()
    trained.step(*batch())
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("door", ["compile", "backward"])  # in the other one the optimizer belongs to the step
def test_an_optimizer_dies_while_its_model_goes_on(door):
    trained = Trained(door)
    trained.step(*batch())
    alive = weakref.ref(trained.optimizer)
    trained.optimizer = torch.optim.SGD(trained.model.parameters(), lr=0.1)
    gc.collect()
    assert alive() is None
    trained.step(*batch())


@DOORS
def test_the_handle_goes_and_the_model_stays_as_it_was(door):
    model = network()
    trained = Trained(door, model)
    trained.step(*batch())
    alive = weakref.ref(trained.done)
    del trained
    gc.collect()
    assert alive() is None
    optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=0.1), batch()
    functional.mse_loss(model(x), y).backward()
    expected = model[0].weight.detach() - 0.1 * model[0].weight.grad
    optimizer.step()  # a plain one again
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_the_tables_of_the_library_are_bounded_or_weak(monkeypatch):
    monkeypatch.setattr(tracing, "KEPT", 20)
    tracing._traced.clear()
    live = len(steps._live)
    for width in range(9, 15):
        trained = Trained("compile", network(width))
        trained.step(*batch())
        assert len(steps._live) == live + 1 and len(tracing._traced) <= 20
        del trained
        gc.collect()
    assert len(steps._live) == live and isinstance(ranks._made, weakref.WeakKeyDictionary)


def test_traces_are_shared_by_rules_that_differ_in_what_changes():
    """And none keeps a function of the user's, or what that refers to."""
    tracing._traced.clear()
    sizes = []
    for gamma in (0.9, 0.8):
        trained = Trained("compile", rule=MKOR.published(gamma=lambda step, gamma=gamma: gamma))
        trained.step(*batch())
        sizes.append(len(tracing._traced))
    assert sizes[0] == sizes[1] > 0


ALLOCATES = """
import resource, sys, torch, mkor_fx
from torch import nn
rule = {"none": None, "mkor": mkor_fx.MKOR.published(max_factor=64)}[sys.argv[1]]
model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))  # 96 MB
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # its state: 192 MB

class Enough(Exception): pass

def stop(*_):
    raise Enough

import mkor_fx.doors.whole_step as door
door.compile_graph = stop  # all is written, nothing has run: this is what compiling takes
step = mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, rule, backend="eager")
x = torch.randn(4, 2048)
warm = nn.Linear(8, 8)
other = torch.optim.AdamW(warm.parameters(), lr=1e-3)
other = mkor_fx.compile_step(warm, nn.functional.mse_loss, other, rule, backend="eager")
for one, batch in ((other, torch.randn(4, 8)), (step, x)):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        one(batch, batch)
    except Exception as error:
        assert isinstance(error, Enough) or isinstance(error.__cause__ or error.inner_exception, Enough), error
assert not optimizer.state and not step.mkor.tensors()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("rule", [pytest.param("none", marks=pytest.mark.nightly), "mkor"])
def test_writing_a_step_allocates_nothing_real(rule):
    """The optimizer's state, and copies of parameters to trace over, would be 200 MB and more."""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", ALLOCATES, rule], check=True, stdout=subprocess.PIPE)
    assert int(told.stdout.split()[-1]) < 60


# ---- folders and caches that processes share ------------------------------------------------------------------------------


def dump_on_a_rank(rank, size, folder):
    os.environ["MKOR_FX_DUMP"] = folder
    torch.manual_seed(0)
    model = network()
    step = mkor_fx.compile_step(
        model, functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), refresh_every=2, backend="eager"
    )  # fmt: skip
    for _ in range(2):
        step(*batch())


def test_two_ranks_write_one_folder(tmp_path):
    processes.values(dump_on_a_rank, 2, str(tmp_path))
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == [f"00{n}_rank{rank}_Sequential_{kind}_step"
                     for (n, kind), rank in itertools.product(enumerate(("refresh", "reuse")), (0, 1))]  # fmt: skip
    files = [sorted(path.name for path in folder.iterdir()) for folder in sorted(tmp_path.iterdir())]
    assert files[0] == files[1] and files[2] == files[3] and all(files)


def dump_alone(_, size, folder):
    os.environ["MKOR_FX_DUMP"] = folder
    torch.distributed.destroy_process_group()
    trained = Trained("compile")
    trained.step(*batch())


def test_strangers_write_one_folder(tmp_path):
    """Two processes that know nothing of each other lose no file."""
    processes.values(dump_alone, 2, str(tmp_path))
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 4 and len({folder.name for folder in folders}) == 4
    assert all(len(list(folder.iterdir())) > 10 for folder in folders)


def test_the_cache_key_holds_every_source_that_shapes_a_program(monkeypatch, tmp_path):
    def key(rules=Rules.of(MKOR.published())):  # noqa: B008
        sources._own.cache_clear()
        return sources.library_sources(rules)

    before = key()
    package = tmp_path / "mkor_fx"
    shutil.copytree(sources._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_PACKAGE", package)
    assert key() == before
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        assert key() != before, path
        path.write_text(text)
    assert key() == before
    monkeypatch.undo()
    sources._own.cache_clear()


@dataclass(frozen=True)
class Mine(MKOR):
    """A rule outside of the library."""


def test_the_cache_key_holds_a_rules_own_source(monkeypatch):
    keys = [sources.library_sources(Rules.of(rule)) for rule in (MKOR.published(), Mine())]
    monkeypatch.setattr(sources, "_source_of", lambda cls: f"class {cls.__name__}, otherwise")
    assert len({*keys, sources.library_sources(Rules.of(Mine()))}) == 3


def test_the_cache_key_holds_options_passes_and_names(monkeypatch):
    keys, make = [], StatisticsPass.__init__

    def noted(self, *args):
        make(self, *args)
        keys.append(self.uuid())

    monkeypatch.setattr(StatisticsPass, "__init__", noted)
    for options in ({}, {"rule": MKOR.published(gamma=0.9)}, {"skip": ["2.bias"]}, {"without": ["store_scalars"]},
                    {"precondition": "backward"}, {}):  # fmt: skip
        compiled_model(network(), Options(backend="eager", **{"rule": MKOR.published(), **options}))(batch()[0])
    assert len(keys) == 6 and len(set(keys)) == 5 and keys[0] == keys[-1]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_programs_die_too(backend):
    """What Dynamo was given in the place of its graph, not only the stages that are kept to be looked at."""
    def alive():
        gc.collect()
        return sum(isinstance(thing, (Run, CompiledGraph)) for thing in gc.get_objects())

    before = alive()
    for door in ("compile_step", "compile"):
        trained = Trained(door, backend=backend)
        trained.step(*batch())
        assert alive() > before
        del trained
        assert alive() == before
