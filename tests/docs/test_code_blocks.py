"""The code of the README and of the documentation's pages runs, page by page, one block after the other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import heedful
from heedful.choose import BACKENDS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="runs in a source tree only")
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n\n?)?^```python(?: picture)?\n(?P<code>.*?)^```$", re.M | re.S)


def pages() -> list[str]:
    found = ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    return sorted(page for page in found if BLOCK.search((ROOT / page).read_text()))


def tensors(*sizes: int) -> dict[str, object]:
    return {name: torch.randn(sizes) for name in "qkv"}


def language_model(folder: Path) -> dict[str, object]:
    """A model that `from_pretrained(name)` loads, and a Longformer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    llama = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder)
    long = transformers.LongformerConfig(**sizes, num_hidden_layers=1, attention_window=16)
    made = SimpleNamespace(from_pretrained=lambda name: transformers.LongformerModel(long))
    return {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "LongformerModel": made,
        "name": str(folder),
        "inputs": {"input_ids": torch.arange(8)[None]},
    }


def given(page: str, folder: Path) -> dict[str, object]:
    """What a page's blocks take from around them."""
    names: dict[str, object] = {"torch": torch, "heedful": heedful, "np": np, **tensors(1, 8, 1024, 64)}
    if page in ("README.md", "docs/doors/hugging_face.md"):
        names |= language_model(folder)
    if page == "docs/doors/attention.md":
        names |= {"lengths": torch.tensor([700]), "mask": torch.rand(1024, 1024) < 0.5}
    if page == "docs/doors/kv_cache.md":
        names |= {"keys": torch.randn(1, 8, 5, 64), "values": torch.randn(1, 8, 5, 64)}
    if page == "docs/doors/sdpa.md":
        names |= {"model": torch.nn.TransformerEncoderLayer(32, 4), "inputs": torch.randn(5, 2, 32)}
    if page == "docs/doors/flash_attn.md":
        heedful.flash_attn.install()
    if page == "docs/doors/nn.md":
        names |= {
            "self": SimpleNamespace(),
            "load_my_model": lambda: torch.nn.Transformer(32, 4, 1, 1, 32),
            "x": torch.randn(1, 96, 256),
            "cu": torch.tensor([0, 40, 96]),
        }
        exec("model = load_my_model()\nattention = torch.nn.MultiheadAttention(256, 8, batch_first=True)", names)
        names["attention"] = heedful.convert(names["attention"])[0]
    if page == "docs/doors/numpy.md":
        rows = {name: np.random.default_rng(0).standard_normal((512, 64), np.float32) for name in "qkv"}
        names |= {**rows, "batches": [tuple(rows.values())]}
    return names


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backends, threads, modules = dict(BACKENDS), torch.get_num_threads(), set(sys.modules)
    torch.manual_seed(0)
    yield
    BACKENDS.clear()
    BACKENDS.update(backends)
    torch.set_num_threads(threads)
    while torch.nn.functional.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        heedful.deactivate()
    if "flash_attn" in set(sys.modules) - modules:
        heedful.flash_attn.uninstall()
    heedful.clear_caches()


@pytest.mark.parametrize("page", pages())
def test_blocks_run(page: str, tmp_path: Path, as_it_was: None) -> None:
    names = given(page, tmp_path)
    text = (ROOT / page).read_text()
    for block in BLOCK.finditer(text):
        if block["skip"]:
            continue
        for name in "qkv":
            if isinstance(names.get(name), torch.Tensor):
                names[name] = names[name].detach().requires_grad_("backward()" in block["code"])
        line = text.count("\n", 0, block.start("code"))
        # As many lines in front as the page has, so that a traceback names the page's line.
        run("\n" * line + block["code"], str(ROOT / page), names)


def run(code: str, path: str, names: dict[str, object]) -> None:
    """Runs the code; an expression with a literal in a comment behind it has that value."""
    lines = code.splitlines()
    for statement in ast.parse(code, path).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), path, "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), path, "eval"), names)
        _, _, comment = lines[statement.end_lineno - 1][statement.end_col_offset :].partition("#")
        try:
            expected = ast.literal_eval(comment.strip())
        except (SyntaxError, ValueError):
            continue
        assert value == expected, f"{path}:{statement.lineno}"
