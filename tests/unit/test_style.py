"""What no linter holds: how long a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 80  # lines of a function; a longer one says why on its first line (`# long: …`)
FILES = [*(ROOT / "hvd_lbt").rglob("*.py"), *(ROOT / "docs").glob("*.py"), ROOT / "setup.py"]


@pytest.mark.parametrize("file", sorted(FILES), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_long_function_says_why(file):
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        reason = "# long: " in lines[node.body[0].lineno - 2] + lines[node.lineno - 1]
        assert length <= LONGEST or reason, f"{file.name}: {node.name} has {length} lines"
