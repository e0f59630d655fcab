"""The shape of the code: imports point one way, signatures are short, values that cross modules are typed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from code_metrics import ROOT, SourceFile, source_files

import policykd

# From the ground floor up: a module may import from its own layer and those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("policykd.io",),
    ("policykd.envs",),
    ("policykd.agents",),
    (
        "policykd.collector",
        "policykd.loop",
        "policykd.losses",
        "policykd.methods",
        "policykd.multi_game",
        "policykd.optimizer",
        "policykd.replay",
        "policykd.schedules",
        "policykd.states",
        "policykd.train_state",
        "policykd.trainer",
    ),
    ("policykd.storage", "policykd.importers"),
    ("policykd.evaluation",),
    ("policykd.runs",),
    ("policykd.export",),
    # What a policy costs in every runtime is measured on exported files.
    ("policykd.evaluation.profile", "policykd.evaluation.runtimes"),
    ("policykd.compression", "policykd.rl"),
    ("policykd.viewer", "policykd.report"),
    # The whole jobs, which use everything.
    (
        "policykd.runs.distill_run",
        "policykd.runs.multi_game_run",
        "policykd.runs.distill_rl_run",
        "policykd.runs.finish",
    ),
    ("policykd.cli", "policykd.__main__"),
    ("scripts",),
)
FILES = list(source_files())


def module_name(file: SourceFile) -> str:
    parts = [*file.path.relative_to(ROOT).with_suffix("").parts]
    if parts[0] in ("agents", "envs"):
        parts = ["policykd", *parts]
    return ".".join(parts).removesuffix(".__init__")


def layer(module: str) -> int:
    """Returns the layer of the longest name that a module is in."""
    found = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} belongs to no layer; add it to LAYERS"
    return max(found)[1]


def imported_modules(file: SourceFile) -> set[str]:
    """Returns the first-party modules that a file imports, wherever in the file."""
    modules = set()
    for node in ast.walk(ast.parse(file.text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in modules if module.startswith(("policykd.", "scripts."))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.path.relative_to(ROOT)))
def test_imports_point_to_lower_layers(file: SourceFile) -> None:
    name = module_name(file)
    if name == "policykd":  # its names are imported when they are first used
        return
    upwards = {module for module in imported_modules(file) if layer(module) > layer(name)}
    assert not upwards


def test_the_test_of_layers_sees_an_import_that_points_up() -> None:
    file = SourceFile(ROOT / "policykd" / "io" / "x.py", "from policykd.agents import student\n")
    assert {layer(module) > layer(module_name(file)) for module in imported_modules(file)} == {True}


def test_no_function_has_more_than_six_parameters() -> None:
    assert [name for file in FILES for name in file.long_signatures] == []


def test_few_values_are_untyped() -> None:
    """Environments' positions in checkpoints and foreign libraries' keywords are arbitrary; nothing else is."""
    assert sum(file.num_untyped_dicts for file in FILES) < 20


def test_statements_are_not_packed() -> None:
    num_code_lines = sum(file.num_code_lines for file in FILES)
    assert 1000 * sum(file.num_packed_assignments for file in FILES) / num_code_lines < 5


def test_json_of_others_is_read_in_one_place() -> None:
    """Others call json.loads only on pipes between their own processes, or run without policykd."""
    callers = {str(file.path.relative_to(ROOT)) for file in FILES if "json.load" in file.text}
    assert callers <= {"envs/workers.py", "policykd/evaluation/runtimes.py", "policykd/export/numpy_policy.py"}


def test_two_calls_from_the_loop_to_the_gradient() -> None:
    """The loop calls Trainer.step, which calls Trainer._gradients, which asks autograd for the gradient."""

    def calls(path: str, function: str) -> set[str]:
        tree = ast.parse((ROOT / path).read_text())
        (body,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        return {n.attr for n in ast.walk(body) if isinstance(n, ast.Attribute)}

    assert "step" in calls("policykd/loop.py", "_rounds")
    assert "_gradients" in calls("policykd/trainer.py", "step")
    assert "grad" in calls("policykd/trainer.py", "_gradients")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_policykd_is_light() -> None:
    """Neither torch nor an emulator is imported before something needs them."""
    heavy = run_python(
        "import policykd, sys; print(*sorted({'torch', 'gymnasium', 'ale_py', 'cv2', 'pydantic'} & set(sys.modules)))"
    )
    assert heavy == ""


def test_the_main_command_loads_few_modules() -> None:
    """What `policykd distill` imports before it does anything."""
    loaded = run_python(
        "import policykd.runs.distill_run, policykd.cli.distill, sys;"
        "print(len([m for m in sys.modules if m.split('.')[0] == 'policykd']))"
    )
    assert int(loaded) <= 45


def test_public_names() -> None:
    for name in policykd.__all__:
        assert getattr(policykd, name) is not None
    assert callable(policykd.distill)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = policykd.nothing


@pytest.mark.parametrize("link", ["agents", "envs"])
def test_the_links_lead_to_the_top_level_folders(link: str) -> None:
    assert (ROOT / "policykd" / link).resolve() == Path(ROOT / link).resolve()
