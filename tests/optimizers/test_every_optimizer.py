"""What docs/optimizers.md says of each optimizer is what happens."""

import importlib.util
from pathlib import Path

import pytest
from every_optimizer import LIBRARIES, agrees, classes, row, state_size, tried

TABLE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
#: in every run one of a kind; all others are nightly
IN_EVERY_RUN = {
    ("torch.optim", "Adafactor"),  # numbers that it reads from tensors
    ("pytorch_optimizer", "FAdam"),  # a count in its groups
    ("pytorch_optimizer", "BCOS"),  # state of the first gradient
    ("pytorch_optimizer", "Ranger"),  # a branch on the count
    ("pytorch_optimizer", "SOAP"),  # tensors in a list
    ("pytorch_optimizer", "Lookahead"),  # another optimizer inside
    ("optimi", "AdamW"),  # a tensor in its groups
}


def cases():
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            yield pytest.param(library, None, marks=pytest.mark.skip(reason=f"{library} is installed by make test"))
            continue
        for name in classes(library):
            often = (library, name) in IN_EVERY_RUN
            yield pytest.param(library, name, marks=[] if often else [pytest.mark.nightly], id=f"{library}.{name}")


@pytest.mark.parametrize(("library", "name"), list(cases()))
def test_it_is_followed_or_refused_as_the_table_says(library, name):
    result, tolerance = tried(library, name)
    assert agrees(result, tolerance), result
    section = TABLE.partition(f"## {library}")[2].partition("\n## ")[0]
    assert row(name, result, tolerance) in section.splitlines(), "every_optimizer.py writes docs/optimizers.md"


@pytest.mark.parametrize("name", classes("mkor_fx.optim"))
def test_the_size_of_our_state_is_the_tables(name):
    assert f"| {name} | {state_size(classes('mkor_fx.optim')[name]):.3g} |" in TABLE
