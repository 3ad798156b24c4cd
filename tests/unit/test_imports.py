"""Imports point down, names that are promised exist, and light processes load nothing heavy."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each may import those after it.
LAYERS = ("pipeline", "adapters", "storage")
TORCH = {"torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "gguf"}


def modules() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(tree: ast.AST, package: str) -> set[str]:
    """Every module that is imported anywhere in a module, also in functions and for types only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level)[0] + "." if node.level else ""
            found.add(base + (node.module or ""))
    return found


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path: Path) -> None:
    layer = LAYERS.index(dotted(path).partition(".")[0])
    tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text("utf-8")), dotted(path))}
    assert not tops & {*LAYERS[:layer], "tests"}


@pytest.mark.parametrize("path", [path for path in modules() if path.name != "__main__.py"], ids=dotted)
def test_every_promised_name_exists(path: Path) -> None:
    """A module has `__all__`, and what it names is there; an empty __init__ promises nothing."""
    if not path.read_text("utf-8").strip():
        return
    module = importlib.import_module(dotted(path))
    names = module.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_only_adapters_import_what_trains(path: Path) -> None:
    if dotted(path).startswith("adapters"):
        return
    tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text("utf-8")), dotted(path))}
    assert not tops & TORCH


def loaded(statement: str) -> set[str]:
    """Top-level packages in a fresh process after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    return set(done.stdout.splitlines())


HELP = """
import pipeline.cli
sys.argv = ["edgewater", "--help"]
try:
    pipeline.cli.main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import storage, storage.ring, storage.registry, storage.folder",
        HELP,
        "import pipeline.ingest",
        "import pipeline.recording, pipeline.running, pipeline.report",
        "import pipeline.looking, pipeline.registry_verbs, pipeline.doctor",
    ],
    ids=["storage", "help", "ingest", "run", "looking"],
)
def test_light_processes_load_nothing_that_trains(statement: str) -> None:
    """Torch alone is 340 MB; the ingest process stays under 110."""
    assert not loaded(statement) & {"torch", "transformers", "peft", "numpy"}


def test_the_command_line_loads_little_to_print_help() -> None:
    """It has to be there at once: no store, no dataflow, no tokenizer."""
    assert not loaded(HELP) & {"lmdb", "bytewax", "fastokens", "msgspec", "zstandard", "prometheus_client"}
