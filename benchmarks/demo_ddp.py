"""`make demo-ddp`: the demo's task on several ranks, each with its part of every batch. Run under torchrun.

Every rank draws the same batches and keeps its rows, so the run is that of one process on the whole batch.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist

import mkor_fx
from benchmarks.demo import usable_backend
from benchmarks.tasks import TASKS, cosine
from mkor_fx.passes.order.collectives import describe

CHECK_EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="digits")
    parser.add_argument("--steps", type=int, help="default: as many as the demo takes")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    report = print if rank == 0 else lambda *_: None

    task = TASKS[options.task]
    steps, rate = options.steps or task.steps, task.rates["mkor"]
    model = task.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    communication = mkor_fx.Communication(check_replicas_every=CHECK_EVERY)
    step = mkor_fx.compile_step(model, task.loss_fn, optimizer, communication=communication, backend=usable_backend())
    report(f"{task.title}: {size} ranks, {task.batch} examples a step")
    began = time.perf_counter()
    for done, batch in enumerate(task.batches(0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(done, steps)
        loss = step(*(part.chunk(size)[rank] for part in batch))
        if done == 0:
            report(f"compiled in {time.perf_counter() - began:.0f} s; the collectives of a step, in order:")
            for line in describe(step.graphs["schedule"].module.graph):
                report(f"  {line if len(line) < 110 else line[:107] + '...'}")
        if (done + 1) % task.evaluate_every == 0 or done + 1 == steps:
            training, held_out = task.evaluate(model)
            report(f"step {done + 1:5}  batch {loss.item():8.4g}  training {training:8.4g}  held out {held_out:8.4g}")
    report(f"{time.perf_counter() - began:.0f} s; replicas were compared every {CHECK_EVERY} steps, bit for bit")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
