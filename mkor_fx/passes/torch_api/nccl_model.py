"""Inductor's model of NCCL, asked about GPUs that are not there. One of the homes of torch's private APIs."""

from __future__ import annotations

from unittest import mock

import torch


def nccl_milliseconds(kind: str, size: int, ranks: int, generation: str) -> float:
    """One collective ``kind`` ("ALL_REDUCE", ...) over ``size`` bytes among ``ranks``, eight to a node, alone on the
    network."""
    from torch._inductor import comm_analysis as model

    gpu = model.NVIDIA_GPU_TYPE[generation]
    with (  # the model asks the machine it runs on; the answers are those of the device in question
        mock.patch.object(model, "get_gpu_type", lambda: gpu),
        mock.patch.object(model, "_has_nvlink", lambda: True),
        mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        return model.estimate_nccl_collective_runtime_impl(size, ranks, model.NCCL_COLL[kind])
