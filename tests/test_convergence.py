"""The benchmark of convergence: rates searched, runs kept, tables and plots."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional

import mkor_fx
from benchmarks import convergence, sides, tasks, training
from benchmarks.hooked import HookedMKOR
from benchmarks.report import reaching, report, spread, table
from benchmarks.tasks import TASKS
from benchmarks.training import Run

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def run(lr, seed, finals, held_out=None):
    steps = [10 * (at + 1) for at in range(len(finals))]
    return Run(lr=lr, seed=seed, evaluated=steps, training=finals, held_out=held_out or finals, step_ms=2.0, cpu_ms=4.0)


class Scripted(convergence.Search):
    """Final losses by a function of the rate and the seed."""

    def __init__(self, loss):
        self.loss, self.calls = loss, []

    def run(self, lr, seed):
        self.calls.append((lr, seed))
        return run(lr, seed, [self.loss(lr, seed)])


def test_a_grid_goes_on_until_the_best_rate_lies_inside():
    search = Scripted(lambda lr, seed: abs(math.log2(lr)))
    runs = search.all([0, 1], [0.125, 0.25, 0.5])
    assert sorted(runs) == [0.125, 0.25, 0.5, 1, 2]
    assert {lr: len(some) for lr, some in runs.items()} == {0.125: 1, 0.25: 1, 0.5: 2, 1: 2, 2: 2}
    assert [(r.lr, r.seed) for r in convergence.best(runs)] == [(1, 0), (1, 1)] and len(search.calls) == 8


def test_the_median_over_seeds_decides_between_neighbours():
    runs = Scripted(lambda lr, seed: abs(lr - 3) + 5 * (lr == 3) * (seed > 0)).all([0, 1, 2], [2.0, 3.0, 4.0])
    assert convergence.best(runs)[0].lr == 2.0


def test_a_grid_that_never_ends_ends():
    assert len(Scripted(lambda lr, seed: -lr).all([0], [1.0, 2.0])) == convergence.WIDEST


def test_what_a_table_says():
    slow = [run(1e-3, seed, [4.0, 3.0, 2.0]) for seed in (0, 1)]
    fast = [run(1e-3, seed, [2.0, 1.0, 1.0]) for seed in (0, 1)]
    assert reaching(slow, slow) == "30, 0.1 s" and reaching(fast, slow) == "10, 0.0 s"
    assert reaching(slow, fast) == "never"
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)" and spread([2.0]) == "2"


def test_steps_that_do_more_than_others_are_paid_for():
    """Roots every tenth step are in no median."""
    every_tenth = [dataclasses.replace(run(1e-3, 0, [3.0, 2.0, 2.0]), mean_cpu_ms=50.0)]
    assert every_tenth[0].cost_ms == 50.0 and run(1e-3, 0, [1.0]).cost_ms == 4.0
    assert reaching(every_tenth, every_tenth) == "30, 1.5 s"


def test_times_of_another_processor_are_marked():
    here, there = ([dataclasses.replace(run(1e-3, 0, [2.0, 1.0]), capability=name)] for name in ("AVX2", "AVX512"))
    rows = table(TASKS["digits"], {"AdamW": here, "SGD": here, "Muon": there}).splitlines()
    assert [row.count("†") for row in rows[-3:]] == [0, 0, 3]


def test_sides_by_name_and_as_python():
    assert sides.identity("Muon") == "Muon"
    assert sides.identity("MKOR()") == sides.identity("MKOR(rank=8)") != sides.identity("MKOR(rank=4)")
    assert sides.rule_of("MKOR() every 5 behind SGD")[1:] == (5, "SGD")
    with pytest.raises(NameError):
        sides.identity("Adam")


def test_runs_are_kept_and_the_report_is_written(tmp_path, capsys, monkeypatch):
    arguments = ["--task", "digits", "--seeds", "0", "--rates", "2e-3", "4e-3", "8e-3", "--steps", "6"]
    arguments += ["--backend", "eager", "--out", str(tmp_path), "--side", "AdamW", "MKOR(rank=2) behind SGD"]
    monkeypatch.setattr("sys.argv", ["convergence", *arguments])
    monkeypatch.setattr(convergence, "WIDEST", 3)
    threads = torch.get_num_threads()
    convergence.main()
    first = capsys.readouterr().out
    monkeypatch.setattr(convergence, "build", lambda *_: pytest.fail("a finished run is not run again"))
    convergence.main()
    table = first[first.index("### digits") :].strip()
    assert capsys.readouterr().out.strip() == table
    monkeypatch.setattr("sys.argv", ["convergence", *arguments, "SOAP", "--kept"])
    convergence.main()
    assert capsys.readouterr().out.strip() == table
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6
    assert "MKOR(rank=2) behind SGD" in (tmp_path / "report.md").read_text() and (tmp_path / "digits.png").stat().st_size
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]))
    convergence.main()
    assert "left out, for its search is not finished: digits | MKOR(rank=2) behind SGD, 2 runs" in capsys.readouterr().out
    assert "MKOR" not in (tmp_path / "report.md").read_text()
    torch.set_num_threads(threads)


def test_a_search_is_finished_behind_its_last_run():
    """The best rate has a neighbour on each side, and other seeds have run at all three."""
    grid, seeds = (1e-3, 2e-3, 4e-3), (0, 1)
    runs = {lr: [run(lr, 0, [loss])] for lr, loss in zip(grid, (3.0, 1.0, 2.0))}
    assert convergence.finished(runs, seeds[:1], grid)
    assert not convergence.finished(runs, seeds, grid)
    for lr in grid:
        assert not convergence.finished(runs, seeds, grid)
        runs[lr].append(run(lr, 1, [1.0]))
    assert convergence.finished(runs, seeds, grid)
    assert not convergence.finished(runs, seeds, (*grid, 8e-3))
    assert not convergence.finished({lr: [run(lr, 0, [lr])] for lr in grid}, seeds[:1], grid)


def test_a_search_goes_on_where_the_median_of_all_seeds_prefers_a_neighbour():
    """Until the rate that is reported has a neighbour on each side that every seed has run at."""
    losses = {1e-3: (3.0, 3.0), 2e-3: (1.0, 1.5), 4e-3: (1.2, 0.5), 8e-3: (2.0, 0.2), 16e-3: (4.0, 4.0)}
    runs: dict[float, list] = {}
    asked = []
    while (wanted := convergence.following(runs, (0, 1), (1e-3, 2e-3, 4e-3))) is not None:
        asked.append(wanted)
        lr, seed = wanted
        runs.setdefault(lr, []).append(run(lr, seed, [losses[lr][seed]]))
    first = [(1e-3, 0), (2e-3, 0), (4e-3, 0), (1e-3, 1), (2e-3, 1), (4e-3, 1)]
    assert asked == [*first, (8e-3, 0), (8e-3, 1)]  # medians 1.25, 0.85, 1.1
    runs[8e-3] = [run(8e-3, seed, [loss]) for seed, loss in enumerate((0.9, 0.2))]  # now the first seed's best, too
    assert convergence.following(runs, (0, 1), (1e-3, 2e-3, 4e-3)) == (16e-3, 0)
    assert not convergence.finished(runs, (0, 1), (1e-3, 2e-3, 4e-3))
    assert convergence.best(runs)[0].lr == 8e-3


def test_every_run_of_a_trainer_starts_afresh():
    """Dropout included: a run depends on its seed, and on no run before it."""
    task = dataclasses.replace(
        TASKS["digits"], steps=4, evaluate_every=2,
        architecture=lambda: torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Dropout(), torch.nn.Linear(16, 64)),
    )  # fmt: skip
    for trainer in (sides.build(task, "MKOR()", "eager"), sides.build(task, "Muon", "eager")):
        one, other, again = (trainer.run(1e-2, seed) for seed in (0, 1, 0))
        assert one.training == again.training != other.training


def test_muon_takes_the_hidden_matrices_of_every_task():
    for task in (TASKS["lm"], TASKS["cnn"], TASKS["gpt"]):
        model = task.build(0)
        matrices, rest = training.muon(task, model)
        held = [p for o in (matrices, rest) for g in o.param_groups for p in g["params"]]
        assert len(held) == len({id(p) for p in held}) == len([*model.parameters()])
        assert all(p.dim() == 2 for p in matrices.param_groups[0]["params"])


def test_two_tasks_make_an_overview(tmp_path):
    sides_of = {"AdamW": [run(1e-3, 0, [3.0])], "MKOR()": [run(1e-3, 0, [2.0])]}
    text = report({tasks.TASKS["digits"]: sides_of, tasks.TASKS["lm"]: sides_of}, tmp_path)
    assert "### All tasks" in text and "3 / 3" in text


def test_kfac_by_hooks_is_the_rule():
    """With convolutions, over two inversions: one trajectory."""
    task = dataclasses.replace(TASKS["digits"], architecture=small_network, steps=14, evaluate_every=7)
    hooked, rule = (
        sides.build(task, side, "eager").run(1e-2, 0) for side in ("hooked K-FAC", "KFAC(derive_every=10)")
    )
    assert hooked.training == pytest.approx(rule.training, rel=1e-4)
    adamw = sides.build(task, "AdamW", "eager").run(1e-2, 0)
    assert adamw.training != pytest.approx(rule.training, rel=1e-2)


def test_mkor_by_hooks_is_the_rule():
    """With convolutions and biases, in float64: one trajectory, which is not that of plain SGD."""
    torch.manual_seed(0)
    model = small_network().double()
    twins = [copy.deepcopy(model) for _ in range(2)]
    batches = [(torch.randn(16, 64).double(), torch.randn(16, 64).double()) for _ in range(8)]
    rule = mkor_fx.MKOR.published(factor_dtype=torch.float64, product_dtype=torch.float64)
    compiled = [
        mkor_fx.compile_step(net, functional.mse_loss, torch.optim.SGD(net.parameters(), lr=1.0), taken, backend="eager")
        for net, taken in ((model, rule), (twins[0], None))
    ]
    hooked, sgd = HookedMKOR(twins[1]), torch.optim.SGD(twins[1].parameters(), lr=1.0)
    for x, y in batches:
        for step in compiled:
            step(x, y)
        sgd.zero_grad()
        functional.mse_loss(twins[1](x), y).backward()
        hooked.step()
        sgd.step()
    for own, plain, by_hooks in zip(model.parameters(), *(net.parameters() for net in twins), strict=True):
        torch.testing.assert_close(by_hooks, own, rtol=1e-10, atol=1e-12)
        assert (own - plain).norm() > 1e-3 * own.norm()


def small_network():
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 4, 3, stride=2, padding=1),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 64),
    )
