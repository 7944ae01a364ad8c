"""`heedful run`: an unchanged script with heedful behind PyTorch's attention, and what became of its calls."""

from __future__ import annotations

import atexit
import builtins
import importlib.machinery
import importlib.util
import io
import json
import os
import sys
import types
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import PIPE_WIDTH

INTERRUPTED = 130
MOST_ROWS = 12
# Arguments behind the script are the script's, whatever they look like.
SETTINGS = {"allow_interspersed_args": False}


def run(
    command: Annotated[
        list[str], typer.Argument(metavar="SCRIPT|MODULE [ARGS]...", help="What to run, and its own arguments.")
    ],
    is_module: Annotated[bool, typer.Option("-m", help="Run a module by name, as python -m does.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
) -> None:
    """Run a Python script unchanged, with heedful behind PyTorch's attention.

    The report comes at the end, on stderr, so that the script's output stays its own: which calls of
    scaled_dot_product_attention and of nn.MultiheadAttention heedful took over, which it left to PyTorch and why, how
    many they were and how long they took. The exit status is the script's.
    """
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {save.absolute().parent}", param_hint="--save")
    name, *arguments = command
    if not is_module and not os.path.isfile(name):
        what = "is a folder" if os.path.isdir(name) else "there is no such file"
        raise typer.BadParameter(f"{what}: {name}; it takes a Python file, or with -m a module", param_hint="SCRIPT")
    begin(_Report(command, is_module, as_json, save))
    # Nothing behind this line is reached but through the script's end.
    raise SystemExit(run_as_main(name, arguments, is_module))


def begin(report: _Report) -> None:
    """Put heedful behind PyTorch's attention, count calls, and have the report printed at the end of the process.

    Handlers that the script registers, and its threads, end before.
    """
    import heedful
    from heedful.sdpa.record import recording

    try:
        heedful.activate()
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="heedful") from error
    counting = recording()
    recorder = counting.__enter__()
    process = os.getpid()

    def finish() -> None:
        # A forked child that ends as a program does is not the script.
        if os.getpid() == process:
            report.print(recorder.rows())
            counting.__exit__(None, None, None)

    atexit.register(finish)


def run_as_main(name: str, arguments: list[str], is_module: bool) -> int | str | None:
    """Run a file or a module as the program, and return what it gave to sys.exit.

    sys.argv, sys.path, `__main__` and tracebacks are as `python` would have them.
    """
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.argv = [name, *arguments]
    # The command line puts one of its own here.
    sys.excepthook = sys.__excepthook__
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(name))
    try:
        code = _module_code(name, module) if is_module else _file_code(name, module)
        sys.modules["__main__"] = module
        exec(code, module.__dict__)
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt as error:
        _print_traceback(error)
        return INTERRUPTED
    except BaseException as error:
        _print_traceback(error)
        return 1
    return 0


def _file_code(path: str, module: types.ModuleType) -> types.CodeType:
    module.__file__ = path
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    module.__spec__ = None
    with io.open_code(os.path.abspath(path)) as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


def _module_code(name: str, module: types.ModuleType) -> types.CodeType:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
        if spec is None:
            raise SystemExit(f"heedful run: {name} is a package without __main__ and cannot be run")
    loader: Any = None if spec is None else spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        raise SystemExit(f"heedful run: no module named {name}")
    code: types.CodeType | None = loader.get_code(spec.name)
    if code is None:
        raise SystemExit(f"heedful run: {name} has no code to run")
    module.__spec__, module.__loader__, module.__package__ = spec, loader, spec.parent
    if spec.origin is not None:
        module.__file__ = sys.argv[0] = spec.origin
    if spec.cached is not None:
        module.__dict__["__cached__"] = spec.cached
    return code


def _print_traceback(error: BaseException) -> None:
    """As the interpreter prints it, without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    sys.excepthook(type(error), error.with_traceback(frames), frames)


class _Report:
    def __init__(self, command: list[str], is_module: bool, as_json: bool, save: Path | None) -> None:
        self._command, self._is_module, self._as_json = command, is_module, as_json
        # The script may change the folder.
        self._save = None if save is None else save.absolute()
        self._began = perf_counter()

    def print(self, rows: list[dict[str, Any]]) -> None:
        result = self.to_json(rows)
        if self._save is not None:
            from heedful.measure.files import write_json

            write_json(self._save, result)
        if self._as_json:
            print(json.dumps(result, indent=2), file=sys.stderr)
        else:
            print_report(result)

    def to_json(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        taken = [row for row in rows if row["taken"]]
        return {
            "schema": 1,
            "command": self._command,
            "module": self._is_module,
            "seconds": perf_counter() - self._began,
            "taken": {"calls": sum(row["calls"] for row in taken), "seconds": sum(row["seconds"] for row in taken)},
            "calls": sum(row["calls"] for row in rows),
            "attention_seconds": sum(row["seconds"] for row in rows),
            "rows": rows,
        }


def print_report(result: dict[str, Any]) -> None:
    """The report as text on stderr."""
    from heedful.report.document import Grid

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=True, highlight=False, width=PIPE_WIDTH, soft_wrap=True)
    calls, taken = result["calls"], result["taken"]["calls"]
    name = " ".join([*(["-m"] if result["module"] else []), *result["command"]])
    console.print(f"\nheedful run {name}", markup=False, style="bold")
    if calls == 0:
        console.print(
            "No call of scaled_dot_product_attention or nn.MultiheadAttention was seen. Attention that is written out "
            "with matrix products and a softmax, or that runs in another process, is not.",
            markup=False,
        )
        return
    console.print(
        f"{taken} of {calls} attention calls were taken over: {_time(result['taken']['seconds'])} of "
        f"{_time(result['attention_seconds'])} in attention, {_time(result['seconds'])} in all.",
        markup=False,
    )
    headings = ("calls", "time", "what", "dtype", "query", "key")
    for title, wanted in (("taken over", True), ("left to PyTorch", False)):
        rows = [row for row in result["rows"] if row["taken"] is wanted]
        if rows:
            grid = Grid(title, headings, [_cells(row) for row in _folded(rows)], frozenset({2, 3, 4, 5}))
            console.print()
            console.print(grid.terminal())


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many rows as a reader takes in: lengths are told together, as those of a decoding loop, then shapes."""
    for kept in (1, 0):
        if len(rows) <= MOST_ROWS:
            break
        merged: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            for name in ("query", "key"):
                sizes = tuple(row[name])
                row = row | {name: (*sizes[:-2], -1, *sizes[-1:]) if kept else ()}
            kind = tuple(row[name] for name in ("what", "backward", "dtype", "query", "key"))
            known = merged.setdefault(kind, row | {"calls": 0, "seconds": 0.0})
            known["calls"] += row["calls"]
            known["seconds"] += row["seconds"]
        rows = sorted(merged.values(), key=lambda row: -row["seconds"])
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    what = f"{row['what']}, backward" if row["backward"] else row["what"]
    return str(row["calls"]), _time(row["seconds"]), what, row["dtype"], _shape(row["query"]), _shape(row["key"])


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join("any" if size < 0 else str(size) for size in sizes)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
