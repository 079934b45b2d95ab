"""How long compilation takes as a GPT gets deeper, with a cold and a warm cache, beside torch.compile.

    python -m benchmarks.compile_time --depth 2 4 8

CPU seconds of the first calls, those of the C++ compiler included, each in a process of its own with Inductor's caches in
a folder of its own. `torch.compile` is the model and `torch.compile(optimizer.step)`; `one program` is compile_step with a
refresh at every step, `both programs` with and without.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import torch
from tabulate import tabulate

import mkor_fx
from benchmarks.cases import gpt
from benchmarks.step_sides import Side, adamw, compiled, torch_compiled

BASE = "torch.compile"
WIDTH = 64


SIDES: dict[str, Side] = {
    BASE: torch_compiled(adamw),
    "one program": compiled(adamw, mkor_fx.MKOR()),
    "both programs": compiled(adamw, mkor_fx.MKOR(), every=2),
}


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(side: str, depth: int) -> dict[str, float]:
    """CPU and wall seconds of the first two steps, less those of the two after them."""
    torch.manual_seed(0)
    step, spent = SIDES[side](gpt(WIDTH, depth), "inductor"), []
    for _ in range(2):
        cpu, wall = cpu_seconds(), time.perf_counter()
        step(), step()
        spent.append((cpu_seconds() - cpu, time.perf_counter() - wall))
    (cpu, wall), later = spent
    return {"cpu": cpu - later[0], "wall": wall - later[1]}


def in_a_process(side: str, depth: int, cache: str) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    call = [sys.executable, "-m", "benchmarks.compile_time", "--measure", side, "--depth", str(depth)]
    done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 8, 16], help=f"blocks of a GPT of width {WIDTH}")
    parser.add_argument("--measure", choices=SIDES, help="one side, here, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.depth[0])))
        return
    rows = []
    for depth in options.depth:
        base: dict[str, float] = {}
        for side in SIDES:
            with tempfile.TemporaryDirectory() as cache:
                row: list[str] = [str(depth), side]
                for state in ("cold", "warm"):
                    found = in_a_process(side, depth, cache)
                    base.setdefault(state, found["cpu"])
                    row += [f"{found['cpu']:.1f}", f"{found['cpu'] / base[state]:.2f}", f"{found['wall']:.1f}"]
            rows.append(row)
            print(" | ".join(row), flush=True)
    clocks = [f"{state}: {what}" for state in ("cold", "warm") for what in ("CPU s", "ratio", "wall s")]
    headers = ("blocks", "side", *clocks)
    print(f"\ntorch {torch.__version__}, GPT of width {WIDTH}, AdamW, MKOR()\n")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("right", "left") + ("right",) * 6))


if __name__ == "__main__":
    main()
