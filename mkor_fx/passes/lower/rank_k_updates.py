"""Symmetric rank-k updates of factors in their own memory, on a processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...ir import fake_value
from ..sources import library_sources
from ..torch_api.backend import PostGradPass, cpp_wrapper, eliminate_dead_code
from ..torch_api.cpp_kernels import Kernel, compiled
from ..torch_api.tracing import insert
from .outline import COPY

aten = torch.ops.aten

#: rows of a factor, at least: with so many the kernel takes half as long as product and rest, fewer are untimed
LARGE = 256

_library = torch.library.Library("mkor_fx_cpu", "FRAGMENT")
_library.define("rank_k_update_(Tensor(a!) factor, Tensor roots, Tensor divisor, Tensor keep) -> ()")

#: Tiles of the upper triangle of `F / d - X^T X`, and their mirror images: half the work, the same bits on both sides. What
#: the next tile reads and the mirror writes comes near meanwhile: both lie far apart in memory.
SOURCE = r"""
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
#include <vector>
using V = at::vec::Vectorized<float>;
constexpr int64_t TILE = 64, W = V::size(), ROWS = 8;

inline void fetch(const float* from) {
#ifdef __GNUC__
  __builtin_prefetch(from, 1);
#endif
}

inline void update(float* tile, float scale, const float* left, const float* right, int64_t K, const float* next,
                   const float* lower, int64_t D) {
  for (int64_t j = 0; j < TILE; j += W)
    for (int64_t i = 0; i < TILE; i += ROWS) {
      V sum[ROWS];
      for (int a = 0; a < ROWS; a++) {
        fetch(next + (i + a) * D + j);
        fetch(lower + (i + a) * D + j);
        sum[a] = V(0.f);
      }
      for (int64_t k = 0; k < K; k++) {
        const V x = V::loadu(right + k * TILE + j);
        for (int a = 0; a < ROWS; a++) sum[a] = at::vec::fmadd(V(left[k * TILE + i + a]), x, sum[a]);
      }
      for (int a = 0; a < ROWS; a++) {
        float* at = tile + (i + a) * TILE + j;
        (V::loadu(at) * V(scale) - sum[a]).store(at);
      }
    }
}

extern "C" void kernel(float* factor, const float* roots, const float* divisor, const bool* keep, const int64_t K,
                       const int64_t D, const int64_t threads) {
  if (!*keep) return;
  const int64_t tiles = (D + TILE - 1) / TILE, pairs = tiles * (tiles + 1) / 2;
  const float scale = 1 / *divisor;
  std::vector<float> packed(tiles * K * TILE);
  #pragma omp parallel num_threads(threads) if (threads > 1)
  {
    #pragma omp for
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t k = 0; k < K; k++)
        std::copy_n(roots + k * D + t * TILE, std::min(TILE, D - t * TILE), packed.data() + (t * K + k) * TILE);
    float tile[TILE * TILE] = {}, mirror[TILE * TILE];
    #pragma omp for
    for (int64_t pair = 0; pair < pairs; pair++) {
      int64_t i = 0, j = pair;
      while (j >= tiles - i) j -= tiles - i++;
      j += i;
      const int64_t height = std::min(TILE, D - i * TILE), width = std::min(TILE, D - j * TILE);
      const int64_t next_i = j + 1 < tiles ? i : std::min(i + 1, tiles - 1), next_j = j + 1 < tiles ? j + 1 : next_i;
      float *upper = factor + i * TILE * D + j * TILE, *lower = factor + j * TILE * D + i * TILE;
      for (int64_t a = 0; a < height; a++) std::copy_n(upper + a * D, width, tile + a * TILE);
      update(tile, scale, packed.data() + i * K * TILE, packed.data() + j * K * TILE, K,
             factor + next_i * TILE * D + next_j * TILE, lower, D);
      if (i == j)
        for (int64_t a = 0; a < height; a++)
          for (int64_t b = 0; b < a; b++) tile[a * TILE + b] = tile[b * TILE + a];
      for (int64_t a = 0; a < height; a++) std::copy_n(tile + a * TILE, width, upper + a * D);
      if (i == j) continue;
      for (int64_t a = 0; a < TILE; a += W)
        for (int64_t b = 0; b < TILE; b += W)
          at::vec::transpose_mxn<float, W, W>(tile + a * TILE + b, TILE, mirror + b * TILE + a, TILE);
      for (int64_t b = 0; b < width; b++) std::copy_n(mirror + b * TILE, height, lower + b * D);
    }
  }
}
"""


@functools.cache
def kernel() -> Callable[..., None]:
    """Of factor, roots, divisor, keep, sizes and threads; compiled with Inductor's flags for this processor."""
    return compiled(Kernel(("float*", "const float*", "const float*", "const bool*", *["const int64_t"] * 3), SOURCE))


@torch.library.impl(_library, "rank_k_update_", "CPU")
def _rank_k_update_(factor_DD: Tensor, roots_KD: Tensor, divisor: Tensor, keep: Tensor) -> None:
    kernel()(factor_DD, roots_KD.contiguous(), divisor, keep, *roots_KD.shape, torch.get_num_threads())


@torch.library.register_fake("mkor_fx_cpu::rank_k_update_", lib=_library)
def _(factor_DD: Tensor, roots_KD: Tensor, divisor: Tensor, keep: Tensor) -> None:
    return None


class RankKUpdates(PostGradPass):
    """``copy_(F, where(keep, F / d - mm(X^T, X), F))`` -> ``mkor_fx_cpu::rank_k_update_(F, X, d, keep)``, float32 on a CPU:
    half the product, and neither it nor the new factor has memory of its own.

    Of the factor the upper triangle is read alone, so that no rounding can make it unsymmetric.
    """

    def __call__(self, graph: fx.Graph) -> None:
        if cpp_wrapper():
            return
        functions = [part.graph for part in graph.owning_module.modules() if isinstance(part, fx.GraphModule)]
        for function in dict.fromkeys([graph, *functions]):
            update_in_place(function)

    def uuid(self) -> Any:
        return library_sources()


class RankKUpdate(NamedTuple):
    """The operands of ``copy_(F, new)``, ``new`` itself, and what is computed on the way there."""

    factor: fx.Node
    roots: fx.Node
    divisor: fx.Node | float
    keep: list[fx.Node]
    new: fx.Node
    way: list[fx.Node]


def update_in_place(graph: fx.Graph) -> None:
    for copy in graph.find_nodes(op="call_function", target=COPY):
        found = _update(copy)
        if found is None or not _last_to_read(found, copy):
            continue
        kernel()  # compiled with the program, not in its first step
        with graph.inserting_before(found.new):
            divisor, keep = insert(graph, _operands, found.factor, found.divisor, found.keep)
            update = torch.ops.mkor_fx_cpu.rank_k_update_.default
            graph.call_function(update, (found.factor, found.roots, divisor, keep)).meta["val"] = None
        copy.replace_all_uses_with(found.factor)
        graph.erase_node(copy)
        found.new.replace_all_uses_with(found.factor)
    eliminate_dead_code(graph)


def _operands(factor: Tensor, divisor: Tensor | float, keep: list[Tensor]) -> tuple[Tensor, Tensor]:
    every = keep[0]
    for more in keep[1:]:
        every = every & more
    if not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=factor.dtype, device=factor.device)
    return divisor, every


def _update(copy: fx.Node) -> RankKUpdate | None:
    """What a copy writes to a factor, if it is a symmetric rank-k update of it."""
    factor, new = copy.args[:2]
    if factor.op != "placeholder" or not _fits(fake_value(factor)):
        return None
    way, keep, node = list[fx.Node](), list[fx.Node](), new
    while _calls(node, aten.where.self) and node.args[2] is factor and fake_value(node.args[0]).shape == ():
        way.append(node)
        keep.append(node.args[0])
        node = node.args[1]
    if not keep or not _calls(node, aten.sub.Tensor) or node.kwargs:
        return None
    scaled, product = node.args
    if not (_calls(scaled, aten.div.Tensor) and scaled.args[0] is factor and _calls(product, aten.mm.default)):
        return None
    (left, roots), divisor = product.args, scaled.args[1]
    if not (_calls(left, aten.permute.default) and left.args == (roots, [1, 0])):
        return None
    if fake_value(product).shape != fake_value(factor).shape:
        return None
    if isinstance(divisor, fx.Node) and (fake_value(divisor).numel(), fake_value(divisor).dtype) != (1, torch.float32):
        return None
    return RankKUpdate(factor, roots, divisor, keep, new, [*way, node, scaled, product])


def _fits(factor: Tensor) -> bool:
    large = factor.dim() == 2 and isinstance(factor.shape[0], int) and factor.shape[0] >= LARGE
    return large and factor.is_contiguous() and factor.device.type == "cpu" and factor.dtype == torch.float32


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _last_to_read(update: RankKUpdate, copy: fx.Node) -> bool:
    """Whether all else that reads the old factor, none of it a view, stands in front of the new one, nothing else needs what
    is computed on the way there, and the new one is no result: that is a tensor of its own."""
    others = set(update.factor.users).difference([*update.way, copy])
    early = all(node < update.new and not getattr(node.target, "is_view", False) for node in others)
    result = any(user.op == "output" for node in (update.new, copy) for user in node.users)
    return early and not result and all(len(node.users) == 1 for node in update.way if node is not update.new)
