"""`import flash_attn`: what install() puts there, and the modules that models import from it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flash_oracle import turned
from torch import Tensor

from heedful import flash_attn
from heedful.flash_attn import bert_padding, install, uninstall
from heedful.flash_attn.layers import rotary

MODULES = ("flash_attn_interface", "bert_padding", "layers", "layers.rotary")


EXAMPLE = Path(__file__).parents[2] / "examples" / "flash_attn_model.py"


def run(*arguments: str | Path) -> str:
    """What a fresh Python prints."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_code(code: str) -> None:
    run("-c", textwrap.dedent(code))


class TestInstall:
    @pytest.fixture(autouse=True)
    def _undone(self) -> Iterator[None]:
        yield
        uninstall()

    def test_modules_are_found_and_gone_again(self):
        assert importlib.util.find_spec("flash_attn") is None
        install()
        assert importlib.util.find_spec("flash_attn") is not None
        assert "flash_attn" not in sys.modules
        found = importlib.import_module("flash_attn")
        assert found.flash_attn_func is flash_attn.flash_attn_func
        assert found.flash_attn_interface.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
        assert found.__version__ == "2.8.3"
        assert Path(found.__file__) == Path(flash_attn.__file__)
        for name in MODULES:
            module = importlib.import_module(f"flash_attn.{name}")
            assert module.__spec__ is not None
            assert module.__spec__.name == module.__name__ == f"flash_attn.{name}"
            assert importlib.util.find_spec(module.__name__) is module.__spec__
        assert found.bert_padding.unpad_input is bert_padding.unpad_input
        assert found.layers.rotary.apply_rotary_emb_func is rotary.apply_rotary_emb
        names: dict[str, object] = {}
        exec("from flash_attn import *", names)
        assert {"flash_attn_func", "flash_attn_with_kvcache"} <= names.keys()
        assert "install" not in names
        uninstall()
        assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
        with pytest.raises(ModuleNotFoundError, match="flash_attn"):
            importlib.import_module("flash_attn")

    def test_what_is_not_there_is_not_found(self):
        install()
        assert importlib.util.find_spec("flash_attn.losses") is None
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops"):
            importlib.import_module("flash_attn.ops")

    def test_a_second_time(self):
        install()
        before = list(sys.meta_path)
        install()
        assert sys.meta_path == before
        uninstall()
        uninstall()
        assert len(sys.meta_path) == len(before) - 1

    @pytest.fixture
    def real(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Another flash_attn on the path."""
        package = tmp_path / "flash_attn"
        package.mkdir()
        (package / "__init__.py").write_text("flash_attn_func = 'real'\n")
        (package / "bert_padding.py").write_text("unpad_input = 'real'\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield package
        uninstall()
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]

    @pytest.mark.parametrize("imported", [False, True])
    def test_the_real_one_stays_unless_asked_for(self, real, imported):
        if imported:
            module = importlib.import_module("flash_attn")
            importlib.import_module("flash_attn.bert_padding")
        with pytest.raises(RuntimeError, match=r"flash_attn is installed .*flash_attn/__init__.py.*replace=True"):
            install()
        assert importlib.import_module("flash_attn").flash_attn_func == "real"
        install(replace=True)
        assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
        assert importlib.import_module("flash_attn.bert_padding").unpad_input is bert_padding.unpad_input
        uninstall()
        assert importlib.import_module("flash_attn").flash_attn_func == "real"
        if imported:
            assert importlib.import_module("flash_attn") is module
            assert sys.modules["flash_attn.bert_padding"].unpad_input == "real"


MODEL = """
import torch
from torch import nn
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb_func


class Block(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        angles = torch.arange(64)[:, None] * 0.5 ** torch.arange(4)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x, mask=None):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k = (apply_rotary_emb_func(t, self.cos, self.sin) for t in (q, k))
        if mask is None:
            found = flash_attn_func(q, k, v, causal=True, window_size=(8, 0))
        else:
            q, indices, cu, longest, _ = unpad_input(q, mask)
            k, v = (index_first_axis(t.flatten(0, 1), indices) for t in (k, v))
            found = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, window_size=(8, 0))
            found = pad_input(found, indices, batch, length)
        return self.out(found.flatten(2))
"""


def test_a_model_with_hard_wired_imports_runs(tmp_path):
    (tmp_path / "wired.py").write_text(MODEL)
    run_code(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import wired
        except ModuleNotFoundError as error:
            assert error.name == "flash_attn"
        else:
            raise AssertionError
        import heedful.flash_attn
        heedful.flash_attn.install()
        import torch
        import wired

        torch.manual_seed(0)
        block, x = wired.Block(), torch.randn(3, 20, 32)
        mask = torch.arange(20) < torch.tensor([20, 7, 1])[:, None]
        out = block(x, mask)
        for item, length in enumerate((20, 7, 1)):
            torch.testing.assert_close(out[item, :length], block(x[item : item + 1, :length])[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(out[1, 7:], block.out(torch.zeros(13, 32)))
        out.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    """)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="runs in a source tree only")
def test_the_example_runs():
    assert "the same as all at once" in run(EXAMPLE)


def test_transformers_takes_no_notice():
    pytest.importorskip("transformers")
    run_code("""
        import heedful.flash_attn
        heedful.flash_attn.install()
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertModel
        from transformers.utils import import_utils

        # The distribution is what it looks for, and the GPU: what it would do with flash-attn takes both.
        assert not import_utils.is_flash_attn_2_available()
        assert not import_utils.is_flash_attn_greater_or_equal("2.1.0")
        assert not import_utils.is_flash_attn_4_available()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "vocab_size": 50, "max_position_embeddings": 64}
        tokens = torch.randint(0, 50, (2, 13))
        for kind, config in ((LlamaForCausalLM, LlamaConfig), (ModernBertModel, ModernBertConfig)):
            special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            model = kind(config(**sizes, **special)).eval()
            assert model.config._attn_implementation == "sdpa"
            found = model(tokens)[0]
            model.set_attn_implementation("eager")
            torch.testing.assert_close(model(tokens)[0], found, atol=1e-5, rtol=1e-5)
        assert kind(config(**sizes, **special)).config._attn_implementation == "sdpa"
        try:
            LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="flash_attention_2")
        except ImportError as error:
            assert "flash" in str(error).lower()
        else:
            raise AssertionError
    """)


class TestPadding:
    MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
    def test_there_and_back(self, dtype):
        x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
        tokens, indices, cu, longest, used = bert_padding.unpad_input(x, self.MASK.to(dtype))
        assert torch.equal(tokens, x[self.MASK.bool()])
        assert indices.tolist() == [0, 1, 3, 10, 11, 12, 13, 14]
        assert cu.tolist() == [0, 3, 3, 8]
        assert cu.dtype == used.dtype == torch.int32
        assert (type(longest), longest) == (int, 5)
        assert used.tolist() == [3, 0, 5]
        padded = bert_padding.pad_input(tokens, indices, 3, 5)
        assert torch.equal(padded, x * self.MASK[:, :, None, None])
        assert torch.autograd.gradcheck(lambda x: bert_padding.unpad_input(x, self.MASK)[0], x)
        assert torch.autograd.gradcheck(
            lambda t: bert_padding.pad_input(t, indices, 3, 5), tokens.detach().requires_grad_()
        )

    def test_unused_tokens_are_kept_and_not_counted(self):
        x, unused = torch.randn(3, 5, 4), torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5])
        tokens, indices, cu, longest, used = bert_padding.unpad_input(x, self.MASK, unused)
        assert torch.equal(tokens, x[(self.MASK + unused).bool()])
        assert cu.tolist() == [0, 4, 5, 10]
        assert longest == 5
        assert used.tolist() == [3, 0, 5]
        assert len(indices) == 10

    def test_several_sequences_to_an_item(self):
        lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
        x = torch.randn(3, 6, 4)
        tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
        assert cu.tolist() == [0, 2, 5, 8, 10, 16]
        assert longest == 6
        assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
        assert torch.equal(tokens, x.flatten(0, 1)[indices])

    def test_index_functions(self):
        x, indices = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
        assert torch.equal(bert_padding.index_first_axis(x, indices), x[indices])
        put = bert_padding.index_put_first_axis(x[indices], indices, 6)
        assert torch.equal(put[indices], x[indices])
        assert put.count_nonzero() == 9
        picked, residual = bert_padding.index_first_axis_residual(x, indices)
        assert torch.equal(picked, x[indices])
        assert torch.equal(residual, x)
        for function in (bert_padding.index_first_axis, bert_padding.index_first_axis_residual):
            assert torch.autograd.gradcheck(lambda x, function=function: function(x, indices), x)


class TestRotary:
    POSITIONS = 30

    def tables(self, half: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        angle = torch.rand(self.POSITIONS, half) * 6
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("offsets", [0, 5, [3, 0, 17]], ids=str)
    @pytest.mark.parametrize("dim", [8, 11])
    def test_positions(self, dtype, interleaved, offsets, dim):
        (cos, sin), x = self.tables(dtype=dtype), torch.randn(3, 7, 2, dim).to(dtype)
        given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
        each = offsets if isinstance(offsets, list) else [offsets] * 3
        wanted = torch.stack(
            [turned(x[b], cos, sin, torch.arange(each[b], each[b] + 7), interleaved) for b in range(3)]
        )
        found = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=given)
        torch.testing.assert_close(found, wanted)
        same = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace=True, seqlen_offsets=given)
        assert same is x
        assert torch.equal(x, found)

    @pytest.mark.parametrize("offsets", [0, 2, [3, 0, 17]], ids=str)
    def test_packed_sequences(self, offsets):
        (cos, sin), lengths = self.tables(), [4, 0, 6]
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        x = torch.randn(10, 2, 8)
        given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
        each = offsets if isinstance(offsets, list) else [offsets] * 3
        found = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=given, cu_seqlens=cu, max_seqlen=6)
        for t in range(3):
            part = slice(cu[t], cu[t + 1])
            wanted = turned(x[part], cos, sin, torch.arange(each[t], each[t] + lengths[t]), False)
            torch.testing.assert_close(found[part], wanted)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_gradients(self, interleaved):
        cos, sin = self.tables(dtype=torch.float64)
        x = torch.randn(2, 5, 2, 11, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: rotary.apply_rotary_emb(x, cos, sin, interleaved), x)
        offsets = torch.tensor([2, 0])

        def in_place(x: Tensor) -> Tensor:
            return rotary.apply_rotary_emb(x * 1, cos, sin, interleaved, inplace=True, seqlen_offsets=offsets)

        assert torch.autograd.gradcheck(in_place, x)

    def test_packed_heads(self):
        (cos, sin), (cos_k, sin_k) = self.tables(), self.tables()
        qkv = torch.randn(2, 6, 3, 4, 8)
        q, k, v = (t.clone() for t in qkv.unbind(2))
        q, k = rotary.apply_rotary_emb(q, cos, sin), rotary.apply_rotary_emb(k, cos_k, sin_k)
        kv = qkv[:, :, 1:].clone()
        assert rotary.apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k) is qkv
        assert torch.equal(qkv, torch.stack([q, k, v], 2))
        assert rotary.apply_rotary_emb_kv_(kv, cos_k, sin_k) is kv
        assert torch.equal(kv, torch.stack([k, v], 2))
        heads = torch.randn(2, 6, 4 + 2 + 2, 8)
        q, k, v = heads[:, :, :4].clone(), heads[:, :, 4:6].clone(), heads[:, :, 6:].clone()
        rotary.apply_rotary_emb_qkv_(heads, cos, sin, num_heads_q=4, seqlen_offsets=3)
        turned_too = [rotary.apply_rotary_emb(t, cos, sin, seqlen_offsets=3) for t in (q, k)]
        assert torch.equal(heads, torch.cat([*turned_too, v], 2))

    @pytest.mark.parametrize("scale_base", [None, 64.0])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_module(self, scale_base, interleaved):
        module = rotary.RotaryEmbedding(8, base=100.0, interleaved=interleaved, scale_base=scale_base)
        qkv = torch.randn(2, 6, 3, 4, 12)
        q, k, v = (t.clone() for t in qkv.unbind(2))
        angle = torch.arange(9).outer(100.0 ** -(torch.arange(0, 8, 2) / 8))
        power = ((torch.arange(9) - 4) / (scale_base or 1.0))[:, None]
        scale = ((torch.arange(0, 8, 2) + 3.2) / 11.2) ** power if scale_base else torch.ones(9, 4)
        wanted_q = rotary.apply_rotary_emb(q, angle.cos() * scale, angle.sin() * scale, interleaved, seqlen_offsets=3)
        wanted_k = rotary.apply_rotary_emb(k, angle.cos() / scale, angle.sin() / scale, interleaved, seqlen_offsets=3)
        found = module(qkv, seqlen_offset=3)
        assert found is qkv
        torch.testing.assert_close(qkv, torch.stack([wanted_q, wanted_k, v], 2))
        kv = torch.stack([k, v], 2)
        found_q, found_kv = module(q, kv, seqlen_offset=torch.tensor([3, 3]), max_seqlen=9)
        torch.testing.assert_close(found_q, wanted_q)
        torch.testing.assert_close(found_kv, torch.stack([wanted_k, v], 2))
        assert not list(module.state_dict())

    def test_errors(self):
        (cos, sin), x = self.tables(), torch.randn(2, 7, 2, 8)
        for changed, says in (
            ({"seqlen_offsets": 24}, "cos takes 31"),
            ({"seqlen_offsets": -1}, "cos takes"),
            ({"seqlen_offsets": torch.tensor([0, 24])}, "cos takes the positions that come up, 0 to 30"),
            ({"cos": cos[:, :2]}, "sin takes"),
            ({"x": x[..., :6]}, "cos takes"),
            ({"cos": cos.long(), "sin": sin.long()}, "cos takes floats"),
        ):
            with pytest.raises((ValueError, TypeError), match=f"^{says}"):
                rotary.apply_rotary_emb(**{"x": x, "cos": cos, "sin": sin} | changed)
        with pytest.raises(ValueError, match=r"^qkv takes"):
            rotary.apply_rotary_emb_qkv_(x, cos, sin)
        with pytest.raises(ValueError, match=r"^max_seqlen takes"):
            rotary.RotaryEmbedding(8)(torch.randn(2, 6, 3, 4, 8), seqlen_offset=torch.tensor([0, 1]))
