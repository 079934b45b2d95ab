"""Imports go one way, files stay small, and torch's private APIs are used only where a torch upgrade will look."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"mkor_fx": ROOT / "mkor_fx", "mkor_fx.ops": ROOT / "mkor_fx/ops", "mkor_fx.rules": ROOT / "mkor_fx/rules",
           "mkor_fx.passes": ROOT / "passes", "mkor_fx.runtime": ROOT / "runtime"}  # fmt: skip
#: module name -> file
FILES = {f"{package}.{path.stem}": path for package, folder in FOLDERS.items() for path in sorted(folder.glob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}

#: what a module, or every module of a package, may import of the project beside its own package
ALLOWED = {
    "mkor_fx.ir": set(),
    "mkor_fx.prims": {"mkor_fx.ir"},
    "mkor_fx.dump": set(),
    "mkor_fx.graphs": {"mkor_fx.ir", "mkor_fx.dump", "mkor_fx.coverage", "mkor_fx.report", "mkor_fx.drawing"},
    "mkor_fx.page": set(),
    "mkor_fx.report": {"mkor_fx.page", "mkor_fx.ir", "mkor_fx.graphs", "mkor_fx.coverage"},
    "mkor_fx.drawing": {"mkor_fx.graphs"},
    "mkor_fx.progress": set(),
    "mkor_fx.reasons": set(),
    "mkor_fx.ops.*": {"mkor_fx.ir", "mkor_fx.prims", "mkor_fx.reasons"},
    "mkor_fx.rules.*": {"mkor_fx.ir", "mkor_fx.prims"},
    "mkor_fx.passes.*": {"mkor_fx.ir", "mkor_fx.reasons", "mkor_fx.ops", "mkor_fx.rules", "mkor_fx.prims", "mkor_fx.graphs",
                         "mkor_fx.dump", "mkor_fx.runtime.optimizer"},
    "mkor_fx.runtime.*": {"mkor_fx.ir", "mkor_fx.prims"},
}  # fmt: skip

PRIVATE = {
    "torch._inductor": {"mkor_fx.passes.capture", "mkor_fx.passes.backend", "mkor_fx.passes.estimate"},
    "torch._functorch": {"mkor_fx.passes.capture", "mkor_fx.passes.backend"},
    "torch._guards": {"mkor_fx.passes.capture", "mkor_fx.passes.backend"},
    "torch._dynamo": {"mkor_fx.passes.backend"},
    "torch.distributed.distributed_c10d": {"mkor_fx.runtime.ranks"},
    "torch._logging": {"mkor_fx.passes.capture"},
}


def imports(module):
    """Absolute names of the project's modules that a module imports, wherever in it."""
    package = module.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES or name in FOLDERS else base for name in inner}
    return {name for name in found if name.split(".")[0] == "mkor_fx"}


def names(module):
    """Every dotted name in a module's code: attribute chains and imports."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def held(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_imports_are_read_right():
    assert "mkor_fx.ir" in imports("mkor_fx.ops.linear")
    assert "mkor_fx.passes.core" in imports("mkor_fx.passes.match")
    assert "mkor_fx.runtime.optimizer" in imports("mkor_fx.passes.optimizer")
    assert any(held(name, "torch._functorch") for name in names("mkor_fx.passes.capture"))


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    package = module.rpartition(".")[0]
    allowed = ALLOWED.get(module, ALLOWED.get(f"{package}.*"))
    if allowed is None:  # the doors, which put the rest together
        assert package == "mkor_fx"
        return
    own = set() if package == "mkor_fx" else {package}
    foreign = {name for name in imports(module) if not any(held(name, one) for one in allowed | own)}
    assert not foreign, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("private", PRIVATE)
def test_private_torch_apis_stay_where_they_are_meant_to_be(private):
    users = {module for module in FILES if any(held(name, private) for name in names(module))}
    new, gone = users - PRIVATE[private], PRIVATE[private] - users
    assert not new and not gone, f"new: {sorted(new)}, gone: {sorted(gone)}"


def test_files_stay_small_and_are_named_for_what_they_do():
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES.values()}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    assert not {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"} & set(lines)


def test_every_file_says_what_it_is_for():
    silent = [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    assert silent == []
