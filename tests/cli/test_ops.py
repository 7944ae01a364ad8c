"""`heedful ops`: the catalogue as a table, as JSON, as Markdown and as Grimoire semantics under SWI-Prolog."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from heedful.cli import app
from heedful.ops import catalogue
from heedful.report.semantics import SPELLS, write_semantics

SWIPL = shutil.which("swipl")
needs_swipl = pytest.mark.skipif(SWIPL is None, reason="no swipl here (Debian: apt install swi-prolog-nox)")


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ops", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    """Rows as measured, without the measuring."""
    from heedful.measure import operations

    def row(operation, case, setting, *, checked):
        peer = {"ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}
        return {
            "operation": operation.name,
            "case": case.name,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "pass": "forward and backward" if setting.backward else "forward",
            "threads": setting.threads,
            "seconds": 1.25e-4,
            "bytes_per_second": 2e9,
            "peers": {"eager": peer, "torch.compile": peer},
        }

    monkeypatch.setattr(operations, "measure_case", row)


def test_table_has_every_operation():
    done = invoke()
    assert done.exit_code == 0
    # Long formulas are folded.
    assert all(name in done.output for name in catalogue())
    assert "sigmoid" in done.output


def test_json_has_every_fact():
    data = json.loads(invoke("--json").output)
    assert data["measured"] is None
    assert data["operations"] == [operation.to_json() for operation in catalogue().values()]


def test_measured(quick):
    done = invoke("--json", "--measure", "--dtype", "bfloat16", "--only", "swish")
    data = json.loads(done.stdout)
    cases = [case.name for case in catalogue()["parametric_swish"].cases]
    assert [row["case"] for row in data["measured"]["rows"]] == [case for case in cases for _ in range(2)]
    assert {row["dtype"] for row in data["measured"]["rows"]} == {"bfloat16"}
    assert data["measured"]["environment"]["cpu"]
    assert "eager 2.00× (1.50×–2.50×), torch.compile 2.00×" in invoke("--measure").stdout
    assert "| 125.00 µs | 2.0 | eager 2.00× (1.50×–2.50×)" in invoke("--measure", "--markdown").stdout


def test_really_measured(monkeypatch):
    operation = catalogue()["parametric_swish"]
    operation = dataclasses.replace(operation, cases=operation.cases[:1])
    monkeypatch.setattr("heedful.ops.catalogue", lambda: {"parametric_swish": operation})
    threads = torch.get_num_threads()
    done = invoke("--json", "--measure", "--seconds", "0.01")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["measured"]["rows"]
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    assert all(row["peers"].keys() == {"eager", "torch.compile", "silu"} for row in rows)
    assert torch.get_num_threads() == threads


def test_markdown_has_a_section_for_every_operation():
    page = invoke("--markdown").output
    for name, operation in catalogue().items():
        assert f"\n## {name}\n" in page
        for argument in (*operation.inputs, *operation.parameters, *operation.outputs):
            assert f"| `{argument.name}` | " in page
    assert all(line.count("|") > 2 for line in page.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--json", "--markdown"), "take no other of"),
        (("--only", "nothing"), "no operation's name contains 'nothing'"),
        (("--measure", "--dtype", "int8"), "takes float32, bfloat16, float16, float64, got 'int8'"),
    ],
)
def test_bad_options(arguments, text):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert text in done.output


def prolog(directory, *arguments, **environment):
    done = subprocess.run(
        [SWIPL, *arguments],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@needs_swipl
def test_semantics_pass_their_tests(tmp_path, quick):
    done = invoke("--semantics", tmp_path, "--measure")
    assert done.exit_code == 0, done.output
    code, _, printed = prolog(tmp_path, "-g", "run_tests", "-t", "halt", "semantics.plt", HEEDFUL_ROOT=str(tmp_path))
    assert code == 0, printed
    assert "Warning" not in printed
    goal = (
        'component(fused_attention, measured, measured(Case, float32, "forward", Seconds, [eager-R|_])), '
        'format("~w ~w ~w~n", [Case, Seconds, R])'
    )
    assert prolog(tmp_path, "-g", goal, "-t", "halt", "semantics.pl")[1] == "(2, 32, 64) 0.000125 2.0\n"


@needs_swipl
def test_semantics_notice_what_is_missing(tmp_path):
    assert invoke("--semantics", tmp_path).exit_code == 0
    path = tmp_path / "semantics.pl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "swish', formula" not in line))
    code, _, printed = prolog(tmp_path, "-g", "run_tests", "-t", "halt", "semantics.plt")
    assert code != 0, printed


@needs_swipl
@pytest.mark.parametrize("status", [0, 2])
@pytest.mark.parametrize("spell", SPELLS)
def test_spells_run_their_commands(tmp_path, spell, status):
    """In a checkout of which every program leaves a note and ends with a status."""
    root = tmp_path / "checkout"
    (root / "src/heedful").mkdir(parents=True)
    (root / "src/heedful/__init__.py").touch()
    (root / "Makefile").write_text(f"build:\n\t@touch made; exit {status}\n")
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > ran\nexit {status}\n')
    python.chmod(0o755)
    assert invoke("--semantics", root / "docs").exit_code == 0
    goal = f"cast(conjure({spell}), Result), print(Result), nl"
    code, printed, _ = prolog(root / "docs", "-g", goal, "-t", "halt", "semantics.pl")
    assert code == 0
    assert printed.splitlines()[-1] == ("ok(exit(0))" if status == 0 else "error(exit(2))")
    if spell == "build_extension":
        assert (root / "made").exists()
    else:
        assert (root / "ran").read_text().split() == list(SPELLS[spell][1:])


@needs_swipl
def test_a_spell_outside_of_a_checkout_says_so(tmp_path):
    assert invoke("--semantics", tmp_path).exit_code == 0
    goal = "cast(conjure(run_tests), Result), print(Result), nl"
    assert prolog(tmp_path, "-g", goal, "-t", "halt", "semantics.pl")[1] == "error(no_checkout)\n"


@needs_swipl
def test_text_arrives_as_it_was(tmp_path):
    texts = ['it\'s "quoted"', "back\\slash ~w", "βx · x²\nnext"]
    operation = catalogue()["fused_attention"].to_json() | dict(
        zip(("summary", "formula", "source"), texts, strict=True)
    )
    write_semantics({"operations": [operation], "measured": None}, tmp_path)
    goal = (
        "docstring(fused_attention, A), component(fused_attention, formula, B), "
        'component(fused_attention, source, C), format("~w~n~w~n~w", [A, B, C])'
    )
    assert prolog(tmp_path, "-g", goal, "-t", "halt", "semantics.pl", LC_ALL="C.UTF-8")[1] == "\n".join(texts)


def test_update_writes_a_page(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- operations:begin -->\nold\n<!-- operations:end -->\nafter\n")
    done = invoke("--update", page, "--only", "softmax", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith("before\n<!-- operations:begin -->\n")
    assert text.endswith("<!-- operations:end -->\nafter\n")
    assert "old" not in text
    assert "heedful ops --only softmax --dtype bfloat16 --update" in text
    cases = catalogue()["softmax"].cases
    assert f"{2 * len(cases)} rows on" in text
    assert f"In {2 * len(cases)} of them" in text
    assert all(f"| {case.name} | bfloat16 | forward and backward |" in text for case in cases)


def test_update_refuses_a_page_without_a_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    done = invoke("--update", page)
    assert done.exit_code == 2
    assert "operations:begin" in done.output
    assert page.read_text() == "nothing\n"


def test_where_pytorch_is_faster_is_said():
    slower = {name: operation.slower for name, operation in catalogue().items() if operation.slower}
    assert "parametric_swish" in slower
    data = {operation["name"]: operation for operation in json.loads(invoke("--json").output)["operations"]}
    page = invoke("--markdown").output
    for name, entries in slower.items():
        assert [entry["where"] for entry in data[name]["slower"]] == [entry.where for entry in entries]
        assert all(entry.where in page and entry.peer in page for entry in entries)
    assert "fewer than" in invoke().output
