"""Imports point one way: scripts -> policykd -> agents -> envs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"envs": ("policykd.envs",), "agents": ("policykd.agents", "policykd.envs"), "policykd": ("policykd",)}
FOLDERS = [ROOT / layer for layer in ALLOWED]
FOLDERS += [p for p in (ROOT / "policykd").iterdir() if (p / "__init__.py").is_file() and not p.is_symlink()]
SOURCES = sorted(p for folder in FOLDERS for p in folder.glob("*.py"))


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_import_points_up(path: Path) -> None:
    ours = {m for m in imported(path) if m.split(".")[0] in {"policykd", "agents", "envs", "scripts"}}
    assert all(m.startswith(ALLOWED[path.relative_to(ROOT).parts[0]]) for m in ours), ours


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "scripts").glob("*.py"))], ids=lambda p: p.name)
def test_no_file_is_longer_than_a_person_reads_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_one_hop_from_the_command_to_the_gradient() -> None:
    """scripts/distill_atari.py calls distill(), and distill() itself asks autograd for the gradient."""
    assert "distill(" in (ROOT / "scripts" / "distill_atari.py").read_text()
    loop = next(
        node
        for node in ast.parse((ROOT / "policykd" / "distill.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "distill"
    )
    calls = {
        node.func.attr for node in ast.walk(loop) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert {"grad", "step"} <= calls


def test_importing_policykd_is_light() -> None:
    """Neither torch nor an emulator is imported before something needs them."""
    code = (
        "import policykd, sys; heavy = {'torch', 'gymnasium', 'ale_py', 'cv2'} & set(sys.modules);"
        "sys.exit(' '.join(sorted(heavy)) or None)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_package_offers_at_its_top() -> None:
    import policykd

    for name in policykd.__all__:
        assert getattr(policykd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = policykd.nothing
