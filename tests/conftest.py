"""What all tests share: import path, one thread, `slow`, shapes drawn once, a tiny network."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ebm_at  # noqa: E402

torch.set_num_threads(1)
ebm_at.make_shapes = functools.cache(ebm_at.make_shapes)  # 7,500 images take over a second


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only where EBM_AT_SLOW=1 is set")


def pytest_collection_modifyitems(items):
    if os.environ.get("EBM_AT_SLOW") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set EBM_AT_SLOW=1"))


def make_tiny_net(seed=0, channels=3, classes=5, dtype=torch.float32):
    """Two convolutions with BatchNorm, in train mode. Every parameter and buffer is random: fresh
    BatchNorm layers (mean 0, variance 1) would hide mistakes about which statistics are used."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.ndim > 1 else 0.2))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight += 1
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.3)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
                m.num_batches_tracked.fill_(7)
    return net.to(dtype).train()


@pytest.fixture
def tiny_net():
    return make_tiny_net
