"""Who may import whom: imports point down, so that each file can be read without those above it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {  # what each may import of the project
    "mf_diffusers": {"mf_diffusers"},
    "finetune": {"mf_diffusers", "finetune"},
    "comfyui_nodes": {"mf_diffusers", "comfyui_nodes"},
}
FOLDERS = ["scenes", "config", "data", "training", "preflight", "measures", "scripts"]  # of finetune/, lowest first


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str, *, everywhere: bool = True) -> set[str]:
    """The project's modules that a module imports, also inside functions unless `everywhere` is False."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            # `from package import name` means the module of that name where there is one.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {other for other in found if other in MODULES and other != name}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package):
    for name in MODULES:
        if name.split(".")[0] == package:
            assert {other.split(".")[0] for other in imported(name)} <= PACKAGES[package], name


def test_no_imports_go_in_a_circle():
    TopologicalSorter({name: imported(name, everywhere=False) for name in MODULES}).prepare()  # raises CycleError


def floor(name: str) -> int:
    """The place of a module of finetune/ in `FOLDERS`; a file beside the folders is a script, but for config.py."""
    folder = name.split(".")[1]
    return FOLDERS.index(folder) if folder in FOLDERS else FOLDERS.index("scripts")


def test_folders_of_the_training_import_only_lower_ones():
    names = [name for name in MODULES if name.startswith("finetune.")]
    assert {name.split(".")[1] for name in names if name.count(".") > 1} == set(FOLDERS) - {"config", "scripts"}
    upward = [(a, b) for a in names for b in imported(a) if b.startswith("finetune.") and floor(b) > floor(a)]
    assert not upward


def test_tests_import_no_tests():
    """What they share is in modules that are no tests, whose fixtures they ask for as plugins."""
    importing = [
        path.name
        for path in sorted((ROOT / "tests").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("test_", "conftest"))
    ]
    assert not importing
