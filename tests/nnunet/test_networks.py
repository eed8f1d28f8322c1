"""The network classes that plans.json names, built by nnU-Net."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from tiny import make_model

from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import ConfigError
from tucker_ops.nn import TuckerConv2d, TuckerConv3d
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.compress import compress_folder, load_network
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.networks import build_network

HALF = CompressionConfig(factor=0.5, min_rank=4, align=4)
# At so few parameters some layers get a rank of their kernel's taps.
TAPS = CompressionConfig(params=0.15, min_rank=4, align=4)
TUCKER = (TuckerConv2d, TuckerConv3d)


@pytest.fixture(params=itertools.product(["PlainConvUNet", "ResidualEncoderUNet"], [HALF, TAPS]))
def models(request, tmp_path):
    network, config = request.param
    source = make_model(tmp_path / "src", network=network)
    manifest = compress_folder(source, tmp_path / "dst", config)
    assert any(len(ranks) == 3 for ranks in manifest.plan.ranks.values()) == (config is TAPS)
    return read_model_folder(source), read_model_folder(tmp_path / "dst")


def build(folder, **options):
    return build_network(folder.architecture, folder.input_channels, folder.num_outputs, **options)


def test_state_dict_has_the_dense_names_and_shares_aliases(models):
    dense, tucker = (build(folder) for folder in models)
    factorised = {n for n, m in tucker.named_modules(remove_duplicate=False) if isinstance(m, TUCKER)}
    assert factorised

    def owners(network):
        return {key.rsplit(".", 1)[0] for key in network.state_dict(keep_vars=True)}

    assert owners(tucker) == owners(dense)
    groups = {}
    for name, module in dense.named_modules(remove_duplicate=False):
        groups.setdefault(id(module), []).append(name)
    for names in groups.values():
        assert len({id(tucker.get_submodule(name)) for name in names}) == 1
    stored = read_checkpoint(models[1].checkpoint_path(0))["network_weights"]
    assert set(stored) == set(tucker.state_dict())
    assert len({t.data_ptr() for t in stored.values()}) == len(list(tucker.parameters()))


def test_every_factorised_layer_runs_once(models):
    network = load_network(models[1], 0)
    calls = []
    layers = [m for m in network.modules() if isinstance(m, TUCKER)]
    for module in layers:
        module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    with torch.inference_mode():
        network(torch.randn(1, 1, 16, 16, 16))
    assert sorted(calls) == sorted(map(id, layers))


def test_works_for_another_patch_size(models):
    network = load_network(models[1], 0)
    x = torch.randn(1, 1, 24, 16, 32)
    with torch.inference_mode():
        got = network(x)
        for module in [m for m in network.modules() if isinstance(m, TUCKER)]:
            module.register_forward_hook(lambda module, inputs, _: module.to_dense()(*inputs))
        expected = network(x)
    assert got.shape == (1, 3, 24, 16, 32)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_deep_supervision(models):
    network = build(models[1], deep_supervision=True)
    x = torch.randn(1, 1, 16, 16, 16)
    assert len(network(x)) == 2
    network.decoder.deep_supervision = False
    assert network(x).shape == (1, 3, 16, 16, 16)


def test_trainable(models):
    network = build(models[1], deep_supervision=True)
    sum(y.square().mean() for y in network(torch.randn(1, 1, 16, 16, 16))).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_dense_weights_do_not_load(models):
    dense = read_checkpoint(models[0].checkpoint_path(0))["network_weights"]
    with pytest.raises(RuntimeError, match=r"Missing key.*core"):
        build(models[1]).load_state_dict(dense)


def test_only_networks_with_a_rank_of_the_taps_need_this_version(models):
    described = models[1].architecture["arch_kwargs"]["tucker"]
    assert described["version"] == max(len(ranks) - 1 for ranks in described["ranks"].values())


def test_unknown_description(models):
    architecture = dict(models[1].architecture)
    architecture["arch_kwargs"] = {**architecture["arch_kwargs"], "tucker": {"version": 99, "ranks": {}}}
    with pytest.raises(ConfigError, match="version 99"):
        build_network(architecture, 1, 3)


# nnU-Net, not finding the class, imports every architecture it knows, and with it timm and torchvision.
# Stand-ins spare the test from a torchvision built for another torch, which fails in its own way.
WITHOUT_TUCKER_OPS = """
import importlib.abc, importlib.machinery, sys, types

class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        package = name.split(".")[0]
        if package == "tucker_ops":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if package in ("timm", "torchvision"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"))
try:
    predictor.initialize_from_trained_model_folder(sys.argv[1], (0,))
except ImportError as error:
    print("ImportError:", error)
"""


def test_import_error_without_tucker_ops(tmp_path, tiny_model):
    """The dense network must not be built in silence."""
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TUCKER_OPS, str(tmp_path / "dst")], capture_output=True, text=True
    )
    assert "ImportError: Network class could not be found" in done.stdout, done.stderr
