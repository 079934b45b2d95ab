"""``python -m tests.fuzz --seeds 0:1000``"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz.check import check_seed, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="0:100", help="first:last, or one seed")
    parser.add_argument("--no-shrink", action="store_true", help="print failing programs as they were drawn")
    parser.add_argument("--show", action="store_true", help="print every program")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))
    failures, supported, missed, refused, declined, begin = Counter(), 0, 0, 0, Counter(), time.monotonic()
    for seed in seeds:
        outcome = check_seed(seed)
        supported += len(outcome.supported)
        refused += bool(outcome.refused)
        missed += len(outcome.missed)
        for name, reason in outcome.missed.items():
            declined[f"{outcome.supported[name]}: {reason.partition(' [')[0]}"] += 1
        if arguments.show:
            print(f"--- seed {seed}: {outcome.plan.door}\n{outcome.program}", *outcome.missed.items(), sep="\n")
        if outcome.failure:
            failures[outcome.failure] += 1
            if not arguments.no_shrink and failures[outcome.failure] == 1:
                outcome = shrink(outcome)
            print(
                f"\nseed {seed}: {outcome.failure}\n{outcome.detail.strip()[-1500:]}\n{describe(outcome)}\n", flush=True
            )
        elif sys.stderr.isatty() or seed % 50 == 0:
            print(
                f"\r{seed}  {time.monotonic() - begin:.0f} s  {sum(failures.values())} failures",
                file=sys.stderr,
                flush=True,
            )
    print(f"{len(seeds)} seeds, {time.monotonic() - begin:.0f} s, {sum(failures.values())} failures")
    print(f"{refused} programs refused, by autograd itself or by a message")
    print(*(f"  {count} x {what}" for what, count in failures.most_common()), sep="\n")
    print(f"{supported} weights are made by supported operations, {supported - missed} became sites")
    print(*(f"  {count} x declined: {what}" for what, count in declined.most_common()), sep="\n")
    return bool(failures)


def describe(outcome) -> str:
    plan = outcome.plan
    kept = {
        k: getattr(plan, k)
        for k in ("door", "shape", "sizes", "autocast", "frozen", "refresh_every", "dynamic", "rule")
    }
    return "\n".join([*(f"  {line}" for line in outcome.program.splitlines()), f"  {kept}"])


if __name__ == "__main__":
    sys.exit(main())
