"""`heedful bench` on tiny workloads."""

import json

import pytest
import torch
from typer.testing import CliRunner

import heedful
from heedful.cli import app
from heedful.measure import isolated, machine, peaks, rows, workloads
from heedful.measure.timing import Comparison
from heedful.measure.workloads import TABLE, Target, Workload, select_rows
from heedful.report.overview import document
from heedful.report.table import HEADINGS, cells

TINY = (
    Workload("forward", "full", "float32", 1, 2, 64, 16, Target(1000), Target(0.0001)),
    Workload("forward", "causal", "bfloat16", 1, 2, 64, 16),
    Workload("forward", "window ±128", "float32", 1, 2, 300, 16, Target(0.6, "density_speedup")),
    Workload("decode", "full", "bfloat16", 1, 4, 1, 16, kv_heads=2, k_length=96),
    Workload("overhead", "full", "float32", 1, 1, 8, 8, Target(1e9, "extra_microseconds")),
    Workload("backward", "causal", "float32", 1, 2, 64, 16),
    Workload("training", "window ±128", "float32", 1, 2, 64, 16),
    Workload("forward", "full", "float32", 1, 2, 65, 16, threads=100_000),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(workloads, "TABLE", TINY)
    stub = peaks.Peaks({"float32": 1e11, "bfloat16": 2e11}, {1: 1e10})
    monkeypatch.setattr(peaks, "measure_peaks", lambda *_: stub)
    monkeypatch.setattr("heedful.cli.benchmark.QUICK_SECONDS", 0.0)
    monkeypatch.setattr("heedful.cli.benchmark.FULL_SECONDS", 0.0)
    monkeypatch.setattr(rows, "last_level_cache_bytes", lambda: 1 << 16)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_json_has_environment_peaks_and_every_row(tiny):
    done = bench("--quick", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result.keys() == {"schema", "mode", "command", "environment", "peaks", "interrupted", "rows"}
    assert result["command"] == "heedful bench --quick"
    assert [row["name"] for row in result["rows"]] == [row.name for row in TINY]
    for row in result["rows"][:-1]:
        assert row["backend"] in {"native", "sdpa", "reference"}
        assert row["checks"]
        assert all(check["passed"] for check in row["checks"])
        assert row["comparison"]["ratio"] > 0
    assert result["rows"][0]["targets"]["first"]["reached"] is False
    assert result["rows"][0]["targets"]["goal"]["reached"] is True
    assert result["rows"][3]["rate_unit"] == "GB/s"
    assert result["rows"][-1]["comparison"] is None
    assert "threads must be between" in result["rows"][-1]["note"]


def test_text_table_names_every_row_and_is_not_cut_in_a_pipe(tiny):
    done = bench()
    assert done.exit_code == 0, done.output
    for row in TINY:
        assert row.title in done.stdout
    assert "\x1b" not in done.output


def test_a_page_shows_the_table_and_its_bars(tiny, tmp_path):
    target = tmp_path / "table.html"
    assert bench("--html", str(target)).exit_code == 0
    text = target.read_text()
    for row in TINY:
        assert row.title in text
    assert text.count("<svg") == 2
    assert "FAILED" not in text


def test_rows_on_one_thread_are_timed_on_two_as_well(tiny):
    rows_of = {row["name"]: row for row in json.loads(bench("--json").stdout)["rows"]}
    if len(machine.affinity() or [0, 1]) < 2:
        pytest.skip("one CPU")
    for workload in TINY[:-1]:
        more = rows_of[workload.name]["more_threads"]
        if workload.kind == "overhead":
            assert more is None
        else:
            assert more["threads"] == 2
            assert more["scaling"] > 0
            assert "of one" in cells(rows_of[workload.name])[6]
    for row in json.loads(bench("--json", "--threads", "1").stdout)["rows"]:
        assert row["more_threads"] is None


def test_ctrl_c_keeps_the_rows_that_were_measured(tiny, monkeypatch, tmp_path):
    right, calls = rows.run_row, []

    def stop_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(rows, "run_row", stop_at_the_third)
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:begin -->\nold\n<!-- bench:end -->\n")
    done = bench("--json", "--threads", "1", "--update", str(page))
    assert done.exit_code == 130
    assert len(json.loads(done.stdout)["rows"]) == 2
    assert "old" in page.read_text()


@pytest.mark.parametrize("kind", ["memory", "training memory"])
def test_memory_rows_count_what_is_above_the_results(kind):
    outcome = isolated.run_in_this_process(
        Workload(kind, "window ±128", "float32", 1, 1, 300, 16), threads=1, seconds=0
    )
    assert all(check.passed for check in outcome.checks)
    assert len(outcome.checks) == (1 if kind == "memory" else 4)
    assert outcome.extra_bytes >= 0
    assert "SDPA with its mask" in outcome.note


def test_only_selects_and_refuses_what_matches_nothing(tiny):
    assert len(json.loads(bench("--json", "--only", "decode").stdout)["rows"]) == 1
    done = bench("--only", "no such row")
    assert done.exit_code == 2
    assert "no such row" in done.output


def test_files_are_written_whole(tiny, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    plot, save = tmp_path / "plot.png", tmp_path / "bench.json"
    done = bench("--only", "forward", "--plot", str(plot), "--save", str(save), "--update", str(page), "--markdown")
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(save.read_text())
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n")
    assert text.endswith("<!-- bench:end -->\nafter\n")
    assert document(result).markdown(result) in text
    assert document(result).markdown(result) in done.stdout
    assert "`heedful bench --only forward --update README.md`" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "bench.json", "plot.png"]


def test_a_file_without_markers_is_refused(tiny, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no markers")
    done = bench("--only", "overhead", "--update", str(page))
    assert done.exit_code == 2
    assert page.read_text() == "no markers"


def test_a_red_check_prints_no_speed_up_and_exits_with_1(tiny, monkeypatch):
    right = heedful.attention
    monkeypatch.setattr(heedful, "attention", lambda q, k, v, pattern=None: right(q, k, v, pattern=pattern) * 1.01)
    done = bench("--json", "--only", "forward full")
    assert done.exit_code == 1
    row = json.loads(done.stdout)["rows"][0]
    assert row["comparison"] is None
    assert row["targets"]["first"]["reached"] is None
    assert not row["checks"][0]["passed"]
    done = bench("--only", "forward full")
    assert "FAILED" in done.stdout
    assert "×" not in done.stdout.split("speed-up")[1].replace("1e+03×", "").replace("0.0001×", "")


def test_a_red_gradient_is_found(tiny, monkeypatch):
    right = heedful.attention

    def off(q, k, v, pattern=None):
        return right(q * 1.01, k, v, pattern=pattern)

    monkeypatch.setattr(heedful, "attention", off)
    assert bench("--only", "backward").exit_code == 1


def test_names_are_unique_and_the_quick_table_leaves_out_the_slow_rows():
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)
    quick = select_rows(quick=True, only=None)
    assert not any(row.baseline in rows.PEERS or row.kind in isolated.NEEDS_OWN_PROCESS for row in quick)
    assert len(quick) > 15


def test_every_workload_names_a_pattern_and_a_dtype():
    for row in TABLE:
        pattern = row.make_pattern()
        assert pattern is None or pattern.density(64, 64) > 0
        assert isinstance(getattr(torch, row.dtype), torch.dtype)


def test_targets():
    assert Target(2.0).reached(2.0, 0.1, 0.0)
    assert not Target(0.6, "density_speedup").reached(5.0, 0.1, 0.0)
    assert Target(0.6, "density_speedup").describe(0.1) == "6×"
    assert Target(2.0, "extra_microseconds").reached(0.1, 1.0, 1.9)
    assert not Target(4.0, "extra_mebibytes").reached(0.0, 1.0, 4.1)


def test_an_outcome_survives_the_way_between_processes():
    outcome = rows.Outcome("native", Comparison(1.0, 0.5, 2.0, 1.9, 2.1, 5), [], "note", 12.0)
    assert rows.Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_missing_peer_is_a_note(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    row = next(row for row in TABLE if row.baseline == "openvino")
    outcome = isolated.run_in_this_process(row, threads=1, seconds=0.0)
    assert outcome.note == "not run: openvino is not installed"


def test_a_process_that_dies_is_a_note(monkeypatch):
    monkeypatch.setattr(isolated.sys, "executable", "/bin/false")
    assert "not run" in isolated.run_isolated(TABLE[0], threads=1, seconds=0.0).note


def test_cells_match_the_headings(tiny):
    result = json.loads(bench("--json", "--only", "overhead").stdout)
    assert len(cells(result["rows"][0])) == len(HEADINGS)
    assert "+1e+09 µs ✓" in cells(result["rows"][0])
