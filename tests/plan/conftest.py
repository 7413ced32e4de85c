"""What the plan's tests have in common."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from advgrpo import config as configuration


@pytest.fixture(autouse=True)
def no_poison(monkeypatch):
    monkeypatch.undo()  # conftest's NaN poisoning would allocate full-size weights


@pytest.fixture
def paper():
    return configuration.load("sd35m-dino-paper")


@pytest.fixture(scope="module")
def first_of_eight():
    """A job of eight processes, of which this one is the first and the others are made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    device, collective = torch.device("cpu"), contextlib.nullcontext
    yield SimpleNamespace(device=device, patient_group=dist.new_group, collective=collective)
    dist.destroy_process_group()


@pytest.fixture
def large_images():
    """Qwen-Image's of 1024 pixels."""
    config = configuration.load("qwen-image-dino")
    config.model.resolution, config.rollout.micro_batch, config.model.offload = 1024, 1, "text_vae"
    return config
