"""Settings with which compilations take less time, here and in the ranks."""

import gc

import torch
import torch._dynamo.guards

# Graphs are millions of small objects that live on: to look through them all the time takes a tenth of the tests' time.
gc.set_threshold(200_000, 20, 100)
torch._dynamo.config.run_gc_after_compile = False
# Dynamo empties the processor's caches behind each compilation, to log how long its guards take: 30 ms.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
