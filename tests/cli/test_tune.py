"""`heedful tune` on tiny sizes, and the files it keeps."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from heedful.backend.native import library
from heedful.cli import app
from heedful.measure import tune
from heedful.measure.machine import cpu_model
from heedful.measure.tune import Constant, Work, best_value, engine_at_rest, settle
from heedful.measure.tuning import table_path


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HEEDFUL_TUNING", raising=False)
    work = Work("float32", 2, 2, 32, 32, 16)
    constants = tuple(Constant(constant.name, constant.candidates[:2], (work,)) for constant in tune.CONSTANTS)
    monkeypatch.setattr(tune, "CONSTANTS", constants)
    monkeypatch.setattr(tune, "PAIRS", (16, 64))
    monkeypatch.setattr(tune, "QUERIES", (1, 2))
    monkeypatch.setattr(tune, "MAX_ROUNDS", 3)
    monkeypatch.setattr(tune, "last_level_cache_bytes", lambda: 1 << 18)


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_a_table_is_measured_stored_shown_and_deleted():
    before = library.tuning()
    assert "not there" in invoke("--show").stdout
    done = invoke("--quick", "--json")
    assert done.exit_code == 0, done.output
    table = json.loads(table_path().read_text())
    assert table == json.loads(done.stdout)["table"]
    limits = {"few_pairs", "few_pairs_gradient", "few_queries", "cached_bytes"}
    assert table.keys() == {"version", "tier", "torch", "cpu", "engine"} | limits
    assert (table["version"], table["cpu"]) == (2, cpu_model())
    assert table["tier"] == library.isa_names()[library.isa_selected()]
    assert set(table["few_pairs"]) == {"float32", "float64", "bfloat16", "float16"}
    assert set(table["engine"]) <= set(before)
    assert library.tuning() == before
    assert json.loads(invoke("--show", "--json").stdout)["table"] == table
    assert "deleted" in invoke("--reset").stdout
    assert not table_path().exists()
    assert invoke("--reset").exit_code == 0


def test_the_next_process_uses_the_table_and_doctor_says_so(monkeypatch):
    assert invoke("--quick").exit_code == 0
    table = json.loads(table_path().read_text())
    table["few_pairs"]["float32"] = 12345
    table_path().write_text(json.dumps(table))
    code = "from heedful.backend.native.prefer import load_table; print(load_table()['few_pairs']['float32'])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "12345"
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["tuning"] == {"path": str(table_path()), "used": True, "reason": None}
    table["tier"] = "another"
    table_path().write_text(json.dumps(table))
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert not report["tuning"]["used"]
    assert any("tuning table" in problem["what"] for problem in report["problems"])
    monkeypatch.setenv("HEEDFUL_TUNING", "off")
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["tuning"]["reason"] == "HEEDFUL_TUNING=off"


def test_ctrl_c_stores_what_was_measured(monkeypatch):
    def measured(name, dtype, shipped, seconds):
        if dtype == "float64":
            raise KeyboardInterrupt
        return 77, "note"

    monkeypatch.setattr(tune, "few_pairs", measured)
    done = invoke("--quick")
    assert done.exit_code == 130
    table = json.loads(table_path().read_text())
    assert table["few_pairs"]["float32"] == 77
    assert table["few_pairs_gradient"]["float32"] > 77
    assert "shipped value" in done.stdout


def test_a_table_that_is_no_json_is_an_error():
    table_path().parent.mkdir(parents=True)
    table_path().write_text("{")
    done = invoke("--show")
    assert done.exit_code == 1
    assert str(table_path()) in done.output


def test_one_of_the_options_at_a_time():
    assert invoke("--show", "--reset").exit_code == 2


def test_the_path_is_found_without_importing_torch():
    code = "import sys, heedful.measure.tuning as t; t.table_path(); print({'torch', 'typer'} & set(sys.modules))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"


def test_a_threshold_moves_where_every_pass_says_so():
    def below(limit, size):
        return size < limit

    def found(*passes, shipped=64):
        return settle(shipped, (shipped, 0, 64, 256, 1024, 4096), passes, below)

    later = {16: 0.5, 64: 0.6, 256: 0.8, 1024: 1.5}
    assert found(later, later) == 1024
    assert found(later, {16: 0.5, 64: 1.1, 256: 1.3, 1024: 1.5}) == 64
    always = {16: 1.2, 64: 1.3, 256: 1.5, 1024: 2.0}
    assert found(always, always) == 0
    # One wrong measurement among right ones, and gains too small to count.
    assert found({16: 0.5, 64: 1.5, 256: 1.5, 1024: 0.8}, {16: 0.5, 64: 1.5, 256: 1.5, 1024: 2.0}) == 64
    slightly = {16: 0.5, 64: 0.99, 256: 1.5, 1024: 2.0}
    assert found(slightly, slightly) == 64


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ({2: [1.1, 1.2], 4: [1.0, 1.0]}, 2),
        ({2: [1.1, 1.0], 4: [1.0, 1.0]}, None),
        ({2: [1.02, 1.02], 4: [0.9, 0.9]}, None),
    ],
)
def test_a_constant_is_kept_if_it_wins_twice(monkeypatch, gains, kept):
    taken = {value: iter(times) for value, times in gains.items()}
    monkeypatch.setattr(tune, "_gains", lambda constant, value, works, seconds: [next(taken[value])])
    constant = Constant("item_bytes", (1 << 15, 1 << 16), (Work("float32", 2, 2, 32, 32, 16),))
    taken = dict(zip(constant.candidates, taken.values(), strict=True))
    with engine_at_rest():
        value, note = best_value(constant, 0.0)
    assert value == (None if kept is None else 1 << 15)
    assert "item_bytes" in note
