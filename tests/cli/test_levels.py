"""`heedful levels` on tiny cases."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from heedful.cli import app
from heedful.cli.ladder import INDEX, PAGES, PICTURE
from heedful.levels import ladder
from heedful.measure import levels
from heedful.measure.levels import Case
from heedful.measure.peaks import Peaks

HEAD = (1, 2, 20, 8)
TINY = [
    Case("attention, causal", "attention", (HEAD, HEAD, HEAD), {"causal": True}),
    Case("transformer block, causal", "transformer_block", ((1, 9, 16),), {"dim": 16, "heads": 2}),
    Case("decoder", "decoder", ((1, 9),), {"dim": 16, "heads": 2, "layers": 1}),
    Case("generation", "decoder", ((1, 5),), {"dim": 16, "heads": 2, "layers": 1}, generates=True),
]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch) -> None:
    monkeypatch.setattr(levels, "cases", lambda *, quick=False: TINY)
    monkeypatch.setattr(levels, "CASE_SECONDS", 0.0)
    monkeypatch.setattr("heedful.cli.ladder.QUICK_SECONDS", 0.0)
    monkeypatch.setattr(levels, "NEW_TOKENS", 3)
    monkeypatch.setattr(levels, "GENERATION_ROUNDS", 2)
    monkeypatch.setattr(levels, "measure_peaks", lambda *_: Peaks({"float32": 1e11}, {1: 1e10}))
    # Compiling takes long and is tested elsewhere; here it is a level that is not there.
    monkeypatch.setattr(ladder, "_without_compiler", lambda _: ("no compiler", "get one"))


def run(*arguments: str):
    return CliRunner().invoke(app, ["levels", *arguments])


def test_json_has_every_case_and_level_and_says_what_is_missing() -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["command"] == "heedful levels"
    assert [case["name"] for case in result["cases"]] == [case.name for case in TINY]
    assert {s["level"]: s["reason"] for s in result["availability"]}[3] == "no compiler"
    for case in result["cases"]:
        assert case["missing"]["level 3"] == "no compiler"
        assert "level 4" in case["missing"]
    for row in result["cases"][0]["comparison"]["results"]:
        assert row["equivalent"]
        assert row["forward_seconds"] > 0
    generated = result["cases"][3]["generation"]
    assert {row["name"] for row in generated} >= {"level 1", "level 5"}
    assert all(row["same_tokens"] and row["token_seconds"] > 0 for row in generated)


def test_text_is_plain_in_a_pipe_and_names_can_be_chosen() -> None:
    done = run("transformer")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "profiler_st" not in done.output
    assert "5 native" in done.stdout
    assert "attention, causal" not in done.stdout
    assert "Level 3 (torch.compile) is not there: no compiler. How to get it: get one." in done.stdout
    assert run("nothing of the sort").exit_code == 2
    assert run("--threads", "100000").exit_code == 2
    assert run("--device", "tpu").exit_code == 2
    if not torch.cuda.is_available():
        assert "no GPU" in run("--device", "cuda").output


def test_files_of_every_kind(tmp_path) -> None:
    paths = {name: tmp_path / name for name in ("a.json", "a.png", "a.html")}
    done = run("attention", "gener", "--save", str(paths["a.json"]), "--plot", str(paths["a.png"]),
               "--html", str(paths["a.html"]), "--markdown")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(paths["a.json"].read_text())["mode"] == "levels"
    assert paths["a.png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths["a.html"].read_text()
    assert "| --- |" in done.stdout or "|---" in done.stdout
    assert run("--plot", str(tmp_path / "no" / "where.png")).exit_code == 2
    assert run("--json", "--markdown").exit_code == 2


def test_update_replaces_the_blocks_of_a_folder(tmp_path) -> None:
    (tmp_path / INDEX).write_text("before\n<!-- levels:begin -->\nold\n<!-- levels:end -->\nafter\n")
    for level, page in PAGES.items():
        (tmp_path / page).write_text(f"<!-- level-{level}:begin -->\nold\n<!-- level-{level}:end -->\n")
    done = run("--quick", "--update", str(tmp_path))
    assert done.exit_code == 0, done.output
    index = (tmp_path / INDEX).read_text()
    assert index.startswith("before\n")
    assert "old" not in index
    assert "heedful levels --quick --update" in index
    native = (tmp_path / PAGES[5]).read_text()
    assert "`heedful::attention_forward`" in native
    assert "native beside level 2: before → after" in native
    assert "was not measured there: no compiler" in (tmp_path / PAGES[3]).read_text()
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    (tmp_path / PAGES[2]).unlink()
    assert run("--update", str(tmp_path)).exit_code == 2


def test_a_level_that_differs_is_named_and_exits_with_1(monkeypatch) -> None:
    from heedful.levels import level_5_native

    right = level_5_native.attention
    monkeypatch.setattr(level_5_native, "attention", lambda *a: 1.001 * right(*a))
    done = run("attention")
    assert done.exit_code == 1
    assert "FAILED attention, causal, level 5: output" in done.stdout
