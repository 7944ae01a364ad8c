"""The documents name files that exist, and show what the commands really print."""

import re
from pathlib import Path

import pytest
import torch

import heedful

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="runs in a source tree only")
PATH = re.compile(r"`((?:src|engine|bridge|benchmarks|docs|tests)/[\w./]*)`")


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_every_path_in_the_text_exists(name):
    missing = [path for path in PATH.findall((ROOT / name).read_text()) if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the README's machine has no GPU")
def test_the_readme_shows_what_explain_prints():
    q = torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16)
    k = torch.empty(1, 2, 4096, 64, dtype=torch.bfloat16)
    shown = heedful.explain(q, k, k, pattern=heedful.SlidingWindow(256, 0) | heedful.Global(4))
    assert f"```\n{shown}\n```" in (ROOT / "README.md").read_text()


def test_the_readme_can_be_updated():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- bench:begin -->") == text.count("<!-- bench:end -->") == 1
