"""Links and paths lead somewhere, pages read the same on the site as in the repository, the reference is complete."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import pytest
import typer

import heedful
from heedful.cli import app

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="runs in a source tree only")

TEXTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    if path.exists()
)
# Pages of the site that are made from files of the root.
COPIES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
CODE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")
PATH = re.compile(r"`((?:src|engine|bridge|benchmarks|docs|examples|tests|requirements)/[\w./]*)`")


def prose(name: str) -> str:
    return CODE.sub("", (ROOT / name).read_text())


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(str(path.relative_to(ROOT))), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links(name: str) -> None:
    for target in LINK.findall(prose(name)):
        if "://" in target:
            parts = urlparse(target)
            assert parts.scheme == "https", target
            assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), target
            continue
        where, _, anchor = target.partition("#")
        path = (ROOT / name).parent / where if where else ROOT / name
        if path.parent == ROOT / "docs" and path.name in COPIES:
            path = ROOT / COPIES[path.name]
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.resolve()), target


@pytest.mark.parametrize("name", TEXTS)
def test_paths(name: str) -> None:
    assert [path for path in PATH.findall(prose(name)) if not (ROOT / path).exists()] == []


def docstrings() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "src/heedful").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


def test_paths_and_links_in_docstrings() -> None:
    for where, text in docstrings():
        for path in PATH.findall(text):
            assert (ROOT / path).exists(), f"{where}: {path}"
        for url in re.findall(r"https?://[^\s)`]+", text):
            assert urlparse(url).netloc, f"{where}: {url}"


@pytest.mark.parametrize("name", TEXTS)
def test_lists_begin_behind_an_empty_line(name: str) -> None:
    """The site's Markdown takes them for more of the paragraph otherwise, where GitHub's does not."""
    lines = prose(name).splitlines()
    for before, line in pairwise(lines):
        if re.match(r"(- |\d+\. )", line):
            assert not before.strip() or re.match(r"(- |\d+\. |\s|#)", before), line


def test_commands_exist() -> None:
    """Commands and options of `heedful`, and targets of make, in blocks that are no program's code."""
    commands = typer.main.get_command(app).commands
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in TEXTS:
        blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)
        for line in "".join(blocks).splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert all(word in targets or "=" in word for word in words[1:]), f"{name}: {line}"
            elif words[:1] == ["heedful"]:
                command = commands[words[1]]
                options = {option for parameter in command.params for option in parameter.opts}
                # What stands behind the script is the script's.
                given = words[2:3] if words[1] == "run" else words[2:]
                assert {word for word in given if word.startswith("-")} <= options, f"{name}: {line}"


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    modules = ["heedful", "heedful.hf", *(f"heedful.{name}" for name in heedful._SUBPACKAGES)]
    # A module without a page gets one of all its names when the site is built.
    whole = {*re.findall(r"^<!-- public: ([\w.]+) -->$", text, re.M)}
    whole |= {m for m in modules[2:] if not (ROOT / f"docs/reference/{m.removeprefix('heedful.')}.md").exists()}
    shown = {name.removesuffix(".matrix") for name in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    for module in set(modules) - whole:
        if module == "heedful.hf":
            pytest.importorskip("transformers")
        names = set(importlib.import_module(module).__all__) - {"__version__"}
        assert not {f"{module}.{name}" for name in names} - shown - {"heedful.numpy.MFAContext"}
    assert {"heedful.compat.ma_core", "heedful.compat.umfa"} <= shown
