"""Who may import whom: what CONTRIBUTING.md says of the shape of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The files in the order of the table: each may import those before it.
ORDER = [
    file
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    if line.startswith("|")
    for file in re.findall(r"`((?:gpuconst|kernels)/\w+\.py)`", line)
]


def imported(file: str) -> Iterator[str]:
    """Return the files that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        package = f"gpuconst.{'kernels' if file.startswith('kernels') else ''}".strip(".")
        module = node.module or ""
        if node.level:
            module = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], module]).strip(".")
        if not f"{module}.".startswith("gpuconst."):
            continue
        for name in [module, *(f"{module}.{alias.name}" for alias in node.names)]:
            path = name.replace(".", "/").replace("gpuconst/kernels", "kernels") + ".py"
            if (ROOT / path).exists():
                yield path


def test_the_table_has_every_file() -> None:
    files = {f"{folder}/{path.name}" for folder in ("gpuconst", "kernels") for path in (ROOT / folder).glob("*.py")}
    assert sorted(ORDER) == sorted(files - {"gpuconst/__init__.py", "kernels/__init__.py"})


def test_a_file_imports_only_what_comes_before_it() -> None:
    edges = [(file, other) for file in ORDER for other in imported(file)]
    assert len(edges) > 50
    assert not [(file, other) for file, other in edges if ORDER.index(other) >= ORDER.index(file)]
