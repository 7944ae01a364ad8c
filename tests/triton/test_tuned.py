"""Tiles from the table that `heedful tune --gpu` stores."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from heedful.backend.triton import gradients, launch, tuned, tuning
from heedful.backend.triton.tuning import Tiles, backward_tiles, forward_tiles
from heedful.cli import app
from heedful.measure import tune_gpu
from heedful.measure.tune_gpu import ROWS, measure_tiles

ASKED = 90, torch.bfloat16, 128, 128, 0, 0, False, True
ASKED_BACKWARD = 90, torch.bfloat16, 128, 128, 0, False, True
TILES, TILES_BACKWARD = (32, 16, 2, 1, False), (16, 32, 8, 3, True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table with changes, and says what is read from it."""

    def write(**changes: object) -> dict[tuple[object, ...], Tiles]:
        entries = [
            {"of": tuned.encoded_key(ASKED), "tiles": TILES},
            {"of": tuned.encoded_key(ASKED_BACKWARD), "tiles": TILES_BACKWARD},
        ]
        content = {"version": tuned.TABLE_VERSION, **tuned.identity(), "entries": entries} | changes
        (tmp_path / "heedful" / "tuning_gpu.json").write_text(json.dumps(content))
        return tuned.stored_tiles()

    (tmp_path / "heedful").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HEEDFUL_GPU_TUNING", raising=False)
    return write


def test_stored_tiles_take_the_place_of_the_shipped_ones(table, monkeypatch):
    assert tuned.stored_tiles() == {}
    monkeypatch.setattr(tuning, "overrides", table())
    for cached in (forward_tiles, backward_tiles):
        cached.cache_clear()
    assert forward_tiles(*ASKED) == Tiles(*TILES)
    assert backward_tiles(*ASKED_BACKWARD) == Tiles(*TILES_BACKWARD)
    assert forward_tiles(*ASKED[:-1], False) != Tiles(*TILES)
    for cached in (forward_tiles, backward_tiles):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": "another"}, "device 'another'"),
        ({"triton": "1.0"}, "triton '1.0'"),
        ({"version": 0}, "version"),
        ({"entries": [{"of": [90], "tiles": [1]}]}, "Error"),
        ({"entries": 3}, "Error"),
    ],
)
def test_a_table_of_something_else_is_not_used(table, caplog, changes, text):
    with caplog.at_level(logging.WARNING, "heedful"):
        assert table(**changes) == {}
    assert text in caplog.text


def test_the_environment_names_another_table_or_none(table, monkeypatch, tmp_path, caplog):
    assert table()
    monkeypatch.setenv("HEEDFUL_GPU_TUNING", "off")
    assert tuned.stored_tiles() == {}
    monkeypatch.setenv("HEEDFUL_GPU_TUNING", str(tmp_path / "none.json"))
    assert tuned.stored_tiles() == {}
    assert "none.json" in caplog.text


def test_show_and_reset(table):
    run = CliRunner().invoke
    assert "not there" in run(app, ["tune", "--gpu", "--show"]).output
    table()
    assert json.loads(run(app, ["tune", "--gpu", "--show", "--json"]).output)["table"]["entries"]
    assert "deleted" in run(app, ["tune", "--gpu", "--reset"]).output
    assert tuned.stored_tiles() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_one_line(table):
    done = CliRunner().invoke(app, ["tune", "--gpu"])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "heedful tune --gpu: there is no CUDA device here, so there is nothing to measure\n"


class Asked(dict):
    """A table of nothing that remembers what it was asked for."""

    def __init__(self) -> None:
        self.keys_asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(key)
        return False


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_what_its_calls_ask_for(monkeypatch, row):
    asked = Asked()
    monkeypatch.setattr(tuning, "overrides", asked)
    monkeypatch.setattr(launch, "device_limits", lambda index: (90, 132))
    monkeypatch.setattr(gradients, "device_limits", lambda index: (90, 132))
    caches = tuning.forward_tiles, tuning.backward_tiles, launch._forward, gradients._backward
    for cached in caches:
        cached.cache_clear()
    for name in row.patterns:
        q, k, v = (
            torch.randn(1, heads, length, row.head_dim, dtype=torch.bfloat16)
            for heads, length in ((row.group, row.q_length), (1, row.k_length), (1, row.k_length))
        )
        code = tune_gpu._pattern(name).schedule.encode()
        out, lse = launch.forward_work(q, k, v, (), code, 0.1, False).results
        if row.kind != "forward":
            none = None, None, 0.0, 0.0, None, None, None, False, False
            gradients.backward_work(out, q, k, v, out, lse, (), code, 0.1, *none)
    for cached in caches:
        cached.cache_clear()
    assert row.key(90) in asked.keys_asked


@pytest.mark.gpu
def test_a_row_is_measured(monkeypatch):
    class Quiet:
        def begin(self, text):
            pass

        def advance(self, amount=1):
            pass

    from dataclasses import replace

    row = replace(ROWS[0], candidates=ROWS[0].candidates[:2], q_length=512, k_length=512)
    found = measure_tiles(Quiet(), [row])
    assert set(found["rates"][row.name]) <= {str(numbers) for numbers in row.candidates}
    assert not tuning.overrides
