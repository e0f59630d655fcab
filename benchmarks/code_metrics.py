"""Measures the structure of the source: lines per folder, parameters, untyped dicts, packed assignments, comments.

python benchmarks/code_metrics.py
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("agents", "envs", "policykd", "scripts")
_UNTYPED = re.compile(r"\b(?:dict|Mapping|MutableMapping)\[str, Any\]")


@dataclass(frozen=True)
class SourceFile:
    """One Python file of the package or its scripts."""

    path: Path
    text: str

    @property
    def num_lines(self) -> int:
        """Number of lines, comments and blank ones included."""
        return len(self.text.splitlines())

    @property
    def num_code_lines(self) -> int:
        """Number of lines that are neither blank nor a comment alone."""
        return sum(1 for line in self.text.splitlines() if line.strip() and not line.lstrip().startswith("#"))

    @property
    def num_comments(self) -> int:
        """Number of `#` comments, directives for tools left out."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        comments = [t.string for t in tokens if t.type == tokenize.COMMENT]
        return sum(1 for c in comments if not re.match(r"#\s*(noqa|type: ignore|fmt:|ruff:)[^#]*$", c))

    @property
    def num_untyped_dicts(self) -> int:
        """Number of `dict[str, Any]` and `Mapping[str, Any]`."""
        return len(_UNTYPED.findall(self.text))

    @property
    def num_packed_assignments(self) -> int:
        """Number of assignments such as `a, b = x, y`: a tuple on both sides, but not a swap."""
        return sum(1 for node in ast.walk(ast.parse(self.text)) if _is_packed(node))

    @property
    def long_signatures(self) -> list[str]:
        """Functions with more than six parameters, `self` and `cls` not counted."""
        functions = [n for n in ast.walk(ast.parse(self.text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        return [f"{self.path.relative_to(ROOT)}:{f.lineno} {f.name}" for f in functions if _num_parameters(f) > 6]


def source_files(folders: tuple[str, ...] = SOURCE_FOLDERS) -> Iterator[SourceFile]:
    """Yields the Python files of these folders; the links inside policykd/ are not followed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).parts
            if inside[:2] not in (("policykd", "agents"), ("policykd", "envs")):
                yield SourceFile(path, path.read_text())


def _num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    variadic = [a for a in (arguments.vararg, arguments.kwarg) if a]
    return len([name for name in named if name not in ("self", "cls")]) + len(variadic)


def _is_packed(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    (target, *more) = node.targets
    if more or not isinstance(target, ast.Tuple):
        return False
    names = {ast.unparse(element) for element in target.elts}
    return not names & {ast.unparse(element) for element in node.value.elts}


def main() -> None:
    """Prints the measurements."""
    files = list(source_files())
    folders: dict[str, int] = {}
    for file in files:
        folder = str(file.path.parent.relative_to(ROOT))
        folders[folder] = folders.get(folder, 0) + file.num_lines
    for folder, num_lines in sorted(folders.items()):
        print(f"{folder:32} {num_lines:7,} lines")
    num_code = sum(f.num_code_lines for f in files)
    print(f"{'package and scripts':32} {sum(f.num_lines for f in files):7,} lines, {num_code:,} of code")
    for folder in ("benchmarks", "examples", "tests"):
        print(f"{folder:32} {sum(f.num_lines for f in source_files((folder,))):7,} lines")
    print(f"functions with more than six parameters: {sum(len(f.long_signatures) for f in files)}")
    print(f"dict[str, Any] and Mapping[str, Any]: {sum(f.num_untyped_dicts for f in files)}")
    print(
        f"packed assignments per 1,000 code lines: {1000 * sum(f.num_packed_assignments for f in files) / num_code:.1f}"
    )
    print(f"comments per 1,000 code lines: {1000 * sum(f.num_comments for f in files) / num_code:.1f}")


if __name__ == "__main__":
    main()
