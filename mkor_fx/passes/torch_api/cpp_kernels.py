"""Inductor's C++ kernels compiled together: to start a compiler on one takes a second, the kernel itself a fifth of that.
One of the homes of torch's private APIs."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from torch._inductor.async_compile import AsyncCompile, get_compile_threads, kernel_code_log
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import clear_on_fresh_cache

from ...runtime.balance import deal

log = logging.getLogger(__name__)
#: where each kernel's source begins
ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')
#: kernels for which a further compiler that may run at once is worth its start
FEWEST = 8


class Kernel(NamedTuple):
    """What a generated program asks to be compiled: C++ types of the operands, and the code."""

    types: tuple[str, ...]
    source: str


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """The C++ kernels of a program that Inductor generates inside, or finds in its cache, are a few libraries, one for each
    compiler that may run at once, not one each. The same code with the same options: the same bits."""
    alone, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def ask(self: AsyncCompile, types: list[str], source: str) -> Any:
        if not may_be_joined(source):
            return alone(self, types, source)
        kernel_code_log.info("CPP+Bindings Kernel:\n%s", source)
        return Kernel(tuple(types), source)

    def answer(self: AsyncCompile, scope: dict[str, Any]) -> None:
        asked = {name: value for name, value in scope.items() if isinstance(value, Kernel)}
        try:
            scope.update(zip(asked, loaded(list(asked.values()))))
        except CppCompileError:
            log.info("%d C++ kernels do not compile together: each alone", len(asked), exc_info=True)
            scope.update({name: alone(self, list(kernel.types), kernel.source) for name, kernel in asked.items()})
        wait(self, scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = ask, answer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding, AsyncCompile.wait = alone, wait  # type: ignore[method-assign]


def may_be_joined(source: str) -> bool:
    """Whether code stays what it is inside a namespace: one entry, and no preprocessing but headers and pragmas."""
    directives = [line.lstrip() for line in source.splitlines() if line.lstrip().startswith("#")]
    plain = all(line.startswith(("#include <", "#pragma")) for line in directives)
    return plain and len(ENTRY.findall(source)) == len(re.findall(r"\bkernel\b", source)) == 1


def loaded(kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
    """The kernels as Python functions, in their order, compiled where no cache has them.

    Raises:
        CppCompileError: a library does not compile.
    """
    threads = get_compile_threads()
    places = min(max(1, threads), math.ceil(len(kernels) / FEWEST))
    dealt = deal({str(at): len(kernel.source) for at, kernel in enumerate(kernels)}, [0] * places)
    parts = [[at for at in range(len(kernels)) if dealt[str(at)] == place] for place in range(places)]
    submit = AsyncCompile.submit if threads > 1 else None
    waiting = [Library.load_async(joined([kernels[at] for at in part]), submit_fn=submit) for part in parts]
    found: dict[int, Callable[..., None]] = {}
    for part, library in zip(parts, waiting):
        found.update(zip(part, functions(library(), len(part))))
    return [found[at] for at in range(len(kernels))]


def compiled(kernel: Kernel) -> Callable[..., None]:
    """One kernel as a Python function, compiled where no cache has it.

    Raises:
        CppCompileError: it does not compile.
    """
    return CppPythonBindingsCodeCache.load_pybinding(list(kernel.types), kernel.source)


def joined(kernels: Sequence[Kernel]) -> str:
    """One source of all kernels, each with torch's own binding, a Python module, in a namespace of its own."""
    spaces, headers = [], dict[str, None]()
    for at, kernel in enumerate(kernels):
        name, operands = f"kernel_{at}", enumerate(kernel.types)
        parsed = ", ".join(f"parse_arg<{of.replace('const ', '')}>(args, {n})" for n, of in operands)
        call = f"{name}({parsed}); Py_RETURN_NONE;"
        binding = CppPythonBindingsCodeCache.suffix_template.format(
            arg_len=len(kernel.types), call_entry_func=call, entry_func=name, extra_parse_arg=""
        )
        lines = (ENTRY.sub(f"static void {name}(", kernel.source) + binding).splitlines()
        headers.update(dict.fromkeys(line for line in lines if line.startswith("#include <")))
        body = "\n".join(line for line in lines if not line.startswith("#include <"))
        spaces.append(f"namespace of_{name} {{\n{body}\n}}")
    return "\n".join([*headers, *spaces, ""])


@clear_on_fresh_cache
class Library(CppPythonBindingsCodeCache):
    """A shared library with a Python module a kernel, none of which is loaded yet."""

    cache: ClassVar[dict] = {}
    cache_clear = staticmethod(cache.clear)

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return SimpleNamespace(path=path)  # torch notes the key beside it


def functions(library: Any, count: int) -> list[Callable[..., None]]:
    return [_function(library, f"kernel_{at}") for at in range(count)]


def _function(library: Any, name: str) -> Callable[..., None]:
    class Binding(CppPythonBindingsCodeCache):
        entry_function = name  # a module's, and of what initialises it

    return getattr(Binding._load_library_inner(library.path, library.key), name)
