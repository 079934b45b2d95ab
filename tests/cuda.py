"""A GPU that is not there: Inductor generates the CUDA program of a graph for it, and Triton compiles its kernels."""

import contextlib
import re
import types
from unittest import mock

import torch
from torch import fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

CAPABILITY = (9, 0)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, gcnArchName="", uuid="0", pci_bus_id=0,
)  # fmt: skip


class Driver:
    """What Triton asks of a CUDA driver when it only compiles."""

    class utils:
        @staticmethod
        def get_device_properties(_):
            return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
                    "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}  # fmt: skip

    is_active = staticmethod(lambda: True)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return lambda *_, **__: 1.0

    def get_current_device(self):
        return 0

    def get_current_stream(self, _=0):
        return 0


@contextlib.contextmanager
def pretended():
    """torch and Triton believe in an H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton

    always = lambda value: lambda *_, **__: value
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 8, "current_device": 0, "init": None,
        "_lazy_init": None, "get_device_properties": PROPERTIES, "get_device_capability": CAPABILITY,
        "get_device_name": PROPERTIES.name, "is_bf16_supported": True, "synchronize": None, "current_stream": None,
        "mem_get_info": (70 << 30, 80 << 30), "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "can_device_access_peer": True,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        replace = lambda where, what, value: stack.enter_context(mock.patch.object(where, what, value, create=True))
        for name, answer in answers.items():
            replace(torch.cuda, name, always(answer))
        for where in (CudaInterface, CudaInterface.Worker):
            replace(where, "get_device_properties", staticmethod(always(PROPERTIES)))
            replace(where, "current_device", staticmethod(always(0)))
        for name, answer in (("device_count", 8), ("is_available", True), ("synchronize", None)):
            replace(CudaInterface, name, staticmethod(always(answer)))
        replace(torch._C, "_cuda_getCurrentRawStream", always(0))
        replace(torch.version, "cuda", "12.8")
        replace(triton_helpers, "set_driver_to_gpu", always(None))
        caches = [f for f in vars(_triton).values() if hasattr(f, "cache_clear")]
        for cached in caches:  # neither what was found without a GPU nor what is found now outlives this
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(Driver())
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        yield


def like(value, device):
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def on_cuda(module, on_host=()):
    """The graph and its inputs over fake CUDA tensors in the place of fake CPU ones; nothing is differentiated.

    Inputs named in ``on_host`` stay on the CPU.
    """
    from torch._inductor.decomposition import select_decomp_table

    device = torch.device("cuda", 0)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    placeholders = module.graph.find_nodes(op="placeholder")
    with mode, torch.no_grad():
        inputs = [like(node.meta["val"], "cpu" if node.name in on_host else device) for node in placeholders]
        run = lambda *tensors: fx.Interpreter(module).run(*tensors)
        return make_fx(run, decomposition_table=select_decomp_table())(*inputs), inputs, mode


def generate(module, keep_order=None, on_host=()):
    """The program that Inductor writes for a lowered graph on a GPU, and the bytes that its kernels read and write;
    ``keep_order`` as in ``compile_graph``."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    programs = []

    class Written(Exception):
        pass

    def write_only(self):
        program, _ = self.codegen()
        moved = sum(node.get_read_write_buffers_sizes() for node in self.scheduler.nodes)
        programs.append((program.value, moved))
        raise Written

    options = {"fx_graph_cache": False, "compile_threads": 1, "post_grad_custom_post_pass": keep_order}
    with pretended(), mock.patch.object(GraphLowering, "compile_to_module", write_only), config.patch(options):
        moved, inputs, mode = on_cuda(module, on_host)
        try:
            with mode, torch.no_grad():
                compile_fx_inner(moved, inputs)
        except Exception as error:
            if not programs:
                raise
            assert isinstance(getattr(error, "inner_exception", error), Written)
    (program,) = programs
    return program


def kernels(code):
    """Name and source of each Triton kernel of a program."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'", code, re.S))


def compile_kernel(name, source):
    """PTX and machine code for sm_90."""
    from torch._inductor import config
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    with pretended(), config.patch(compile_threads=1, use_static_triton_launcher=False):
        kernel = _load_triton_kernel_from_source(name, source)
        kernel.precompile(warm_cache_only=True)
        return [result.kernel.asm for result in kernel.compile_results]
