"""Every optimizer of torch, of two libraries and our own. As a program it writes docs/optimizers.md; the tests hold that to
what they find."""

import contextlib
import importlib
import importlib.metadata
import inspect
import re
import warnings
from pathlib import Path

import torch
from lockstep import STEPS, Followed, NotFollowed, Own, beside_itself, refusal

from mkor_fx.runtime.optimizer_state import initialise_state
from mkor_fx.runtime.optimizers import Optimizers

LIBRARIES = ("torch.optim", "pytorch_optimizer", "optimi", "mkor_fx.optim")
#: of a weight's difference over its change
EXACT, SINGLE, HALF = 1e-7, 1e-4, 2e-2
#: torch's Muon multiplies in bfloat16, where one rounding more or less is seen
IN_BFLOAT16 = {("torch.optim", "Muon")}
MATRICES_ALONE = {("torch.optim", "Muon"), ("pytorch_optimizer", "SpectralSphere")}


def of_parameters(cls):
    names = inspect.signature(cls.__init__).parameters
    options = {"lr": 1e-3} if "lr" in names else {}
    options |= {"foreach": False} if "foreach" in names else {}
    return lambda model: cls(list(model.parameters()), **options)


def of_two_kinds(cls):
    """Muon's relatives in pytorch_optimizer say of each group whether they serve it or Adam does."""

    def build(model):
        kinds = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
        return cls([{"params": kinds[0], "use_muon": True}, {"params": kinds[1], "use_muon": False}])

    return build


def around_another(cls):
    return lambda model: cls(torch.optim.AdamW(model.parameters(), lr=1e-3))


def of_a_class(cls):
    return lambda model: cls(model.parameters(), base_optimizer=torch.optim.SGD, lr=1e-3)


#: how those of pytorch_optimizer are built that want more than parameters
BUILDERS = (
    dict.fromkeys(("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"), of_two_kinds)
    | dict.fromkeys(("Lookahead", "OrthoGrad", "TRAC", "ScheduleFreeWrapper", "PCGrad", "SafeFP16Optimizer"), around_another)
    | dict.fromkeys(("SAM", "FriendlySAM", "LookSAM"), of_a_class)
    | {
        "BSAM": lambda cls: lambda model: cls(model.parameters(), num_data=6),
        "Ranger21": lambda cls: lambda model: cls(model.parameters(), num_iterations=100),
        "AdamMini": lambda cls: cls,
        "WSAM": lambda cls: lambda model: cls(model, model.parameters(), torch.optim.SGD, lr=1e-3),
    }
)


def classes(library):
    """By name; what a library shows of torch's is torch's."""
    module = importlib.import_module(library)
    shown = [getattr(module, name) for name in sorted(dir(module))]
    kinds = [c for c in shown if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and not inspect.isabstract(c)]
    kinds = [c for c in kinds if c is not torch.optim.Optimizer]
    return {c.__name__: c for c in kinds if library == "torch.optim" or not c.__module__.startswith("torch.")}


def tried(library, name):
    """What becomes of an optimizer in a compiled step, and the most that its weights may be apart."""
    cls = classes(library)[name]
    build = (BUILDERS.get(name, of_parameters) if library == "pytorch_optimizer" else of_parameters)(cls)
    matrices, tolerance = (library, name) in MATRICES_ALONE, HALF if (library, name) in IN_BFLOAT16 else EXACT
    with warnings.catch_warnings(), exact_products(library):
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        try:
            return beside_itself(build, torch.float64, matrices), tolerance
        except Own:  # some keep their state in single precision whatever the weights' is
            try:
                return beside_itself(build, torch.float32, matrices), max(tolerance, SINGLE)
            except Own as error:
                return refusal(build) or error, None


@contextlib.contextmanager
def exact_products(library):
    """Newton and Schulz's iteration in pytorch_optimizer, which is in bfloat16, in float64, to see to the last digits."""
    if library != "pytorch_optimizer":
        yield
        return
    iteration = importlib.import_module("pytorch_optimizer.optimizer.utils.matrix").zero_power_via_newton_schulz_5
    before = iteration.__defaults__
    iteration.__defaults__ = tuple(torch.float64 if value is torch.bfloat16 else value for value in before)
    try:
        yield
    finally:
        iteration.__defaults__ = before


def row(name, result, tolerance):
    if isinstance(result, Own):
        return f"| {name} | not tried | its own loop fails here: {_short(result)} |"
    if isinstance(result, NotFollowed):
        return f"| {name} | refused | {_short(result.reason)} |"
    remarks = [f"within {tolerance:.0e}"] if tolerance > EXACT else []
    remarks += ["once it has stepped by itself"] if result.warm else []
    remarks += [f"{result.programs} programs, by its count"] if result.programs > 1 else []
    return f"| {name} | followed | {', '.join(remarks)} |"


def _short(reason):
    text = str(reason).replace("|", "/")
    text = re.sub(r"^\w+\.step\(\) (cannot be traced into the compiled step: )?", "", text)
    return text if len(text) <= 160 else f"{text[:157]}..."


def agrees(result, tolerance):
    """A refusal comes before anything has changed; what is followed is in lockstep, without a compilation a step."""
    return not isinstance(result, Followed) or (result.apart <= tolerance and result.programs < STEPS / 2)


def state_size(cls):
    """Bytes of state over bytes of weights, of a float32 matrix of 512 x 512 and its bias."""
    model = torch.nn.Linear(512, 512)
    optimizer = cls(model.parameters(), lr=1e-3)
    initialise_state(Optimizers.of(optimizer), list(model.parameters()))
    kept = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    return kept / sum(4 * p.numel() for p in model.parameters())


#: what follows is kept: `benchmarks.optimizers` has printed it
MEASURED = "\n## What they cost, and how they train\n"
TEXT = """# Base optimizers

What becomes of an optimizer in a compiled step (`compile_step`): it is followed exactly, or refused with its reason
before anything has changed. `compile` leaves steps to the optimizer itself and takes all of them. Written by `python
tests/optimizers/every_optimizer.py`, which runs each class beside its own loop ({steps} steps, rates that change), and
checked by the tests.

*Followed*: weights as in the optimizer's own loop (its plain one, `foreach=False`) to 1e-7 of what they
have moved, in float64, unless it says otherwise (pytorch_optimizer's orthogonalisations, which are in bfloat16, were
run in float64 for this). *Once it has stepped by itself*: its state is made inside `step()`, or of the first gradient;
`optimizer.step()` is to be called once before `compile_step`, or its state loaded. Numbers that a step changes (a count
in `param_groups`, a Python number in `state`) become tensors in the same place, which the program advances;
`state_dict()` has numbers. *By its count*: where it branches on a count in its groups (`step % 10 == 0`), each way that it
takes is a program, looked for 1000 steps ahead before anything is compiled; all others are one program. To choose between
them a step reads the count, for which the host waits for the step before.

Refused is what has no place in a program: a branch on a value of a tensor or on a count in the state of a parameter, a
count on the optimizer object itself or in a variable of a function, lists of tensors in the state, random numbers, a
closure, another optimizer inside.

{tables}
## State of our own

Bytes of state over bytes of weights, measured on a float32 matrix of 512 x 512 and its bias.

| optimizer | state |
|---|---|
{sizes}
"""


def main():
    tables, astray = [], []
    for library in LIBRARIES:
        version = getattr(importlib.import_module(library), "__version__", "") or _version(library)
        rows = []
        for name in classes(library):
            result, tolerance = tried(library, name)
            rows.append(row(name, result, tolerance))
            astray += [] if agrees(result, tolerance) else [rows[-1]]
            print(library, rows[-1], result, flush=True)
        heading = f"{library} {version}".strip()
        tables.append(f"## {heading}\n\n| optimizer | compiled step | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    sizes = "\n".join(f"| {name} | {state_size(cls):.3g} |" for name, cls in classes("mkor_fx.optim").items())
    path = Path(__file__).parents[2] / "docs" / "optimizers.md"
    assert not astray, astray
    measured = path.read_text().partition(MEASURED)[2]
    path.write_text(TEXT.format(tables="\n".join(tables), sizes=sizes, steps=STEPS) + MEASURED + measured)


def _version(library):
    if library == "torch.optim":
        return torch.__version__.partition("+")[0]
    distribution = {"optimi": "torch-optimi"}.get(library, library)
    return "" if library == "mkor_fx.optim" else importlib.metadata.version(distribution)


if __name__ == "__main__":
    main()
