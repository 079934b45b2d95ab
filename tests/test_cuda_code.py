"""The CUDA program of a whole step on two ranks, made without a GPU: its order, its silence, its kernels' number and
machine code, what it moves."""

import dataclasses
import importlib.util
import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from mkor_fx import MKOR, Communication

LAYERS, WIDTH = 3, 64

if importlib.util.find_spec("triton") is None:
    if os.environ.get("MKOR_FX_REQUIRE_TOOLS") == "1":
        pytest.fail("triton is not installed, and MKOR_FX_REQUIRE_TOOLS=1")
    pytest.skip("triton is not installed: pip install triton==3.7.0", allow_module_level=True)


@dataclasses.dataclass
class Generated:
    """Text of a program, by kernel what Triton made of it, and its collectives; the bytes that kernels and products read and
    write; the graph breaks of its capture."""

    code: str
    kernels: dict
    collectives: list
    moved: int
    breaks: int


def program_and_kernels(folder):
    """In a process of its own: torch is told of a GPU."""
    import cuda
    import torch.distributed as dist
    from torch._dynamo.utils import counters

    from mkor_fx.doors.simulate import trace_step
    from mkor_fx.options import Options
    from mkor_fx.passes.order.collectives import Group, describe
    from mkor_fx.passes.order.pin import Overlap

    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(LAYERS))
    model, x = nn.Sequential(*blocks), torch.randn(16, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_fn = nn.functional.mse_loss
    communication = Communication(statistics_bytes=2 * WIDTH * 4, gradient_bytes=WIDTH * WIDTH * 4)
    group = Group(dist.group.WORLD.group_name, 2, communication.sizes)
    options = Options(rule=MKOR.published(), communication=communication)
    written = trace_step(model, (x, x), {}, loss_fn, optimizer, options, group)
    code, moved = cuda.generate(written.whole.module, Overlap())
    made = {name: cuda.compile_kernel(name, source) for name, source in cuda.kernels(code).items()}
    sizes = {name: [(asm["ptx"][:400], len(asm["cubin"])) for asm in variants] for name, variants in made.items()}
    collectives = describe(written.graphs["schedule"].graph)
    return Generated(code, sizes, collectives, moved, sum(counters["graph_break"].values()))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cuda"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(program_and_kernels, folder).result(timeout=300)


def calls(code):
    """Products, kernels, starts and waits in the order of the program."""
    kinds = {r"all_reduce_\.default\(": "start", r"wait_tensor\.default\(": "wait",
             r"extern_kernels\.\w*mm\(": "product", r"triton_\w+\.run\(": "kernel"}  # fmt: skip
    found = []
    for line in body(code):
        found += [kind for pattern, kind in kinds.items() if re.search(pattern, line)]
    return found


def body(code):
    lines = code[code.index("def call(") : code.index("def benchmark_compiled_module")].splitlines()
    return [line.strip() for line in lines if line.strip()[:1] != "#"]


def test_every_kernel_compiles_for_sm_90(generated):
    code, kernels = generated.code, generated.kernels
    assert len(kernels) == code.count("@triton.jit") > 10
    assert set(kernels) == set(re.findall(r"(triton_\w+)\.run\(", code))
    for variants in kernels.values():
        assert variants and all(".target sm_90" in ptx and size > 1000 for ptx, size in variants)


def test_the_step_is_one_program_of_few_kernels(generated):
    order = calls(generated.code)
    assert generated.breaks == 0 and generated.code.count("def call(") == 1
    assert order.count("product") == (3 * LAYERS - 1) + 3 * LAYERS  # of the layers; two sides of a gradient, one of its bias
    assert order.count("kernel") <= 38 * LAYERS


def test_what_is_moved_beside_what_has_to_be(generated):
    """Matrices of ``WIDTH`` that each layer reads or writes at least; rows, a quarter of one, go uncounted."""
    layer = 2 + 1  # forward and backward read the weight, the backward makes its gradient
    over_ranks = 2  # in and out
    factors = 2 * (2 + 1)  # read for the update, read and written by it
    products = 2 * (2 + 1)
    adamw = 4 + 3  # weight, direction and two moments; all but the direction are written
    least = LAYERS * (layer + over_ranks + factors + products + adamw) * WIDTH**2 * 4
    assert least < generated.moved < 2.75 * least  # 2.64


def test_nothing_waits_for_the_device(generated):
    text = "\n".join(body(generated.code))
    for host in (".item(", ".cpu(", ".tolist(", "synchronize", "_cpu(", "cpp_fused", "device='cpu'", ".copy_("):
        assert host not in text


def test_collectives_run_under_the_products(generated):
    order = calls(generated.code)
    assert order.count("start") == order.count("wait") == len(generated.collectives) >= 2 * LAYERS
    first_wait = order.index("wait")
    assert "start" not in order[first_wait:]
    assert "start" in order[: order.index("product") + 2 * LAYERS + 2]  # the first statistics leave in the forward
    heavy = [kind for kind in order if kind != "kernel"]
    backward, update = heavy[: heavy.index("wait")], heavy[heavy.index("wait") :]
    assert backward.count("product") == 3 * LAYERS - 1  # the input needs no gradient
    assert sum(pair == ("start", "product") for pair in pairwise(backward)) >= LAYERS
    assert sum(pair == ("product", "wait") for pair in pairwise(update)) >= 2  # updates hide the last ones


def test_waits_come_in_the_order_of_starts(generated):
    lines = "\n".join(body(generated.code))
    started = re.findall(r"all_reduce_\.default\((\w+),", lines)
    assert re.findall(r"wait_tensor\.default\((\w+)\)", lines) == started
