"""The second half of the demo: a Mistral-shaped decoder reads a long text and goes on, each side in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.measure.checks import Check
from heedful.measure.machine import cpu_flags
from heedful.measure.numerics import RMS_FACTOR
from heedful.measure.timing import compare_samples

from .encoder import SIDES, model_folder
from .text import topics

if TYPE_CHECKING:
    from torch import Tensor

SEED = 20
# What two right implementations differ by, in fp32, and scaled to fp64.
SAME_ARITHMETIC = {"float32": 2e-4, "float64": 2e-4 * 2.0**-29}
SAME_RULE = "same weights and arithmetic in {exact}, heedful against eager; a window off by one key exceeds it"
PREFIX_RULE = "RMS error of the logits against the same weights in {exact} on a prefix ≤ 1.3 × that of sdpa"
FULL_RULE = "sum of what both sides err at their worst position of the prefix (triangle inequality)"
TIE_RULE = "where the greedy choices differ, a tie: two logits, each off by three times the allowed RMS difference"
CHECKED_POSITIONS = 64


@dataclass(frozen=True)
class Size:
    """How much the decoder does; widths are heads of 64, tried from the first, lengths likewise.

    There are more rounds than `rounds`, up to max_rounds, where the time allows it.
    """

    widths: tuple[int, ...] = (32, 16, 8)
    lengths: tuple[int, ...] = (8192, 6144, 4096, 3072, 2048)
    window: int = 1024
    prefix: int = 1536
    layers: int = 4
    tokens: int = 64
    turns: int = 24
    turn_tokens: int = 4
    rounds: int = 2
    max_rounds: int = 4
    seconds: float = 100.0


@contextmanager
def _worker(settings: dict[str, Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """A process that loads one model; yields a function that sends it a request and returns the answer."""
    command = [sys.executable, "-m", "heedful.cli.demonstration.worker"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        reader, writer = process.stdout, process.stdin
        # Sent at once, so that all processes load while the first is still waited for.
        writer.write(json.dumps(settings) + "\n")
        writer.flush()

        def ask(**request: Any) -> dict[str, Any]:
            try:
                writer.write(json.dumps(request) + "\n")
                writer.flush()
                line = reader.readline()
            except BrokenPipeError:  # it ended before; what it said is read below
                line = ""
            if not line:
                process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
                raise RuntimeError(f"the {settings['implementation']} process ended early: {last}")
            answer: dict[str, Any] = json.loads(line)
            return answer

        try:
            yield ask
        finally:
            with suppress(BrokenPipeError):
                writer.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def run_decoder(size: Size, advance: Callable[[float], None]) -> dict[str, Any]:
    """Let both implementations read the same prompt and generate, turn by turn, and compare logits, time and memory.

    Args:
        size: how much to do at most; width and length are reduced until it fits size.seconds.
        advance: told which share of this half is done since the last time.

    Returns:
        JSON-serialisable: the model's shape, checks, timings and their comparison, memory of each side.

    Raises:
        RuntimeError: one of the processes ended early.
        MissingError: the packaged tokenizer is not installed.
    """
    import torch

    dtype, exact = (
        ("bfloat16", "float32") if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else ("float32", "float64")
    )
    heads = _fitting_width(size, dtype)
    settings = {
        "dtype": dtype,
        "upcast": None,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "tokens": _prompt(max(size.lengths)),
        "shape": _shape(size, heads),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(settings | {"implementation": side})) for side in SIDES}
        checks, worst = _check_prefix(size, settings, workers, Path(folder), exact)
        advance(0.25)
        length, rounds = _fitting_length(size, workers)
        advance(0.1)
        loaded = {side: ask(do="loaded")["loaded_bytes"] for side, ask in workers.items()}
        runs = _generate(size, workers, length, rounds, Path(folder), lambda share: advance(0.6 * share))
        token = _go_on(size, workers)
        advance(0.05)
        logits = {side: torch.load(Path(folder) / f"{side}.pt") for side in SIDES}
    checks += _check_generation(logits, runs, worst)
    agreeing = sum(a == b for a, b in zip(runs["sdpa"][0]["chosen"], runs["heedful"][0]["chosen"], strict=True))
    prefill = {side: [run["prefill_seconds"] for run in runs[side]] for side in SIDES}
    return {
        "model": "Mistral-shaped, random weights",
        "shape": settings["shape"],
        "seed": SEED,
        "dtype": dtype,
        "length": length,
        "generated": size.tokens,
        "rounds": len(runs["sdpa"]),
        "prefill_seconds": prefill,
        "token_seconds": token,
        "prefill": compare_samples(prefill["sdpa"], prefill["heedful"]).to_json(),
        "token": compare_samples(token["sdpa"], token["heedful"]).to_json(),
        "agreeing_tokens": agreeing,
        "memory": {side: {"loaded": loaded[side], "peak": runs[side][-1]["peak_bytes"]} for side in SIDES},
        "checks": [check.to_json() for check in checks],
    }


def _shape(size: Size, heads: int) -> dict[str, Any]:
    """MistralConfig's arguments; the feed-forward is 3.5 times as wide as the model, as in Mistral 7B."""
    hidden = heads * 64
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64,
        "sliding_window": size.window,
        "vocab_size": 30522,
        "max_position_embeddings": 2 * max(size.lengths),
        # Keeps queries, keys and values at unit variance at every width, so that a wrong mask shows in the logits.
        "initializer_range": hidden**-0.5,
        # Generation must not end early.
        "eos_token_id": None,
    }


def _prompt(length: int) -> list[int]:
    """The first tokens of Python's documentation topics, by the sentence encoder's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for text in topics():
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= length:
            break
    return ids[:length]


def _fitting_width(size: Size, dtype: str) -> int:
    """The first width whose matrix products, at this machine's measured rate, leave half of the time for attention."""
    import torch

    left, right = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((1024, 2048), (2048, 2048)))
    left @ right
    start = time.perf_counter()
    for _ in range(3):
        left @ right
    rate = 3 * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - start)
    for heads in size.widths:
        hidden = heads * 64
        weights = size.layers * hidden * hidden * (2.5 + 3 * 3.5)
        if 2 * size.rounds * 2 * weights * min(size.lengths) / rate < size.seconds / 2:
            return heads
    return size.widths[-1]


def _fitting_length(size: Size, workers: dict[str, Callable[..., dict[str, Any]]]) -> tuple[int, int]:
    """The first length whose rounds fit the time, and how many rounds do.

    By a·L + b·L² through two short runs of each side, which is warm by now.
    """
    short, longer = min(size.lengths) // 2, min(size.lengths)
    curves = []
    for ask in workers.values():
        first, second = (ask(do="prefill", length=length)["seconds"] for length in (short, longer))
        square = max(0.0, (second - first * longer / short) / (longer * (longer - short)))
        curves.append((second / longer - square * longer, square))
    for length in size.lengths:
        fitting = int(size.seconds / sum(a * length + b * length**2 for a, b in curves))
        if fitting >= size.rounds:
            return length, min(fitting, size.max_rounds)
    return size.lengths[-1], size.rounds


def _check_prefix(
    size: Size,
    settings: dict[str, Any],
    workers: dict[str, Callable[..., dict[str, Any]]],
    folder: Path,
    exact: str,
) -> tuple[list[Check], float]:
    """Both sides against the same weights one precision up; also the allowed RMS difference at full length."""
    import torch

    positions = torch.linspace(0, size.prefix - 1, CHECKED_POSITIONS).long().unique().tolist()
    saved = {name: str(folder / f"prefix-{name}.pt") for name in (*SIDES, "exact", "heedful, exact")}
    with _worker(settings | {"implementation": "eager", "upcast": exact}) as ask:
        ask(do="logits", length=size.prefix, positions=positions, save=saved["exact"])
        ask(do="use", implementation="heedful")
        ask(do="logits", length=size.prefix, positions=positions, save=saved["heedful, exact"])
        checksum = ask(do="loaded")["checksum"]
    for side, worker in workers.items():
        if worker(do="loaded")["checksum"] != checksum:
            raise RuntimeError(f"the {side} process drew other weights than the reference from seed {SEED}")
        worker(do="logits", length=size.prefix, positions=positions, save=saved[side])
    reference = torch.load(saved["exact"])
    largest = float((torch.load(saved["heedful, exact"]) - reference).abs().max())
    square = {side: (torch.load(saved[side]) - reference).square() for side in SIDES}
    rms = {side: float(square[side].mean().sqrt()) for side in SIDES}
    worst = sum(float(square[side].mean(-1).max().sqrt()) for side in SIDES)
    short = "fp32" if exact == "float32" else "fp64"
    checks = [
        Check(
            f"largest difference of the prefix logits in {short}",
            largest,
            SAME_ARITHMETIC[exact],
            SAME_RULE.format(exact=short),
        ),
        Check(
            "RMS error of the prefix logits",
            rms["heedful"],
            RMS_FACTOR * rms["sdpa"],
            PREFIX_RULE.format(exact=short),
        ),
    ]
    return checks, worst


def _generate(
    size: Size,
    workers: dict[str, Callable[..., dict[str, Any]]],
    length: int,
    rounds: int,
    folder: Path,
    advance: Callable[[float], None],
) -> dict[str, list[dict[str, Any]]]:
    """Rounds of both sides, turn by turn; sdpa's first greedy tokens are the text that every run continues with.

    On a machine that got slower since the length was chosen there are fewer rounds, but always one.
    """
    deadline = time.perf_counter() + 1.5 * size.seconds
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    forced: list[int] | None = None
    for turn in range(rounds):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            save = str(folder / f"{side}.pt")
            answer = workers[side](do="generate", length=length, steps=size.tokens, forced=forced, save=save)
            forced = forced or answer["tokens"]
            runs[side].append(answer)
            advance(1 / (2 * rounds))
        spent = sum(runs[side][-1]["prefill_seconds"] for side in SIDES)
        if time.perf_counter() + spent > deadline:
            break
    return runs


def _go_on(size: Size, workers: dict[str, Callable[..., dict[str, Any]]]) -> dict[str, list[float]]:
    """Seconds a token of both sides, turn by turn: a token takes milliseconds, and the machine's speed drifts."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(size.turns):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            seconds[side].append(workers[side](do="go_on", steps=size.turn_tokens)["seconds"])
    return seconds


def _check_generation(logits: dict[str, Tensor], runs: dict[str, list[dict[str, Any]]], allowed: float) -> list[Check]:
    """Every step's logits of both sides for the same text, and the steps where their choices differ."""
    import torch

    theirs, ours = logits["sdpa"].double(), logits["heedful"].double()
    difference = float((theirs - ours).square().mean(-1).max().sqrt())
    chosen = torch.tensor(runs["heedful"][-1]["chosen"])
    gap = float((theirs.max(-1).values - theirs.gather(-1, chosen[:, None])[:, 0]).max())
    return [
        Check("RMS difference of the logits at the worst step", difference, allowed, FULL_RULE),
        Check("largest gap at a differing token", gap, 6 * allowed, TIE_RULE),
    ]
