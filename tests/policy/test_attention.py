"""Flash attention behind PyTorch's: which kernel the process runs follows who runs, and what packages give repeats.

The packages are stand-ins; nothing here needs a GPU, but for the last test. tests/policy/test_transformer.py has what
choosing does with broken packages, tests/gpu/ the backends that PyTorch brings along.
"""

import importlib.util
import sys

import pytest
import torch
from torch.nn.attention import register_flash_attention_impl

from advgrpo.errors import UserError
from advgrpo.policy.fused import attention
from advgrpo.policy.fused.attention import choose_attention


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_try", lambda *_: None)
    return torch.device("cuda"), torch.bfloat16


@pytest.fixture
def exchanges(tmp_path, monkeypatch):
    """FlashAttention-4's folder, which has nothing above `cute`, and what PyTorch's switch is told, in order."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    told = []

    class Handle:
        def remove(self):
            told.append("restored")

    def activate():
        told.append("activated")
        return Handle()

    known = torch.nn.attention._registry._FLASH_ATTENTION_IMPLS
    monkeypatch.setitem(known, "FA4", known["FA4"])
    register_flash_attention_impl("FA4", register_fn=activate)
    yield told
    attention._TorchFlash()._activate()  # PyTorch's own again
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_who_runs_decides_which_flash_attention_pytorch_runs(exchanges, hopper):
    name, newest = choose_attention("flash4", *hopper)
    _, own = choose_attention("flash", *hopper)
    assert name == "flash4"
    assert exchanges == ["activated", "restored"]  # by being made, in this order
    exchanges.clear()
    q, k, v = torch.randn(3, 2, 3, 5, 16)
    for attend in (newest, newest, own, own, newest):
        found = attend(q, k, v)
    assert exchanges == ["activated", "restored", "activated"]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected)


def test_what_somebody_else_has_activated_stays_where_nothing_is_wished(exchanges, hopper):
    torch.nn.attention.activate_flash_attention_impl("FA4")
    _, own = choose_attention("flash", *hopper)
    own(*torch.randn(3, 1, 1, 4, 8))
    assert exchanges == ["activated"]
    torch.nn.attention.restore_flash_attention_impl()


def test_auto_passes_over_flash_attention_4_and_says_once_what_its_folder_lacks(exchanges, hopper, caplog):
    attention._say_once.cache_clear()
    assert choose_attention("auto", *hopper)[0] == "cudnn"
    assert exchanges == []
    assert "passes over flash2" in caplog.text


@pytest.mark.parametrize(
    ("installed", "message"), [(True, "FA4's package is there but cannot be used"), (False, "is not installed")]
)
def test_a_flash_attention_4_that_cannot_run_is_refused_by_name(installed, message, exchanges, hopper, monkeypatch):
    def activate():
        raise ImportError("undefined symbol")

    register_flash_attention_impl("FA4", register_fn=activate)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"model\.attention = 'flash4': .*{message}"):
        choose_attention("flash4", *hopper)


def test_a_pytorch_that_does_not_know_it_says_so(exchanges, hopper, monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "list_flash_attention_impls")
    with pytest.raises(UserError, match="has no flash attention by the name of FA4"):
        choose_attention("flash4", *hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash3", "flash2", "flash4"])
@pytest.mark.parametrize("tokens", [1024, 1229])
def test_a_package_gives_the_same_bits_with_and_without_a_gradient(name, tokens):
    if attention._unsupported(name, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{name} is not installed")
    _, attend = choose_attention(name, torch.device("cuda"), torch.bfloat16)
    q, k, v = torch.randn(3, 16, 24, tokens, 64, device="cuda").bfloat16()
    with torch.no_grad():
        sampled = attend(q, k, v)
    trained = attend(*(t.detach().requires_grad_() for t in (q, k, v)))
    assert torch.equal(sampled, trained.detach())
