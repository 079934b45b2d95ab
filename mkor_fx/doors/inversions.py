"""Which rank would derive what behind a simulated step: inverses and decompositions, outside of its program."""

from __future__ import annotations

import torch

from ..options import Options
from ..passes.order.collectives import Group
from ..passes.order.estimate import EFFICIENCY, Device
from ..passes.torch_api.nccl_model import nccl_milliseconds
from ..passes.write.derive import what_is_derived
from ..runtime.derivations import derived_of
from ..runtime.speeds import Speeds, workers
from ..show.timeline import Inversion
from .run import Written


def estimated_speeds(device: Device, ranks: int) -> Speeds:
    """Of GPUs that are not there: lines through two sizes of Inductor's model of NCCL, and a roofline for products."""
    sizes, flops = (1 << 10, 64 << 20), EFFICIENCY * device.peak(torch.float32)
    lines = [
        Speeds.line(sizes, [1e-3 * nccl_milliseconds(kind, size, ranks, device.generation) for size in sizes])
        if ranks > 1
        else (0.0, float("inf"))
        for kind in ("ALL_REDUCE", "ALL_GATHER")
    ]
    (latency, bandwidth), (start, width) = lines
    return Speeds(
        latency=latency, bandwidth=bandwidth, flops=flops, broadcast_latency=start, broadcast_bandwidth=width
    )


def inversions(written: Written, options: Options, group: Group, device: Device) -> tuple[Inversion, ...]:
    """Of each weight whose rule derives something, in the order of the program."""
    found = {written.whole.parameters[i].name: (layout, derived_of(what_is_derived(layout).values()))
             for i, layout in written.layouts.items() if layout.rule.overrides("derive")}  # fmt: skip
    speeds = options.communication.speeds or estimated_speeds(device, group.size)
    owners, columns = written.draft.plan.owners, 1 if group.row is None else group.row.size
    sends = lambda owner: group.size > (1 if owner is None else columns)  # an owner that is alone has nobody to send to
    placed: dict[str, int | None] = {}
    for owner in dict.fromkeys(owners.get(name) for name in found):
        alike = {name: about for name, (_, about) in found.items() if owners.get(name) == owner}
        keep = group.size if owner is None else group.size // columns
        at = workers(alike, keep, options.communication.speeds)
        if owner is None:
            placed |= at
        else:  # those of a column stand one below the other
            rank_in = lambda row, owner=owner: None if row is None else row * columns + owner
            placed |= {name: owner if keep == 1 else rank_in(row) for name, row in at.items()}
    return tuple(
        Inversion(
            name,
            about.matrices,
            layout.rule.derive_every,
            placed[name],
            1e3 * sum(map(speeds.inversion, about.matrices)),
            1e3 * sum(map(speeds.broadcast, about.bytes)) if placed[name] is not None and sends(owners.get(name)) else 0.0,
        )
        for name, (layout, about) in found.items()
    )
