"""Buffers of a fused network: used again, given back, and less of them than eager needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fused.networks import plain_unet
from tucker_ops import fuse
from tucker_ops.backends import native

block_op = torch.ops.tucker_ops.tucker_block


@pytest.fixture(autouse=True)
def _kernels():
    if not native.load():
        pytest.skip(native.load().reason)


def large_block(x: torch.Tensor, contiguous: bool = False) -> torch.Tensor:
    core = torch.ones(32, 1, 1, 1, 1)
    ones = [1] * 3
    call = [[x], [None], [None], [None], [1.0], [None], None, core, ones, [0] * 3, ones, None, None, "none"]
    return block_op(*call, contiguous)[0]


@pytest.mark.parametrize("contiguous", [False, True])
def test_large_buffers_are_used_again(contiguous):
    x = torch.randn(1, 1, 64, 64, 128)
    size = 32 * 64 * 64 * 128 * 4
    first = large_block(x, contiguous)
    assert torch.equal(first, x.expand_as(first))
    before = native.pool_bytes()
    del first
    assert native.pool_bytes() >= before + size
    kept = [large_block(factor * x, contiguous) for factor in range(4)]
    assert native.pool_bytes() <= before
    assert len({tensor.data_ptr() for tensor in kept}) == 4
    for factor, tensor in enumerate(kept):
        assert torch.equal(tensor, factor * x.expand_as(tensor))


def lazily_free() -> int:
    """Bytes of this process that the system may take when it needs them."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        pytest.skip("the system does not tell what is free to take: no /proc/self/smaps_rollup")
    line = next(line for line in rollup.read_text().splitlines() if line.startswith("LazyFree"))
    return int(line.split()[1]) * 1024


def test_all_but_a_quarter_of_idle_memory_is_free_to_take(monkeypatch):
    x = torch.randn(1, 1, 64, 64, 128)
    size = 32 * 64 * 64 * 128 * 4
    monkeypatch.setenv(native.POOL_VARIABLE, "80")
    large_block(x)
    monkeypatch.setenv(native.POOL_VARIABLE, "512")
    kept = [large_block(x) for _ in range(5)]
    before = lazily_free()
    kept.clear()
    idle, free, warm = native.pool_bytes(), lazily_free() - before, 128 * 2**20
    # Whole buffers are handed over, and of one that lay there before pages may be gone already.
    assert idle - warm - size <= free <= idle - warm + size
    assert free >= 2 * size


def test_the_pool_has_a_limit_and_can_be_turned_off(monkeypatch):
    x = torch.randn(1, 1, 64, 64, 128)
    monkeypatch.setenv(native.POOL_VARIABLE, "80")
    kept = [large_block(x) for _ in range(3)]
    kept.clear()
    assert native.pool_bytes() <= 80 * 2**20
    monkeypatch.setenv(native.POOL_VARIABLE, "0")
    before = native.pool_bytes()
    large_block(x)
    assert native.pool_bytes() == before


def test_views_keep_a_buffer_alive():
    x = torch.randn(1, 1, 64, 64, 128)
    view = large_block(x)[:, :1]
    for factor in range(3):
        large_block(factor * x)
    assert torch.equal(view, x)


PEAK = """
import re, torch
from tests.fused.networks import plain_unet
from tucker_ops import CompressionConfig, compress, fuse

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

network = plain_unet(features=(16, 32, 32), classes=4)
if {compressed}:
    network = compress(network, CompressionConfig(factor=0.5))
if {fused}:
    network = fuse(network)
with torch.inference_mode():
    network(torch.zeros(1, 1, 16, 16, 16))
    x = torch.randn(1, 1, 112, 112, 112)
    # Weights are packed for the kernels that this size takes.
    network(x)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = status("VmRSS")
    network(x)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("compressed", "most"), [(False, 0.7), (True, 0.4)], ids=["dense", "compressed"])
def test_peak_memory(repo_root, compressed, most):
    pytest.importorskip("dynamic_network_architectures")

    def peak(fused: bool) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK.format(fused=fused, compressed=compressed)],
            capture_output=True,
            text=True,
            cwd=repo_root,
            # Idle buffers of the first call would hide what the second needs.
            env=os.environ | {native.POOL_VARIABLE: "0"},
        )
        if "clear_refs" in done.stderr:
            pytest.skip(f"this system does not let a process reset its peak memory: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    fused, eager = peak(True), peak(False)
    print(f"peak above weights and input, fused {fused / 1e6:.0f} MB, eager {eager / 1e6:.0f} MB")
    assert fused < most * eager


def test_products_of_weights_follow_changes_of_any_kind():
    network = plain_unet()
    fused, x = fuse(network), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        fused(x)
        for change in (
            lambda w: w.mul_(2),
            lambda w: w.data.mul_(2),
            lambda w: w.numpy().__imul__(2),
        ):
            change(network.decoder.transpconvs[0].weight.detach())
            assert torch.allclose(fused(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_layout_of_the_output_is_that_of_the_modules(layout):
    layers = [nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3), nn.LeakyReLU()]
    x = torch.randn(2, 2, 6, 7, 8).to(memory_format=layout)
    for count in (1, 3):
        network = nn.Sequential(*layers[:count]).eval()
        with torch.no_grad():
            assert fuse(network)(x).is_contiguous(memory_format=layout)


class _Wide(nn.Module):
    """A concatenation of more tensors than a block reads, and an addition that broadcasts."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Conv3d(1, 3, 3, padding=1) for _ in range(6))
        self.last, self.narrow = nn.Conv3d(18, 3, 3), nn.Conv3d(1, 3, (6, 7, 8))

    def forward(self, x):
        return self.last(torch.cat([conv(x) for conv in self.first], 1)) + self.narrow(x)


def test_many_sources_and_a_broadcast():
    network, x = _Wide().eval(), torch.randn(2, 1, 6, 7, 8)
    with torch.no_grad():
        assert torch.allclose(fuse(network)(x), network(x), atol=1e-5)


def test_upsampling_without_a_skip():
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3),
        nn.InstanceNorm3d(4),
        nn.ConvTranspose3d(4, 6, (2, 1, 2), (2, 1, 2)),
        nn.Conv3d(6, 3, 3),
    ).eval()
    x = torch.randn(2, 1, 6, 7, 8)
    with torch.no_grad():
        assert torch.allclose(fuse(network)(x), network(x), atol=1e-5)


def test_a_network_that_is_not_a_unet():
    network = nn.Sequential(nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3), nn.LeakyReLU(), nn.AdaptiveAvgPool3d(1))
    x = torch.randn(2, 2, 6, 7, 8)
    with torch.no_grad():
        assert torch.allclose(fuse(network.eval())(x), network(x), atol=1e-6)
