"""`heedful bench --gpu`: one line without a device; its measuring and its tables on tiny sizes on the CPU."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from typer.testing import CliRunner

from heedful.cli import app
from heedful.measure import gpu, gpu_cases
from heedful.measure.gpu_cases import BEST, COPY, FLASH, FLASH_ATTN, Case, Goal, cases

TINY = [
    Case("forward", "forward d16 causal 64", "causal", 64, 64, 16, 2, 2, 2, (FLASH, FLASH_ATTN),
         (Goal(FLASH, 0.0, 1e9), Goal(BEST, 0.0, 0.0))),
    Case("forward", "forward d16 causal 96", "causal", 96, 96, 16, 2, 2, 2, (FLASH,)),
    Case("window", "window 8 64", "window", 64, 64, 16, 1, 2, 1),
    Case("backward", "backward d16 full 64", "full", 64, 64, 16, 1, 2, 2, (FLASH,), (Goal(FLASH, 1e9, 1e9),)),
    Case("decode", "decode", "full", 1, 64, 16, 1, 4, 2, (), (Goal(COPY, 0.0, 1e9),)),
    Case("decode", "decode a window", "window", 1, 64, 16, 1, 4, 2),
    Case("patterns", "pattern full", "full", 64, 64, 16, 1, 2, 2),
    Case("patterns", "pattern documents", "documents causal", 64, 64, 16, 1, 2, 2),
]  # fmt: skip


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--gpu", *arguments])


class Quiet:
    def begin(self, text):
        pass

    def advance(self, amount=1):
        pass


@pytest.fixture(scope="module")
def result():
    return gpu.measure_gpu(TINY, command="heedful bench --gpu", progress=Quiet(), seconds=0.0, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_one_line_and_no_number(tmp_path):
    done = bench("--save", str(tmp_path / "r.json"), "--quick")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "heedful bench --gpu: there is no CUDA device here, so there is nothing to measure\n"
    assert not list(tmp_path.iterdir())


def test_every_row_has_its_checks_and_its_figures(result):
    assert [row["name"] for row in result["rows"]] == ["front door", *(case.name for case in TINY)]
    for row in result["rows"]:
        assert all(check["passed"] for check in row["checks"])
        assert row["seconds"]["heedful"] > 0
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows["backward d16 full 64"]["checks"]) == 4
    forward = rows["forward d16 causal 64"]
    assert forward["ratios"][FLASH]["ratio"] > 0
    assert "ImportError" in forward["errors"][FLASH_ATTN] or "ModuleNotFoundError" in forward["errors"][FLASH_ATTN]
    assert [goal["reached"] for goal in forward["goals"]] == ["first", "goal"]
    assert rows["backward d16 full 64"]["goals"][0]["reached"] == "no"
    assert rows["decode"]["goals"][0]["measured"] > 0
    assert rows["front door"]["seconds"]["SDPA"] > 0
    assert rows["front door"]["new_length"]["heedful"] > 0


def test_a_failed_check_leaves_no_figure(monkeypatch):
    monkeypatch.setattr("heedful.attention", lambda q, k, v, **_: torch.zeros_like(q))
    found = gpu.measure_gpu(TINY[:1], command="", progress=Quiet(), seconds=0.0, device="cpu", front_door=False)
    assert found["rows"][0]["seconds"] is None
    assert not found["rows"][0]["checks"][0]["passed"]


def test_stored_runs_are_joined_and_written(result, tmp_path):
    first = result | {"rows": result["rows"][:3]}
    for name, content in (("a", first), ("b", result)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    stored = ["--from", str(tmp_path / "a.json"), "--from", str(tmp_path / "b.json")]
    done = bench(*stored, "--html", str(tmp_path / "r.html"), "--plot", str(tmp_path / "r.png"), "--update", str(page))
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Run 1: CPU" in text
    assert "Run 2: CPU" in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["forward d16 causal 64"].endswith("| 1 |")
    assert lines["backward d16 full 64"].endswith("| 2 |")
    assert "first aim (SDPA flash), goal (the best)" in lines["forward d16 causal 64"]
    assert lines["documents"].startswith("| documents |")
    assert "of a copy's bandwidth" in lines["decode"]
    assert lines["decode a window"].count("| – ") == 3
    assert "that was not seen before: heedful" in text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "FAILED" not in (tmp_path / "r.html").read_text()
    assert json.loads(bench(*stored, "--json").stdout)["runs"][1]["command"] == "heedful bench --gpu"


def test_a_failed_check_is_said_and_ends_with_1(result, tmp_path):
    rows = json.loads(json.dumps(result["rows"][:2]))
    rows[1]["checks"][0] |= {"passed": False, "measured": 3.0}
    rows[1]["seconds"] = None
    (tmp_path / "a.json").write_text(json.dumps(result | {"rows": rows}))
    done = bench("--from", str(tmp_path / "a.json"))
    assert done.exit_code == 1
    assert "FAILED numerical check failed: forward d16 causal 64, heedful" in done.output


def test_options_of_other_modes_are_refused(tmp_path):
    assert bench("--threads", "2").exit_code == 2
    assert bench("--from", str(tmp_path / "none.json")).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--decode", "--from", "x.json"]).exit_code == 2
    assert bench("--sweep").exit_code == 2


def test_the_table_holds_every_aim():
    found = cases()
    # Processes of their own compile for them.
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({case.name for case in found}) == len(found)
    names = {case.name for case in found}
    for dim in (64, 128):
        for kind in ("full", "causal"):
            assert {f"forward d{dim} {kind} {length}" for length in (1024, 2048, 4096, 8192, 16384)} <= names
    assert {f"window 1024 {length}" for length in (16384, 32768, 65536)} <= names
    assert len([case for case in found if case.section == "decode"]) == 3
    assert {case.name for case in cases(quick=True)} < names
    assert all(case.goals for case in found if case.section != "patterns" and "1024 of" not in case.name)
    assert gpu_cases.named(found, "window") == [case for case in found if case.section == "window"]
