"""What a step keeps and what it needs at its peak, beside the plain compiled step.

    python -m benchmarks.memory --model mlp --device cpu

`state` is every tensor that a process still holds behind a step, beside weights and batch, over the bytes of the weights:
what optimizers and rules keep. `peak` is the most that torch's allocator holds at once during a step, all of that included.
Each side runs in a process of its own.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.step_sides import SIDES, Step

CASES = {"mlp": cases.mlp, "gpt": lambda: cases.gpt(256, 4), "cnn": cases.cnn}
#: the first is what the others are held against
USUAL = ("SGD", "AdamW", "Muon + AdamW", "MKOR behind SGD", "MKOR", "MKOR, factors in bfloat16")


def held() -> dict[int, int]:
    """Bytes by storage of all tensors there are."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and type(t) in (Tensor, nn.Parameter, nn.Buffer)]
    storages = [t.untyped_storage() for t in found if t.device.type in ("cpu", "cuda") and t.layout == torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def transient(step: Step) -> int:
    """The most bytes that one step holds beyond those held before it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = most = 0
    for _, bytes_more in sorted(changes, key=lambda change: change[0]):
        now += bytes_more
        most = max(most, now)
    return most


def measured(model: str, side: str, device: str) -> dict[str, float]:
    case = CASES[model]().on(torch.device(device))
    weights = sum(p.nbytes for p in case.model().parameters())
    batch = sum(t.nbytes for t in case.batch)
    step = SIDES[side](case, "inductor")
    for _ in range(3):
        step()
    state = sum(held().values()) - weights - batch
    return {"weights": weights, "state": state, "peak": weights + batch + state + transient(step)}


def in_a_process(model: str, side: str, device: str) -> dict[str, float]:
    call = [sys.executable, "-m", "benchmarks.memory", "--model", model, "--measure", side, "--device", device]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(model: str, sides: tuple[str, ...], device: str) -> str:
    rows, mega = [], 2**20
    base: dict[str, float] = {}
    for side in sides:
        found = in_a_process(model, side, device)
        base = base or found
        with_state = base["peak"] + found["state"] - base["state"]
        rows.append((side, f"{found['state'] / mega:.1f}", f"{found['state'] / found['weights']:.2f}",
                     f"{found['peak'] / mega:.1f}", f"{found['peak'] / with_state:.3f}"))  # fmt: skip
    headers = ("step", "state, MiB", "over weights", "peak, MiB", f"over {sides[0]}'s and further state")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, action="append", help="default: all")
    parser.add_argument("--side", choices=SIDES, action="append", help=f"default: {', '.join(USUAL)}")
    parser.add_argument("--measure", choices=SIDES, help="one side, here, as JSON")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    models = options.model or list(CASES)
    if options.measure:
        print(json.dumps(measured(models[0], options.measure, options.device)))
        return
    print(f"torch {torch.__version__}")
    for model in models:
        case = CASES[model]()
        weights = sum(p.nbytes for p in case.model().parameters())
        found = table(model, options.side or USUAL, options.device)
        print(f"\n## {case.title}, weights {weights / 2**20:.1f} MiB\n\n{found}", flush=True)


if __name__ == "__main__":
    main()
