"""A process group for measuring overlap on any machine: gloo, with the latency and bandwidth of a slower network.

`init_process_group("latency", ...)` after importing this module. Collectives leave one after the other, as on one NCCL
stream: each occupies the network for `LATENCY` seconds and its bytes over `BANDWIDTH`, and a wait lasts until then.
`blocked` adds up the time spent in waits, `communication` the time for which the network was occupied; both in seconds.
"""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LATENCY, BANDWIDTH = 0.004, 10e9


class Sent(dist.Work):
    """A collective under way: gloo's own work, and the moment at which the slower network delivers it."""

    def __init__(self, group: "LatencyGroup", work: dist.Work | None, arrives: float) -> None:
        super().__init__()
        self.group, self.work, self.arrives = group, work, arrives

    def wait(self, timeout: timedelta | None = None) -> bool:
        begin = time.perf_counter()
        if self.work is not None:
            self.work.wait()
        if (rest := self.arrives - time.perf_counter()) > 0:
            time.sleep(rest)
        self.group.blocked += time.perf_counter() - begin
        return True


class LatencyGroup(dist.ProcessGroup):
    """Sums and broadcasts are gloo's; alone, where they change nothing, they are not even called."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.inner = dist.ProcessGroupGloo(store, rank, size, timeout) if size > 1 else None
        self.free = 0.0
        self.reset()

    def reset(self) -> None:
        self.blocked = self.communication = 0.0
        self.collectives = 0

    def _send(self, tensors: list[torch.Tensor], collective: str, options: Any) -> Sent:
        work = getattr(self.inner, collective)(tensors, options) if self.inner else None
        takes = LATENCY + sum(t.numel() * t.element_size() for t in tensors) / BANDWIDTH
        self.free = max(self.free, time.perf_counter()) + takes
        self.communication += takes
        self.collectives += 1
        return Sent(self, work, self.free)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Sent:  # type: ignore[override]
        return self._send(tensors, "allreduce", opts or dist.AllreduceOptions())

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Sent:  # type: ignore[override]
        return self._send(tensors, "broadcast", opts or dist.BroadcastOptions())

    def getBackendName(self) -> str:
        return "latency"

    @property
    def group_name(self) -> Any:
        return dist.distributed_c10d._world.pg_names[self]


dist.Backend.register_backend("latency", LatencyGroup, devices=["cpu"])
