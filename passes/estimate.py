"""What hardware would take, by Inductor's models of it."""

from __future__ import annotations


def nccl_milliseconds(size: int, ranks: int, collective: str) -> float:
    """Inductor's analytical estimate of a collective over ``size`` bytes on H100s; a broadcast counts as an all-reduce."""
    from torch._inductor import comm_analysis as model

    kinds = model.NCCL_COLL
    found = {"all_gather": kinds.ALL_GATHER, "reduce_scatter": kinds.REDUCE_SCATTER}
    kind = next((kind for name, kind in found.items() if name in collective), kinds.ALL_REDUCE)
    earlier, model.get_gpu_type = model.get_gpu_type, lambda: model.NVIDIA_GPU_TYPE.HOPPER
    try:
        return model.estimate_nccl_collective_runtime_impl(size, ranks, kind)
    finally:
        model.get_gpu_type = earlier
