"""State in float32 beside parameters in half precision."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..prims import accumulation_dtype


class WideState(Optimizer):
    """An optimizer whose floating-point state is in float32, in float64 for float64 parameters, whatever is loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; state keeps its own dtype."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for key, saved in state_dict["state"].get(index, {}).items():
                kept = accumulation_dtype(p.dtype) if saved.is_floating_point() else saved.dtype
                self.state[p][key] = saved.to(p.device, kept, copy=True)
