"""What can be said of state tensors, by what their rules say that they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..kinds import Kind


def _extremes(factor: Tensor) -> Tensor:
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if factor.dim() > 1 else factor
    return torch.stack([diagonal.amin(), diagonal.amax()])


def _deviation(basis: Tensor) -> Tensor:
    wide = basis.to(torch.float32)
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return (wide.mT @ wide - identity).abs().amax().reshape(1)


def _root_mean_square(moment: Tensor) -> Tensor:
    return moment.to(torch.float64).square().mean().sqrt().reshape(1)


#: kind -> how a tensor is measured, and for each number of that its name and, over all tensors, a name and what it is
_MEASURES: dict[Kind, tuple[Callable[[Tensor], Tensor], list[tuple[str, str, Callable]]]] = {
    Kind.POSITIVE: (_extremes, [("min", "factor_min", min), ("max", "factor_max", max)]),
    Kind.ORTHOGONAL: (_deviation, [("deviation", "orthogonality", max)]),
    Kind.MOMENT: (_root_mean_square, [("rms", "moment", max)]),
}


def measure(tensors: Mapping[str, Tensor], kinds: Mapping[str, Kind | None], each: bool) -> dict[str, float]:
    """Numbers by name; ``each`` adds those of every tensor. Waits for the device once."""
    chosen = {key: _MEASURES[kind] for key in tensors if (kind := kinds[key]) is not None and tensors[key].numel()}
    if not chosen:
        return {}
    with torch.no_grad():
        parts = [function(tensors[key].detach()).to(torch.float64) for key, (function, _) in chosen.items()]
        values = iter(torch.cat([part.to(parts[0].device, non_blocking=True) for part in parts]).tolist())
    found: dict[str, float] = {}
    own: dict[str, float] = {}
    for key, (_, numbers) in chosen.items():
        for name, overall, combine in numbers:
            value = next(values)
            found[overall] = combine(found[overall], value) if overall in found else value
            own[f"{key}.{name}"] = value
    return found | (own if each else {})
