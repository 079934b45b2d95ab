"""C++ kernels of a generated program: compiled together, each what it is alone."""

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.exc import CppCompileError

import mkor_fx
from mkor_fx.passes.torch_api import cpp_kernels
from mkor_fx.passes.torch_api.cpp_kernels import Kernel, compiled_together, joined, loaded, may_be_joined

TYPES = ["const float*", "float*"]
SOURCE = """
#include <torch/csrc/inductor/cpp_prefix.h>
static inline float changed(float x) {{ return {change}; }}
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0)
{{
    #pragma GCC ivdep
    for(int64_t x0=0; x0<4; x0+=1) out_ptr0[x0] = changed(in_ptr0[x0]);
}}
"""
DOUBLED, SQUARED = SOURCE.format(change="2 * x"), SOURCE.format(change="x * x")


def asked(*sources):
    """Kernels as a generated program asks for them and has them, by name."""
    program = AsyncCompile()
    scope = {f"kernel_of_{at}": program.cpp_pybinding(TYPES, source) for at, source in enumerate(sources)}
    program.wait(scope)
    return list(scope.values())


def results(kernels):
    given = torch.tensor([1.0, -2.0, 3.5, 0.1])
    found = [torch.empty(4) for _ in kernels]
    for kernel, result in zip(kernels, found):
        kernel(given, result)
    return torch.stack(found)


def libraries():
    return len(cpp_kernels.Library.cache)


def test_each_is_what_it_is_alone_in_one_library():
    """The helper functions of both have one name, as templates of products have."""
    before = libraries()
    with compiled_together():
        together = asked(DOUBLED, SQUARED)
    assert libraries() == before + 1
    assert torch.equal(results(together), results(asked(DOUBLED, SQUARED)))
    assert results(together)[1].tolist() == (torch.tensor([1.0, -2.0, 3.5, 0.1]) ** 2).tolist()


def test_as_many_libraries_as_compilers_but_none_of_a_few_kernels(monkeypatch):
    asked_for = []

    def load(source, submit_fn):
        asked_for.append(source)
        return lambda: cpp_kernels.SimpleNamespace(path="", key="")

    monkeypatch.setattr(cpp_kernels.Library, "load_async", load)
    monkeypatch.setattr(cpp_kernels, "functions", lambda library, count: [print] * count)
    for threads, kernels, expected in ((1, 40, 1), (4, 40, 4), (64, 40, 5), (64, 3, 1), (4, 0, 0)):
        monkeypatch.setattr(cpp_kernels, "get_compile_threads", lambda threads=threads: threads)
        asked_for.clear()
        assert len(loaded([Kernel(tuple(TYPES), DOUBLED)] * kernels)) == kernels
        assert len(asked_for) == expected
        assert sum(source.count("PyInit_") for source in asked_for) == kernels


def test_headers_come_first_and_once():
    lines = joined([Kernel(tuple(TYPES), DOUBLED), Kernel(tuple(TYPES), SQUARED)]).splitlines()
    at = [n for n, line in enumerate(lines) if line.startswith("#include")]
    assert at == list(range(len(at))) and len({lines[n] for n in at}) == len(at)


@pytest.mark.parametrize(
    "source",
    [
        DOUBLED.replace("static inline", "#define TWICE\nstatic inline"),
        DOUBLED.replace("static inline", '#include "/somewhere/else.h"\nstatic inline'),
        DOUBLED.replace("changed", "kernel"),
        DOUBLED.replace('extern "C"', 'extern "C" __declspec(dllexport)'),
    ],
    ids=["a macro", "a file", "a name twice", "another linkage"],
)
def test_what_a_namespace_would_change_is_compiled_alone(source):
    assert may_be_joined(DOUBLED) and not may_be_joined(source)


def test_with_one_that_stays_alone_beside():
    before, other = libraries(), DOUBLED.replace("static inline", "#define TWICE 2\nstatic inline").replace("2 *", "TWICE *")
    with compiled_together():
        mixed = asked(other, SQUARED)
    assert libraries() == before + 1
    assert torch.equal(results(mixed), results(asked(DOUBLED, SQUARED)))


def test_kernels_that_do_not_compile_together_are_compiled_alone():
    """Functions of one C name do not go into one library."""
    sources = [source.replace("static inline", 'extern "C"') for source in (DOUBLED, SQUARED)]
    assert all(map(may_be_joined, sources))
    with pytest.raises(CppCompileError):
        loaded([Kernel(tuple(TYPES), source) for source in sources])
    with compiled_together():
        together = asked(*sources)
    assert torch.equal(results(together), results(asked(DOUBLED, SQUARED)))


def test_an_error_names_the_kernel_and_leaves_torch_as_it_was():
    alone, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    with pytest.raises(CppCompileError, match="no_such_function"), compiled_together():
        asked(DOUBLED, SOURCE.format(change="no_such_function(x)"))
    assert (AsyncCompile.cpp_pybinding, AsyncCompile.wait) == (alone, wait)


@pytest.mark.parametrize("door", ["compile", "compile_step"])
def test_programs_of_both_doors_come_as_few_libraries(door, monkeypatch):
    """No kernel of theirs is compiled alone, the backward's neither, and none anew when Inductor has the program."""
    alone = []
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, types, source: alone.append(source))

    def losses():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batch = torch.randn(8, 6), torch.randn(8, 2)
        loss_fn = torch.nn.functional.mse_loss
        if door == "compile_step":
            step = mkor_fx.compile_step(model, loss_fn, optimizer)
            return [step(*batch).item() for _ in range(2)]
        model, found = mkor_fx.compile(model), []
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_fn(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    before = libraries()
    first, built = losses(), libraries()
    assert before < built and not alone
    assert losses() == first and libraries() == built
