"""``python -m tests.fuzz --seeds 0:1000``"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz.check import outcome_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="0:100", help="first:last, or one seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--no-shrink", action="store_true", help="print failing programs as they were drawn")
    parser.add_argument("--show", action="store_true", help="print every program")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))
    failures, supported, missed, refused, declined, begin = Counter(), 0, 0, 0, Counter(), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=100) as pool:
        outcomes = pool.imap(partial(outcome_of, smallest=not arguments.no_shrink), seeds)
        for seed, (outcome, text) in zip(seeds, outcomes, strict=True):
            supported += len(outcome.supported)
            refused += bool(outcome.refused)
            missed += len(outcome.missed)
            for name, reason in outcome.missed.items():
                declined[f"{outcome.supported[name]}: {reason.partition(' [')[0]}"] += 1
            failures[outcome.failure] += bool(outcome.failure)
            if arguments.show:
                print(f"--- seed {seed}: {outcome.plan.door}\n{outcome.program}", *outcome.missed.items(), sep="\n")
            if outcome.failure:
                print(f"\nseed {seed}: {outcome.failure}\n{text}\n", flush=True)
            elif sys.stderr.isatty() or seed % 50 == 0:
                seconds = time.monotonic() - begin
                print(f"\r{seed}  {seconds:.0f} s  {failures.total()} failures", file=sys.stderr, flush=True)
        pool.close()
        pool.join()
    print(f"{len(seeds)} seeds, {time.monotonic() - begin:.0f} s, {failures.total()} failures")
    print(f"{refused} programs refused, by autograd itself or by a message")
    print(*(f"  {count} x {what}" for what, count in failures.most_common() if count), sep="\n")
    print(f"{supported} weights are made by supported operations, {supported - missed} became sites")
    print(*(f"  {count} x declined: {what}" for what, count in declined.most_common()), sep="\n")
    return bool(failures.total())


if __name__ == "__main__":
    sys.exit(main())
