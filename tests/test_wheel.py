"""The built wheel, installed into a fresh environment outside the checkout, is whole."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

from code_metrics import source_files

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_and_imports_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache", "__pycache__")

    def ignore(folder: str, names: list[str]) -> set[str]:
        """Also leaves out runs/ at the top, which may be large; policykd/runs/ is source."""
        return left_out(folder, names) | ({"runs"} if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("policykd-*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"policykd"}
    files = set(zipfile.ZipFile(wheel).namelist())
    sources = [file.path.relative_to(ROOT) for file in source_files(("agents", "envs", "policykd"))]
    installed = {str(p if p.parts[0] == "policykd" else Path("policykd") / p) for p in sources}
    assert installed <= files  # no folder is missing from pyproject.toml
    assert {f"policykd/report/templates/{p.name}" for p in (ROOT / "policykd/report/templates").iterdir()} <= files

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    # The dependencies are borrowed as a plain path, which does not bring the editable install of the checkout along.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import policykd, policykd.envs.atari as a; from pathlib import Path;"
        f"assert policykd.__file__.startswith({str(environment)!r}), policykd.__file__;"
        f"assert a.__file__.startswith({str(environment)!r}), a.__file__;"
        "t = policykd.load_teacher(game='Pong'); e = policykd.make_env('Pong', 1, 0);"
        "print(t(e.reset()).shape)"
    )
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    how: dict[str, Any] = {"check": False, "capture_output": True, "text": True, "cwd": tmp_path, "env": elsewhere}
    done = subprocess.run([python, "-c", code], **how)
    assert done.stdout.strip() == "torch.Size([1, 6])", done.stderr
    helped = subprocess.run([environment / "bin" / "policykd", "--help"], **how)
    assert "train-teacher" in helped.stdout, helped.stderr
