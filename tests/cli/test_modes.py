"""`heedful bench --sweep`, `--decode`, `--training` and `--density` on tiny sizes."""

import json

import pytest
import torch
from typer.testing import CliRunner

import heedful
from heedful.cli import app
from heedful.measure import cases, decode, density, language_model, peaks, sweep, training
from heedful.measure.cases import FAMILIES, draw_cases
from heedful.measure.decode import Shape
from heedful.measure.density import Point
from heedful.measure.timing import Comparison, take_turns

SIZE = language_model.Size(layers=1, heads=2, head_dim=8, length=96, window=16)
MODES = ("sweep", "decode", "training", "density")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(cases, "LONGEST", 40)
    monkeypatch.setattr(cases, "WORK_LIMIT", dict.fromkeys(cases.DTYPE_WEIGHTS, 2e6))
    monkeypatch.setattr(sweep, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "SUSPECT_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "is_slower", lambda timing: False)
    stub = peaks.Peaks({"float32": 1e11, "bfloat16": 2e11}, {1: 1e10})
    monkeypatch.setattr(decode, "measure_peaks", lambda *_: stub)
    monkeypatch.setattr(decode, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(decode, "caches", lambda: [{"level": 2, "bytes": 1 << 15}])
    monkeypatch.setattr(decode, "RESIDENT_SECONDS", 0.0)
    monkeypatch.setattr(decode, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(decode, "DTYPES", ("bfloat16", "float32"))
    monkeypatch.setattr(decode, "LENGTHS", (64, 128))
    monkeypatch.setattr(
        decode, "shapes", lambda full: [Shape("bfloat16", 32, 8, 128, 64), Shape("float32", 4, 2, 16, 65, 2, 4)]
    )
    monkeypatch.setattr(density, "LENGTH", 96)
    monkeypatch.setattr(density.measure_density, "__kwdefaults__", {"length": 96, "seconds": 0.0})
    monkeypatch.setattr(density, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STEPS", 3)
    monkeypatch.setattr(language_model, "Size", lambda: SIZE)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


SMALL = {
    "sweep": ("--sweep", "6"),
    "decode": ("--decode",),
    "training": ("--training",),
    "density": ("--density", "--only", "window"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_its_files_whole(mode, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {mode}:begin -->\n<!-- {mode}:end -->\nafter\n")
    names = {"--save": "r.json", "--plot": "r.png", "--html": "r.html"}
    options = [word for option, name in names.items() for word in (option, str(tmp_path / name))]
    done = bench(*SMALL[mode], *options, "--update", str(page))
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["mode"] == mode
    assert not result["interrupted"]
    assert result["command"].startswith(f"heedful bench --{mode}")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "r.html").read_text()
    assert "All " in html
    assert "FAILED" not in html
    assert html.count("<svg") >= 2
    assert "http" not in html
    assert result["environment"]["cpu"] in html
    text = page.read_text()
    assert text.startswith("before\n")
    assert f"Command: `{result['command']}`" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md", "r.html", "r.json", "r.png"]


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_keeps_what_was_measured(mode, tmp_path, monkeypatch):
    page, save = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(f"<!-- {mode}:begin -->\nold\n<!-- {mode}:end -->\n")
    where, name = {
        "sweep": (sweep, "run_case"),
        "decode": (decode, "run_shape"),
        "training": (training, "_batch"),
        "density": (density, "run_point"),
    }[mode]
    right, calls = getattr(where, name), []

    def stop_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(where, name, stop_at_the_second)
    done = bench(*SMALL[mode], "--save", str(save), "--update", str(page))
    assert done.exit_code == 130, done.output
    result = json.loads(save.read_text())
    assert result["interrupted"]
    measured = {"sweep": "cases", "decode": "rows", "density": "points"}.get(mode)
    assert len(result[measured] if measured else result["losses"]["sdpa"]) == 1
    assert "old" in page.read_text()


@pytest.mark.parametrize("mode", ["sweep", "decode", "density"])
def test_a_wrong_answer_has_no_ratio_and_exits_with_1(mode, monkeypatch):
    right = heedful.attention
    monkeypatch.setattr(heedful, "attention", lambda *tensors, **options: right(*tensors, **options) * 1.05)
    done = bench(*SMALL[mode], "--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    for row in result.get("cases") or result.get("rows") or result["points"]:
        if not all(check["passed"] for check in row["checks"]):
            assert not any(row.get(name) for name in ("comparison", "ways", "directions"))
    done = bench(*SMALL[mode])
    assert "FAILED" in done.stdout


def test_a_training_that_drifts_away_is_red(monkeypatch):
    right, checked = heedful.attention, training._check_attention
    monkeypatch.setattr(training, "_check_attention", lambda *arguments: checked(*arguments))
    monkeypatch.setattr(heedful, "attention", lambda *tensors, **options: right(*tensors, **options) * 1.001)
    done = bench("--training", "--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["comparison"] is None
    assert "largest difference of the losses" in [c["name"] for c in result["checks"] if not c["passed"]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("5",), "[N]"),
        (("--sweep", "--decode"), "one at a time"),
        (("--decode", "--steps", "3"), "--steps"),
        (("--sweep", "--only", "x"), "--only"),
        (("--training", "--full"), "--full"),
        (("--density", "--dtype", "int8"), "int8"),
        (("--decode", "--only", "no such shape"), "no such shape"),
        (("--sweep", "2", "--save", "/no/such/folder/x.json"), "/no/such/folder"),
        (("--sweep", "2", "--threads", "100000"), "threads must be"),
    ],
)
def test_what_makes_no_sense_is_refused_before_measuring(arguments, word):
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert word in done.output


def test_cases_are_reproducible_and_cover_the_families():
    few, many = list(draw_cases(20)), list(draw_cases(200))
    assert many[:20] == few
    assert many != list(draw_cases(200, seed=1))
    assert {case.family for case in many} == set(FAMILIES)
    assert {case.dtype for case in many} == set(cases.DTYPE_WEIGHTS)
    assert 40 < sum(case.gradients for case in many) < 90
    assert any(case.value_dim != case.head_dim for case in many)
    assert any(case.q_length == 1 < case.k_length for case in many)
    for case in many:
        assert case.dense_flops <= cases.WORK_LIMIT[case.dtype]
        assert case.heads % case.kv_heads == 0
        pattern = case.make_pattern()
        if pattern is not None:
            pattern.validate(case.batch, case.heads, case.q_length, case.k_length)


def test_a_loss_is_more_than_five_per_cent_and_two_microseconds(monkeypatch):
    monkeypatch.undo()

    def timing(theirs, ours):
        return Comparison(theirs, ours, theirs / ours, theirs / ours, theirs / ours, 3)

    assert sweep.is_slower(timing(1.0, 1.06))
    assert not sweep.is_slower(timing(1.0, 1.04))
    assert not sweep.is_slower(timing(5e-6, 6.9e-6))
    assert sweep.is_slower(timing(5e-6, 7.1e-6))


def test_a_loss_counts_only_if_it_is_seen_twice(monkeypatch):
    seen = iter([True, False, True, True])
    monkeypatch.setattr(sweep, "is_slower", lambda timing: next(seen))
    (case,) = draw_cases(1)
    first = sweep.run_case(case, threads=1, other_threads=1, seconds=0.0)
    second = sweep.run_case(case, threads=1, other_threads=1, seconds=0.0)
    assert (first["repeated"], first["verdict"] != "loss") == (True, True)
    assert (second["repeated"], second["verdict"]) == (True, "loss")


def test_a_loss_and_a_choice_by_threads_exit_with_1(monkeypatch):
    monkeypatch.setattr(sweep, "is_slower", lambda timing: True)
    done = bench("--sweep", "2")
    assert done.exit_code == 1
    assert "FAILED slower: #0" in done.output
    monkeypatch.setattr(sweep, "is_slower", lambda timing: False)
    monkeypatch.setattr(sweep, "_backend", lambda tensors, pattern, threads: str(threads))
    done = bench("--sweep", "2")
    assert done.exit_code == (1 if len(heedful.measure.machine.affinity() or [0, 1]) > 1 else 0)


@pytest.mark.parametrize("family", density.FAMILIES)
def test_families_come_near_the_density_that_is_asked_for(family):
    for aim in (0.03, 0.1, 0.3):
        found = density.FAMILIES[family](4096, aim).density(4096, 4096)
        assert 0.7 * aim < found < 1.4 * aim, Point(family, aim).name


def test_the_shapes_of_a_decode_table_are_bounded(monkeypatch):
    monkeypatch.undo()
    some, every = decode.shapes(full=False), decode.shapes(full=True)
    assert set(some) <= set(every)
    assert len(set(every)) == len(every) > 500
    assert all(shape.bytes <= decode.BYTES_LIMIT for shape in every)


def test_the_training_text_is_text_and_the_model_is_causal():
    text = training.training_text()
    assert len(text) > 300_000
    assert b"The import statement" in text or b"import" in text
    mask = heedful.SlidingWindow(SIZE.window - 1, 0).dense(SIZE.length, SIZE.length)
    torch.manual_seed(0)
    model = language_model.LanguageModel(
        SIZE, lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )
    batch = torch.randint(256, (1, SIZE.length))
    changed = batch.clone()
    changed[0, 50] = (changed[0, 50] + 1) % 256
    before, after = model(batch), model(changed)
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50], after[:, 50])


def test_every_side_of_many_goes_first_in_turn():
    order = []
    sides = [lambda name=name: order.append(name) for name in "abc"]
    samples = take_turns(sides, seconds=0.0, min_rounds=3, max_rounds=3)
    assert [len(times) for times in samples] == [3, 3, 3]
    runs = [name for index, name in enumerate(order) if index == 0 or name != order[index - 1]]
    assert "".join(runs[-9:]) in ("abcbcacab", "bcbcacab", "abcbcacab"[-len(runs[-9:]) :])
