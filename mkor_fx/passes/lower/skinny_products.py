"""Products of a few rows with many, on a processor: what sketches are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ...ir import StepGraph, fake_value
from ..core import graph_pass
from ..torch_api.cpp_kernels import Kernel, compiled

aten = torch.ops.aten

#: rows on the left: one is a matrix times a vector; at 16 the general product takes 1.3 to 2 times as long, more is untimed
FEW = range(2, 17)
#: numbers on the right, at least: fewer fit a cache, where the general product is as fast
MANY = 2**16

_library = torch.library.Library("mkor_fx_cpu", "DEF")
_library.define("skinny_mm(Tensor few, Tensor many) -> Tensor")

#: `out[R, M] = few[R, N] many[N, M]`, panels of 8 of the `N` rows after each other: `many`, which no cache holds, is read
#: once and in order, the next panel fetched ahead, at the speed of memory; `out` stays in the first or second cache. The
#: general product copies `many` into blocks first.
SOURCE = r"""
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
using V = at::vec::Vectorized<float>;
constexpr int PANEL = 8, GROUP = 8;

inline void fetch(const float* from) {
#ifdef __GNUC__
  __builtin_prefetch(from);
#endif
}

template <int R>
void add_panel(const float* few, int64_t few_r, int64_t few_n, const float* many, int64_t many_n, float* out, int64_t width,
               int rows, int64_t begin, int64_t end) {
  constexpr int J = V::size() >= 16 ? 2 : 1, STEP = J * V::size();
  float f[PANEL][R];
  for (int n = 0; n < rows; n++)
    for (int r = 0; r < R; r++) f[n][r] = few[r * few_r + n * few_n];
  int64_t m = begin;
  for (; m + STEP <= end; m += STEP) {
    V sum[R][J];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < J; j++) sum[r][j] = V::loadu(out + r * width + m + j * V::size());
    for (int n = 0; n < rows; n++)
      for (int j = 0; j < J; j++) {
        fetch(many + (n + PANEL) * many_n + m + j * V::size());
        const V x = V::loadu(many + n * many_n + m + j * V::size());
        for (int r = 0; r < R; r++) sum[r][j] = at::vec::fmadd(V(f[n][r]), x, sum[r][j]);
      }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < J; j++) sum[r][j].store(out + r * width + m + j * V::size());
  }
  for (; m < end; m++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < rows; n++) out[r * width + m] += f[n][r] * many[n * many_n + m];
}

template <int R>
void add(int r, const float* few, int64_t few_r, int64_t few_n, const float* many, int64_t many_n, float* out,
         int64_t width, int rows, int64_t begin, int64_t end) {
  if (r == R) return add_panel<R>(few, few_r, few_n, many, many_n, out, width, rows, begin, end);
  if constexpr (R > 1) add<R - 1>(r, few, few_r, few_n, many, many_n, out, width, rows, begin, end);
}

extern "C" void kernel(const float* few, const float* many, float* out, const int64_t R, const int64_t N, const int64_t M,
                       const int64_t few_r, const int64_t few_n, const int64_t many_n, const int64_t threads) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, M / 64)), share = (M / parts + 63) / 64 * 64;
  #pragma omp parallel for num_threads(parts) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = std::min(M, part * share), end = part + 1 == parts ? M : std::min(M, begin + share);
    for (int64_t r = 0; r < R; r++) std::fill(out + r * M + begin, out + r * M + end, 0.f);
    for (int64_t n = 0; n < N; n += PANEL)
      for (int64_t r = 0; r < R; r += GROUP)
        add<GROUP>(std::min<int64_t>(GROUP, R - r), few + r * few_r + n * few_n, few_r, few_n, many + n * many_n, many_n,
                   out + r * M, M, std::min<int64_t>(PANEL, N - n), begin, end);
  }
}
"""


@functools.cache
def kernel() -> Callable[..., None]:
    """Of few, many, out, sizes, strides and threads; compiled with Inductor's flags for this processor."""
    return compiled(Kernel(("const float*", "const float*", "float*", *["const int64_t"] * 7), SOURCE))


@torch.library.impl(_library, "skinny_mm", "CPU")
def _skinny_mm(few_RN: Tensor, many_NM: Tensor) -> Tensor:
    many_NM = many_NM if many_NM.stride(1) == 1 else many_NM.contiguous()
    (R, N), M = few_RN.shape, many_NM.shape[1]
    out_RM = few_RN.new_empty(R, M)
    kernel()(few_RN, many_NM, out_RM, R, N, M, *few_RN.stride(), many_NM.stride(0), torch.get_num_threads())
    return out_RM


@torch.library.register_fake("mkor_fx_cpu::skinny_mm", lib=_library)
def _(few_RN: Tensor, many_NM: Tensor) -> Tensor:
    return few_RN.new_empty(few_RN.shape[0], many_NM.shape[1])


@graph_pass(stage="lower")
def skinny_products(step: StepGraph) -> None:
    """``mm(few, many)`` -> ``mkor_fx_cpu::skinny_mm(few, many)``, float32 of known sizes on a CPU, with ``FEW`` rows
    on the left: sketches of rows, and factors by sketches.

    Only for Inductor: what runs operator by operator equals torch's own bit for bit.
    """
    for node in step.graph.find_nodes(op="call_function", target=aten.mm.default):
        if _is_skinny(node):
            kernel()  # compiled with the program, not in its first step
            node.target = torch.ops.mkor_fx_cpu.skinny_mm.default


def _is_skinny(node: fx.Node) -> bool:
    few, many = (fake_value(operand) for operand in node.args)  # type: ignore[arg-type]
    (R, _), (N, M) = few.shape, many.shape
    if not (few.device.type == many.device.type == "cpu" and few.dtype == many.dtype == torch.float32):
        return False
    return all(isinstance(size, int) for size in (R, N, M)) and R in FEW and N * M >= MANY and many.stride(1) == 1
