"""The demo's result for people: sections of the HTML report and lines for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from heedful.report.charts import Bar, bar_chart
from heedful.report.page import Section, check_numbers, page
from heedful.report.table import duration, machine_line, ratio

SIDES = {"sdpa": "PyTorch SDPA", "heedful": "heedful"}
TITLE = "heedful: the same answers, less work"
LEAD = (
    "Two transformer models run twice on this machine, once with PyTorch's own attention and once with heedful's. "
    "Every answer is compared before any time is."
)


def passed(result: dict[str, Any]) -> bool:
    """Whether both halves ran and every check passed."""
    halves = (result["encoder"], result["decoder"])
    return all("failure" not in half and all(check["passed"] for check in half["checks"]) for half in halves)


def report_page(result: dict[str, Any]) -> str:
    """The HTML report."""
    sections = [_encoder(result["encoder"]), _decoder(result["decoder"]), _environment(result["environment"])]
    return page(TITLE, f"{LEAD} {machine_line(result['environment'])}.", sections, result["command"])


def print_result(result: dict[str, Any], console: Console) -> None:
    """The same on the terminal."""
    console.print(machine_line(result["environment"]), markup=False)
    for section in (_encoder(result["encoder"]), _decoder(result["decoder"])):
        console.print(f"\n[bold]{escape(section.title)}[/]")
        if section.failure is not None:
            console.print(f"  [bold red]FAILED[/] {escape(section.failure)}")
        for name, value in (*section.facts, *((what, value) for value, what in section.figures)):
            console.print(f"  {escape(name)}: {escape(value)}")
        for check in section.checks:
            verdict = "[green]passed[/]" if check["passed"] else "[bold red]FAILED[/]"
            console.print(
                f"  {verdict} {escape(check['name'])}: {check_numbers(check)} ({escape(check['derivation'])})"
            )


def _failed(title: str, half: dict[str, Any]) -> Section:
    return Section(title, [], failure=half["failure"])


def _encoder(half: dict[str, Any]) -> Section:
    title = "A real sentence encoder reads Python's documentation"
    if "failure" in half:
        return _failed(title, half)
    timing, seconds = half["comparison"], half["seconds_per_pass"]
    figures = [
        (_with_quartiles(timing), "speed-up of a batch (median, quartiles)"),
        (f"{half['cosines']['smallest']:.7f}", "smallest cosine of two embeddings"),
        (f"{half['passages']}", "passages compared"),
    ]
    facts = [
        ("model", f"{half['model']} ({half['licence']}), weights from the package {half['package']}"),
        ("weights", f"sha256 {half['weights_sha256']}, verified"),
        ("text", f"{half['text']}: {half['passages']} passages, {half['tokens']} tokens"),
        ("padding", f"{half['padding_share']:.0%} of the batches' positions"),
        ("seconds a pass", ", ".join(f"{SIDES[side]} {value:.2f}" for side, value in seconds.items())),
    ]
    chart = bar_chart("Seconds to embed everything once", _bars(seconds, duration))
    text = (
        f"Each passage is embedded by both sides; batches take turns over {half['rounds']} passes. "
        "The whole model is timed, not attention alone."
    )
    return Section(title, [text], _if_green(half, figures), _if_green(half, [chart]), half["checks"], facts)


def _decoder(half: dict[str, Any]) -> Section:
    title = "A Mistral-shaped decoder reads a long text and goes on"
    if "failure" in half:
        return _failed(title, half)
    shape = half["shape"]
    prefill = {side: statistics.median(half["prefill_seconds"][side]) for side in SIDES}
    rate = {side: 1 / statistics.median(half["token_seconds"][side]) for side in SIDES}
    extra = {side: half["memory"][side]["peak"] - half["memory"][side]["loaded"] for side in SIDES}
    figures = [
        (ratio(half["prefill"]["ratio"]), f"speed-up of reading {half['length']} tokens"),
        (_with_quartiles(half["token"]), "speed-up of a generated token (median, quartiles)"),
        (f"{half['agreeing_tokens']} of {half['generated']}", "same greedy token after the same text"),
    ]
    charts = [
        bar_chart("Seconds to read the prompt", _bars(prefill, duration)),
        bar_chart("Tokens a second while generating", _bars(rate, lambda value: f"{value:.1f}")),
        bar_chart("Peak memory above the loaded model", _bars(extra, lambda value: f"{value / 2**20:.0f} MiB")),
    ]
    memory = ", ".join(f"{SIDES[side]} {half['memory'][side]['peak'] / 2**20:.0f} MiB" for side in SIDES)
    facts = [
        (
            "model",
            f"{half['model']} (seed {half['seed']}): {shape['num_hidden_layers']} layers, hidden "
            f"{shape['hidden_size']}, {shape['num_attention_heads']}/{shape['num_key_value_heads']} heads of "
            f"{shape['head_dim']}, sliding window {shape['sliding_window']}, {half['dtype']}",
        ),
        ("prompt", f"{half['length']} tokens of Python's documentation, then {half['generated']} generated"),
        ("seconds to read, by round", ", ".join(_round(half, index) for index in range(half["rounds"]))),
        ("time a generated token", ", ".join(f"{name} {duration(1 / rate[side])}" for side, name in SIDES.items())),
        ("peak memory", f"{memory}, each in a process of its own"),
    ]
    text = (
        "The weights are random: this shows speed, memory and agreement, not language. Both sides continue the same "
        "text, the one that PyTorch's side chose, so that every step's logits can be compared."
    )
    return Section(title, [text], _if_green(half, figures), _if_green(half, charts), half["checks"], facts)


def _environment(environment: dict[str, Any]) -> Section:
    threads = environment["threads"]
    facts = [
        ("processor", environment["cpu"]),
        ("instruction sets", ", ".join(environment["flags"]) or "none of interest"),
        ("HEEDFUL_ISA", environment["heedful_isa"] or "not set"),
        ("threads", f"{threads['torch_threads']}, limited by {threads['limited_by']}"),
        ("system", environment["system"]),
        *((name, str(version)) for name, version in environment["versions"].items()),
        ("date", environment["date"]),
    ]
    return Section("Environment", [], facts=facts)


def _if_green(half: dict[str, Any], items: list[Any]) -> list[Any]:
    """Nothing where a check failed: no speed-up stands beside a wrong answer."""
    return items if all(check["passed"] for check in half["checks"]) else []


def _bars(values: dict[str, float], text: Any) -> list[Bar]:
    return [Bar(name, values[side], text(values[side]), side == "heedful") for side, name in SIDES.items()]


def _with_quartiles(timing: dict[str, Any]) -> str:
    return f"{ratio(timing['ratio'])} ({timing['ratio_low']:.2f}–{timing['ratio_high']:.2f})"


def _round(half: dict[str, Any], index: int) -> str:
    def both() -> Iterator[str]:
        for side, name in SIDES.items():
            yield f"{name} {duration(half['prefill_seconds'][side][index])}"

    return f"{index + 1}: " + " against ".join(both())
