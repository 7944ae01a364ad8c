"""`heedful new-op`: the skeleton of a fused operation, in a checkout of the repository."""

from __future__ import annotations

import ast
import keyword
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

LONGEST = 32
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Those of C++ that are legal names in Python.
CPP_KEYWORDS = re.compile(
    "alignas|alignof|asm|auto|bool|catch|char|class|const|constexpr|decltype|default|delete|do|double|enum|explicit|"
    "export|extern|float|friend|goto|inline|int|long|mutable|namespace|new|noexcept|nullptr|operator|private|protected|"
    "public|register|short|signed|sizeof|static|struct|switch|template|this|throw|typedef|typeid|typename|union|"
    "unsigned|using|virtual|void|volatile"
)
# What the engine's headers and the bridge call things, as a word or as a class.
TAKEN = re.compile(
    "array|forward|backward|in|name|real|run|some|t|tensor|v|whole|attention_.*|.*_backward|test_.*|nn|ops"
)

FILES = {
    "header.h.txt": "engine/include/heedful_ops/{name}.h",
    "kernel.cpp.txt": "engine/ops/{name}.cpp",
    "bridge.cpp.txt": "bridge/ops/{name}.cpp",
    "operation.py.txt": "src/heedful/ops/_{name}.py",
    "module.py.txt": "src/heedful/nn/{name}.py",
    "test.py.txt": "tests/ops/test_{name}.py",
}
LISTS = ("src/heedful/ops/__init__.py", "src/heedful/nn/__init__.py")


def new_op(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the operation, as in demo_op.")],
    directory: Annotated[Path, typer.Option(help="The checkout that it is written into.")] = Path(),
) -> None:
    """Write the skeleton of a fused operation: kernel, registration, Python function with its facts, module and test.

    It computes factor · x², builds and passes its tests as it is; what to change is marked. Nothing is written where
    the name is taken or the directory is no checkout.
    """
    try:
        written = write_operation(name, directory)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for path in written:
        typer.echo(path)
    typer.echo(
        f"Next: make build, .venv/bin/python -m pytest tests/ops/test_{name}.py, "
        f"grep -rn Change over these files, make format."
    )


def write_operation(name: str, directory: Path) -> list[Path]:
    """Writes all files of an operation and its lines in the two lists, or none of them; returns their paths.

    Raises:
        ValueError: the name is not one, or taken; the directory is no checkout; a list has another form than expected.
    """
    _check_name(name)
    class_name = "".join(word.capitalize() for word in name.split("_"))
    for needed in ("CMakeLists.txt", "engine/ops/tiers.h", *LISTS):
        if not (directory / needed).is_file():
            raise ValueError(f"{directory} is no checkout of heedful's repository: there is no {needed}")
    created = {directory / path.format(name=name): _filled(source, name, class_name) for source, path in FILES.items()}
    for path in created:
        if path.exists():
            raise ValueError(f"{path} exists")
    ops, nn = (directory / path for path in LISTS)
    changed = {
        ops: _listed(ops, name, class_name, _with_operation),
        nn: _listed(nn, name, class_name, _with_module),
    }
    _write(*({path: _formatted(path, text) for path, text in texts.items()} for texts in (created, changed)))
    return [*created, *changed]


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        takes = f"up to {LONGEST} small letters and digits, words parted by single underscores"
        raise ValueError(f"{name!r} is no name: {takes}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or CPP_KEYWORDS.fullmatch(name):
        raise ValueError(f"{name} is a keyword of Python or C++")
    skeleton = list(ast.walk(ast.parse(_filled("operation.py.txt", "name", "Name"))))
    used = {node.id for node in skeleton if isinstance(node, ast.Name)}
    used |= {alias.name for node in skeleton if isinstance(node, ast.ImportFrom) for alias in node.names}
    used |= {node.name for node in skeleton if isinstance(node, ast.FunctionDef)}
    if TAKEN.fullmatch(name) or name in used:
        raise ValueError(f"{name} is taken: the skeleton's own sources use it")


def _filled(source: str, name: str, class_name: str) -> str:
    text = (resources.files("heedful.cli") / "skeleton" / source).read_text(encoding="utf-8")
    return text.replace("@name@", name).replace("@Name@", class_name).replace("@NAME@", name.upper())


def _formatted(path: Path, text: str) -> str:
    """The text as the repository's formatter has it where that is installed: a name's length moves line breaks."""
    python = path.suffix == ".py"
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which("ruff" if python else "clang-format", path=beside)
    if program is None:
        return text
    options = ["format", "--stdin-filename", str(path), "-"] if python else [f"--assume-filename={path}"]
    return subprocess.run([program, *options], input=text, capture_output=True, text=True, check=True).stdout


def _listed(path: Path, name: str, class_name: str, change: Callable[[str, str, str], str]) -> str:
    try:
        text = change(path.read_text(encoding="utf-8"), name, class_name)
        ast.parse(text)
    except (LookupError, SyntaxError) as error:
        raise ValueError(f"{path} has no place for a line of {name}: {error}") from error
    return text


def _with_operation(text: str, name: str, class_name: str) -> str:
    home = _assigned(text, "_HOME")
    assert isinstance(home, ast.Dict)
    homes = ast.literal_eval(home)
    if name in homes:
        raise ValueError(f"heedful.ops.{name} exists")
    homes[name] = f"_{name}"
    lines = [f'    "{key}": "{homes[key]}",' for key in sorted(homes)]
    text = _replaced(text, home, "\n".join(["{", *lines, "}"]))
    text = _with_name(text, name)
    return _with_import(text, "    ", f"heedful.ops._{name}", name)


def _with_module(text: str, name: str, class_name: str) -> str:
    return _with_import(_with_name(text, class_name), "", f"heedful.nn.{name}", class_name)


def _with_name(text: str, name: str) -> str:
    """The text with a name in its __all__, which is sorted as ruff sorts it: constants, classes, the others."""
    node = _assigned(text, "__all__")
    names = ast.literal_eval(node)
    if name in names:
        raise ValueError(f"{name} is exported already")
    names = sorted([*names, name], key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    return _replaced(text, node, "\n".join(["[", *(f'    "{n}",' for n in names), "]"]))


def _with_import(text: str, indent: str, module: str, name: str) -> str:
    """The text with one more import among those of its package, in order."""
    package = re.escape(module.rpartition(".")[0])
    found = list(re.finditer(rf"^{indent}from ({package}\.\w+) import (?:\([^)]*\)|.*)\n", text, re.MULTILINE))
    if not found:
        raise LookupError(f"no import from {module.rpartition('.')[0]}")
    after = [match for match in found if match[1] < module]
    at = after[-1].end() if after else found[0].start()
    return f"{text[:at]}{indent}from {module} import {name}\n{text[at:]}"


def _assigned(text: str, name: str) -> ast.expr:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise LookupError(f"no {name} = …")


def _replaced(text: str, node: ast.expr, by: str) -> str:
    lines = text.splitlines(keepends=True)
    assert node.end_lineno is not None
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + (node.end_col_offset or 0)
    return text[:begin] + by + text[end:]


def _write(created: dict[Path, str], changed: dict[Path, str]) -> None:
    before = {path: path.read_text(encoding="utf-8") for path in changed}
    begun: list[Path] = []
    try:
        for path, text in created.items():
            with path.open("x", encoding="utf-8") as file:
                begun.append(path)
                file.write(text)
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
    except BaseException:
        for path in begun:
            path.unlink()
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
        raise
