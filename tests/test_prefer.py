"""The tuning table: whose it is, what it changes, and that a table of another machine is left alone in plain words."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from inputs import attention_inputs

from heedful import choose, explain
from heedful.backend.native import library, prefer
from heedful.measure.machine import cpu_model

pytestmark = pytest.mark.skipif("native" in choose.UNAVAILABLE, reason="the engine is not built")


def tier() -> str:
    return library.isa_names()[library.isa_selected()]


def table(**changes) -> dict[str, object]:
    pairs = dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 100)
    own = {"version": 2, "tier": tier(), "torch": torch.__version__, "cpu": cpu_model()}
    limits = {"few_pairs": pairs, "few_pairs_gradient": pairs, "few_queries": 2, "cached_bytes": 1 << 20}
    return own | limits | {"engine": {}} | changes


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads a table, or a text in place of one, as a fresh process would."""
    before = library.tuning()

    def load(content: object) -> dict[str, object] | None:
        path = tmp_path / "tuning.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("HEEDFUL_TUNING", str(path))
        monkeypatch.setattr(prefer, "_table_loaded", False)
        return prefer.load_table()

    # So that the table of before comes back.
    monkeypatch.setattr(prefer, "_table", prefer.load_table())
    monkeypatch.setattr(prefer, "_table_loaded", True)
    yield load
    for name, value in before.items():
        library.tune(name, value)


def test_a_table_of_this_machine_decides(load, caplog) -> None:
    q, k, v = attention_inputs(batch=1, heads=1, q_length=12, k_length=12)
    with caplog.at_level(logging.WARNING, "heedful"):
        assert load(table())["few_queries"] == 2
        assert explain(q, k, v).backend == "native"
        load(table(few_pairs=table()["few_pairs"] | {"float32": 1000}))
        assert explain(q, k, v).backend == "sdpa"
        assert explain(q.double(), k.double(), v.double()).backend == "native"
        load(table(few_pairs_gradient=table()["few_pairs"] | {"float32": 1000}))
        assert explain(q, k, v).backend == "native"
        assert explain(q.requires_grad_(), k, v).backend == "sdpa"
        q.requires_grad_(False)
        load(table(few_queries=12))
        assert explain(q, k, v).backend == "sdpa"
        few = k[:, :, :1], v[:, :, :1]
        assert explain(q.new_ones(1, 1, 200, 16), *few).backend == "native"
        wide = [tensor.repeat(1, 1, 1, 2) for tensor in few]
        assert explain(q.new_ones(1, 1, 200, 32), *wide).backend == "sdpa"
        assert explain(q.new_ones(1, 1, 200, 32), wide[0], few[1]).backend == "native"
        load(table(few_queries=12, cached_bytes=64))
        assert explain(q, k, v).backend == "native"
    assert not caplog.records


def test_the_engines_constants_are_set(load) -> None:
    for name in library.tuning():
        value = accepted(name)
        assert load(table(engine={name: value}))["engine"] == {name: value}
        assert library.tuning()[name] == value


def accepted(name: str) -> int:
    """Some value that the engine takes for this constant, which is the engine's choice again then."""
    for value in (factor << bit for bit in range(30) for factor in (1, 3)):
        try:
            library.tune(name, value)
        except ValueError:
            continue
        library.tune(name, 0)
        return value
    raise AssertionError(f"the engine takes no such value as {name}")


def test_a_value_that_the_engine_refuses_leaves_every_constant_alone(load, caplog) -> None:
    good, bad = list(library.tuning())[:2]
    with caplog.at_level(logging.WARNING, "heedful"):
        assert load(table(engine={good: accepted(good), bad: 1 << 62})) == prefer.DEFAULTS.get(tier())
    assert f"tuning.json is not used: {bad}: is {1 << 62}, takes" in caplog.text
    assert library.tuning()[good] == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 1}, "its version is 1, here it is 2"),
        ({"tier": "neon9"}, "its tier is 'neon9', here it is"),
        ({"cpu": "another"}, "its cpu is 'another', here it is"),
        ({"few_pairs": {"float32": 5}}, "few_pairs is .* takes a count for each of float32, "),
        ({"few_pairs_gradient": 5}, "few_pairs_gradient is 5, and takes a count for each of float32, "),
        ({"few_queries": -1}, "few_queries is -1, and takes a count"),
        ({"cached_bytes": "1"}, "cached_bytes is '1', and takes a count"),
        ({"engine": {"nothing": 3}}, "this engine has no constant nothing"),
        ({"engine": [1]}, "engine is .* takes counts by name"),
    ],
    ids=str,
)
def test_a_table_that_is_not_used_is_named_with_the_reason(load, caplog, change, why) -> None:
    with caplog.at_level(logging.WARNING, "heedful"):
        assert load(table(**change)) == prefer.DEFAULTS.get(tier())
    (record,) = caplog.records
    assert "tuning.json is not used: " in record.getMessage()
    assert re.search(why, record.getMessage())


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_broken_file_is_named(load, caplog, content) -> None:
    with caplog.at_level(logging.WARNING, "heedful"):
        assert load(content) == prefer.DEFAULTS.get(tier())
    assert "tuning.json is not used: " in caplog.text


CHOICE = """
import logging
logging.basicConfig()
from heedful.backend.native.prefer import load_table
print((load_table() or {}).get("few_queries"))
"""


def in_a_process(**environment) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HEEDFUL_TUNING"} | environment
    return subprocess.run([sys.executable, "-c", CHOICE], env=environment, capture_output=True, text=True, check=True)


def test_where_the_table_is(tmp_path) -> None:
    (tmp_path / "heedful").mkdir()
    (tmp_path / "heedful" / "tuning.json").write_text(json.dumps(table(few_queries=77)))
    default = str(prefer.DEFAULTS.get(tier(), {}).get("few_queries"))
    found = in_a_process(XDG_CACHE_HOME=str(tmp_path))
    assert (found.stdout.strip(), found.stderr) == ("77", "")
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path), HEEDFUL_TUNING="off").stdout.strip() == default
    found = in_a_process(XDG_CACHE_HOME=str(tmp_path / "none"))
    assert (found.stdout.strip(), found.stderr) == (default, "")
    # A file that was asked for by name and is not there is no silent default.
    found = in_a_process(HEEDFUL_TUNING=str(tmp_path / "absent.json"))
    assert found.stdout.strip() == default
    assert "absent.json is not used: " in found.stderr


def test_every_tier_with_vectors_has_defaults() -> None:
    assert set(library.isa_names()) - {"portable"} <= set(prefer.DEFAULTS)
    for values in prefer.DEFAULTS.values():
        assert prefer._mismatch(table(**values), tier()) is None
