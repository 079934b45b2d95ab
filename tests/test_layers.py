"""The shape of the house, measured on every file of the library by its path: imports go one way, torch's private APIs are
used where a torch upgrade will look, names say what they name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mkor_fx"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
IDS = [str(path.relative_to(ROOT)) for path in FILES]
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=IDS)

#: floors of the house from the ground up: a file imports what stands below its own, and its neighbours on it
FLOORS = [
    ["ir.py", "hardware.py", "kinds.py", "reasons.py"],
    ["prims.py"],
    ["ops/*", "rules/*", "optim/*", "nn/*"],
    ["runtime/*"],
    ["show/dump.py", "show/recorder.py"],
    ["passes/__init__.py", "passes/naming.py", "passes/sources.py"],
    ["passes/torch_api/*"],
    ["passes/core.py"],
    ["passes/match/*"],
    ["passes/order/*"],
    ["passes/write/*"],
    ["passes/lower/*"],
    ["passes/pipeline.py"],
    ["passes/joint_pass.py", "passes/update_program.py"],
    ["show/*"],
    ["options.py"],
    ["doors/*"],
    ["api.py"],
    ["integrations/*"],
    ["__init__.py", "__main__.py"],
]
#: what knows neither rules nor graphs, and what knows no models: the former are handed in as callables
BLIND = {
    "runtime/*": ("rules/", "ops/", "passes/", "prims.py"),
    "rules/*": ("ops/", "runtime/"),
    "nn/*": ("ir.py", "kinds.py", "reasons.py", "prims.py", "ops/", "rules/", "optim/"),
}

#: torch's private APIs, and the files that may use them
PRIVATE = {
    "torch._C": {"passes/torch_api/backend.py", "passes/torch_api/capture.py", "passes/torch_api/dynamo.py",
                 "passes/torch_api/tracing.py"},
    "torch._dispatch": {"passes/torch_api/backend.py", "passes/torch_api/tracing.py"},
    "torch._dynamo": {"passes/torch_api/backend.py", "passes/torch_api/dynamo.py"},
    "torch._functorch": {"passes/torch_api/backend.py", "passes/torch_api/capture.py"},
    "torch._guards": {"passes/torch_api/backend.py", "passes/torch_api/dynamo.py"},
    "torch._inductor": {"passes/torch_api/backend.py", "passes/torch_api/capture.py", "passes/torch_api/cpp_kernels.py",
                        "passes/torch_api/nccl_model.py", "passes/torch_api/outlined.py"},
    "torch._logging": {"passes/torch_api/capture.py"},
    "torch._subclasses": {"passes/torch_api/backend.py", "passes/torch_api/tracing.py"},
    "torch.autograd.Variable._execution_engine": {"runtime/carriers.py"},
    "torch.compiler._is_compiling_flag": {"passes/torch_api/dynamo.py"},
    "torch.distributed.distributed_c10d": {"runtime/ranks.py"},
    "torch.utils._ordered_set": {"passes/torch_api/backend.py"},
    "torch.utils._python_dispatch": {"runtime/in_flight.py"},
}  # fmt: skip
#: names with an underscore that are as good as public: an operator's type, operators themselves, pytrees
COMMON = ("torch._ops", "torch._grouped_mm", "torch.ops._c10d_functional", "torch.ops.aten", "torch.utils._pytree")


def inside(path):
    return str(path.relative_to(PACKAGE))


def floor_of(path):
    name = inside(path)
    exact = [i for i, floor in enumerate(FLOORS) if name in floor]
    folder = [i for i, floor in enumerate(FLOORS) if any(p.endswith("/*") and name.startswith(p[:-1]) for p in floor)]
    found = exact or folder
    assert found, f"{name} stands on no floor"
    return found[-1]


def module_file(name):
    """The file of the project's module ``mkor_fx.a.b``, or None."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py" if path.is_dir() else None


def imports(path):
    """The files of the project that a file imports, wherever in it."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if module_file(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        found |= {module_file(name) for name in names if name.split(".")[0] == "mkor_fx"}
    assert None not in found
    return found - {path}


def names(path):
    """Every dotted name in a file's code: attribute chains and imports."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def held(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_imports_are_read_right():
    assert len(FILES) > 90 and PACKAGE / "ir.py" in imports(PACKAGE / "ops/linear.py")
    assert PACKAGE / "passes/core.py" in imports(PACKAGE / "passes/match/find_sites.py")
    assert PACKAGE / "runtime/inputs.py" in imports(PACKAGE / "passes/write/step_draft.py")
    assert PACKAGE / "passes/pipeline.py" in imports(PACKAGE / "doors/modes.py")
    assert any(held(name, "torch._functorch") for name in names(PACKAGE / "passes/torch_api/capture.py"))


@EACH_FILE
def test_imports_go_one_way(path):
    own = floor_of(path)
    above = {inside(other): floor_of(other) for other in imports(path) if floor_of(other) > own}
    assert above == {}
    for pattern, unseen in BLIND.items():
        if inside(path).startswith(pattern[:-1]):
            seen = [inside(other) for other in imports(path) if inside(other).startswith(unseen)]
            assert seen == []


def test_no_circle_of_files():
    done, under_way = set(), []

    def visit(path):
        assert path not in under_way, f"circle: {[inside(p) for p in [*under_way[under_way.index(path):], path]]}"
        if path not in done:
            under_way.append(path)
            for other in sorted(imports(path)):
                visit(other)
            done.add(under_way.pop())

    for path in FILES:
        visit(path)


def private(name):
    """Whether a dotted name leads through something that torch does not show."""
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
    return parts[0] == "torch" and hidden and not any(held(name, common) for common in COMMON)


@EACH_FILE
def test_private_torch_apis_stay_where_they_are_meant_to_be(path):
    used = {name for name in names(path) if private(name) or held(name, "torch.distributed.distributed_c10d")}
    astray = {name for name in used if not any(held(name, prefix) and inside(path) in users
                                               for prefix, users in PRIVATE.items())}  # fmt: skip
    assert astray == set()


@pytest.mark.parametrize("prefix", PRIVATE)
def test_every_home_of_a_private_api_uses_it(prefix):
    users = {inside(path) for path in FILES if any(held(name, prefix) for name in names(path))}
    assert PRIVATE[prefix] == users
    design = (ROOT / "docs/design.md").read_text()
    assert [user for user in users if user not in design] == []


def test_what_only_rules_know_is_in_rules():
    """Names of one rule's state and options, and a look at whether a rule has some option."""
    for path in FILES:
        if not inside(path).startswith("rules/"):
            text = path.read_text()
            for word in ('"L"', '"R"', "'L'", "'R'", "max_factor", "rescale=", 'getattr(rule, "rescale"'):
                assert word not in text, f"{inside(path)} holds {word}"


def test_files_stay_small_and_are_named_for_what_they_do():
    lines = {inside(path): len(path.read_text().splitlines()) for path in FILES}
    most = {name: 200 if name.startswith("rules/") else 300 for name in lines}
    assert {name: count for name, count in lines.items() if count > most[name]} == {}
    assert not {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"} & {path.name for path in FILES}


def test_no_two_files_and_no_two_classes_of_one_name():
    files, classes = {}, {}
    for path in FILES:
        if path.name != "__init__.py":
            files.setdefault(path.name, []).append(inside(path))
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name.lstrip("_"), []).append(inside(path))
    assert {name: where for name, where in files.items() if len(where) > 1} == {}
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


@EACH_FILE
def test_a_pass_lives_in_the_file_of_its_name(path):
    for node in TREES[path].body:
        decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        if any(d.startswith("graph_pass(") for d in decorators):
            assert node.name == path.stem


#: keywords of the two doors and of what stands beside them are the users' own; so are an optimizer's
DOORS = {"compile", "compile_step", "simulate", "explain"}


@EACH_FILE
def test_functions_take_few_parameters(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and node.name not in DOORS | ({"__init__"} if "optim" in path.parts else set()):
            arguments = node.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            assert count <= 8, f"{node.name} takes {count}"


def test_every_file_says_what_it_is_for():
    silent = [inside(path) for path, tree in TREES.items() if len(ast.get_docstring(tree) or "") < 10]
    assert silent == []


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_the_folders_at_the_top_show_those_of_the_package(name):
    shown, kept = ROOT / name, PACKAGE / name
    assert shown.is_dir() and not shown.is_symlink() and kept.is_dir() and not kept.is_symlink()
    entries = lambda folder: {p.name: p for p in folder.iterdir() if p.name != "__pycache__"}
    assert entries(shown).keys() == entries(kept).keys()
    assert all(p.is_symlink() and p.resolve() == (kept / n).resolve() for n, p in entries(shown).items())
