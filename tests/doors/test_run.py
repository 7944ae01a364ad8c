"""heedful run: the script runs as ever, and what became of its attention is told."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heedful.backend.native import prefer
from heedful.cli import app, running

SCRIPT = """
import atexit, os, pickle, sys, threading
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

class Thing:
    pass

assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
assert sys.modules["__main__"].Thing is Thing
print(__name__, __file__, __doc__, __package__, __spec__, sys.argv[1:], sys.path[0])
assert sys.excepthook is sys.__excepthook__
q = torch.randn(1, 4, 256, 32)
mask = torch.ones(256, 256, dtype=torch.bool).tril().triu(-50)
for _ in range(5):
    attend(q, q, q, mask)
attend(q[:, :, :2, :1], q[:, :, :2, :1], q[:, :, :2, :1])
attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
attention(q[0], q[0], q[0])
torch.nn.functional.scaled_dot_product_attention(q[0], q[0], q[0], dropout_p=0.1)
child = os.fork()
if child == 0:
    sys.exit(9)
assert os.waitpid(child, 0)[1] == 9 << 8
threading.Thread(target=lambda: attend(q, q, q, is_causal=True)).start()
atexit.register(lambda: print("handler", attend(q, q, q).shape))
print("end")
sys.exit(3)
"""


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "heedful.cli", "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.skipif(prefer.load_table() is None, reason="the engine takes nothing over on this tier")
def test_a_script_and_its_report(script, tmp_path):
    saved = tmp_path / "report.json"
    done = run("--save", saved, script, "--json", "-m", "x y")
    assert done.returncode == 3, done
    first, *rest = done.stdout.splitlines()
    assert first == f"__main__ {script} None None None ['--json', '-m', 'x y'] {tmp_path}"
    assert rest == ["end", "handler torch.Size([1, 4, 256, 32])"]
    assert "\x1b" not in done.stderr
    assert done.stderr.count("heedful run") == 1
    assert "8 of 10 attention calls were taken over" in done.stderr
    assert done.stderr.index("taken over\n") < done.stderr.index("left to PyTorch\n")
    report = json.loads(saved.read_text())
    assert report["command"] == [str(script), "--json", "-m", "x y"]
    assert (report["schema"], report["module"], report["calls"], report["taken"]["calls"]) == (1, False, 10, 8)
    assert 0 < report["taken"]["seconds"] <= report["attention_seconds"] <= report["seconds"]
    found = {(row["what"], row["taken"]): row for row in report["rows"]}
    assert {kind: row["calls"] for kind, row in found.items()} == {
        ("a mask that is a band", True): 5,
        ("every pair", True): 1,
        ("causal", True): 1,
        ("a call that PyTorch has no kernel for", True): 1,
        ("too small for the engine to pay off", False): 1,
        (running_weights(), False): 1,
    }
    band = found["a mask that is a band", True]
    assert band["query"] == band["key"] == [1, 4, 256, 32]
    assert band["dtype"] == "float32"
    assert not band["backward"]
    for row in report["rows"]:
        assert row["what"] in done.stderr


def running_weights():
    from heedful.sdpa import record

    return record.WEIGHTS


def test_an_exception(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("def inner():\n    raise ValueError('no')\n\ninner()\n")
    done, plain = run(script), subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == plain.returncode == 1
    trace, _, report = done.stderr.partition("\nheedful run")
    assert trace == plain.stderr
    assert "No call of scaled_dot_product_attention" in report


def test_a_module(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("word = 'helped'\n")
    (package / "__main__.py").write_text(
        "import sys\nfrom .helper import word\n"
        "print(__name__, __package__, __spec__.name, sys.argv, sys.path[0], word)\nsys.exit('a message')\n"
    )
    done = run("--json", "-m", "package", "--help", cwd=tmp_path)
    plain = subprocess.run([sys.executable, "-m", "package", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == plain.returncode == 1
    assert done.stdout == plain.stdout
    message, _, report = done.stderr.partition("\n")
    assert f"{message}\n" == plain.stderr
    assert json.loads(report)["calls"] == 0


@pytest.fixture
def main_module(monkeypatch):
    """Everything of the process that running a program changes is put back."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("argv", "path", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name) if name == "excepthook" else list(getattr(sys, name)))


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("", 0),
        ("import sys; sys.exit()", None),
        ("import sys; sys.exit(5)", 5),
        ("import sys; sys.exit('text')", "text"),
        ("raise SystemExit", None),
        ("raise KeyboardInterrupt", 130),
        ("1 / 0", 1),
        ("this is no Python", 1),
    ],
)
@pytest.mark.usefixtures("main_module")
def test_exit_status(tmp_path, source, status, capsys):
    script = tmp_path / "script.py"
    script.write_text(source)
    assert running.run_as_main(str(script), [], False) == status
    trace = capsys.readouterr().err
    assert "running.py" not in trace
    assert bool(trace) == (status in (1, 130))


@pytest.mark.usefixtures("main_module")
def test_the_scripts_own_excepthook(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.excepthook = lambda kind, error, trace: print('mine', kind.__name__)\n1 / 0\n")
    assert running.run_as_main(str(script), [], False) == 1
    assert capsys.readouterr().out == "mine ZeroDivisionError\n"


@pytest.mark.usefixtures("main_module")
def test_the_program_is_the_main_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nvalue = 7\nassert sys.argv == [__file__, 'a']\nassert '__builtins__' in globals()\n")
    assert running.run_as_main(str(script), ["a"], False) == 0
    main = sys.modules["__main__"]
    assert isinstance(main, types.ModuleType)
    assert main.value == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument"),
        (("nothing.py",), "no such file"),
        ((Path(__file__).parent,), "is a folder"),
        (("--save", "/nowhere/at/all.json", __file__), "no folder /nowhere/at"),
        (("--nothing", "x.py"), "No such option: --nothing"),
    ],
)
def test_what_it_refuses(arguments, words):
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, ["run", *map(str, arguments)])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


@pytest.mark.usefixtures("main_module")
@pytest.mark.parametrize("name", ["no_such_module", "json", "no.such.module", "zlib"])
def test_modules_that_cannot_be_run(name):
    status = running.run_as_main(name, [], True)
    assert status == 1 or str(status).startswith("heedful run: ")


def test_many_lengths_are_told_together(capsys):
    def row(length, what="every pair"):
        shape = [1, 4, length, 32]
        return {
            "taken": True, "what": what, "backward": False, "dtype": "float32", "query": shape, "key": shape,
            "calls": 2, "seconds": 0.5,
        }  # fmt: skip

    def report(rows):
        numbers = {"calls": 2 * len(rows), "seconds": 0.5 * len(rows)}
        running.print_report(
            {"command": ["x.py"], "module": False, "seconds": 99.0, "taken": numbers, "calls": numbers["calls"],
             "attention_seconds": numbers["seconds"], "rows": rows}
        )  # fmt: skip
        return capsys.readouterr().err

    assert report([row(length) for length in range(12)]).count("every pair") == 12
    text = report([row(length) for length in range(40)])
    assert text.count("every pair") == 1
    assert "1 x 4 x any x 32" in text
    assert "80 " in text
    assert "20.00 s" in text


def test_help():
    done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["run", "--help"])
    assert done.exit_code == 0
    for word in ("-m", "--json", "--save", "SCRIPT"):
        assert word in done.output
