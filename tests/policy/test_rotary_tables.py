"""Turns of q and k are made on the device, once for a size: no forward copies a table from the host.

Planted bugs that turned this file red: a run of positions made on the host; the tables made anew for every forward.
"""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from tests import flux_models, qwen_models
from tests.device_twin import DEVICE, DeviceTwin, TwinTensor


def fused(network: torch.nn.Module, device: str | torch.device) -> FusedTransformer:
    tensors = {name: t.detach().to(device) for name, t in [*network.named_parameters(), *network.named_buffers()]}
    return FusedTransformer(TransformerConfig.from_stock(network.config), tensors, attention="math")


@pytest.mark.parametrize("family", [flux_models, qwen_models], ids=["flux", "qwen"])
def test_turns_are_made_on_the_device_and_once(family):
    network = family.transformer(layers=1)
    on_host, on_device = fused(network, "cpu"), fused(network, DEVICE)
    with DeviceTwin() as twin:
        made = on_device._rotary((6, 10), 7)
        assert on_device._rotary((6, 10), 7) is made
        other = on_device._rotary((6, 10), 8)
    assert not twin.waits, [str(wait) for wait in twin.waits]
    for text, tables in ((7, made), (8, other)):
        for table, expected in zip(tables, on_host._rotary((6, 10), text), strict=True):
            assert isinstance(table, TwinTensor)
            with _disable_current_modes():
                assert torch.equal(table.held, expected)
