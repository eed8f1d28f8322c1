"""Tracing: right about what runs, and without a trace of its own."""

from __future__ import annotations

import pytest
import torch
from small_networks import BatchNorm2d, nnunet, snapshot
from torch import nn

from tucker_ops.convert.modules import convolutions
from tucker_ops.convert.trace import probe_and_trace, trace


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [nnunet, BatchNorm2d])
def test_leaves_the_model_as_it_was(build, training):
    model = build().train(training)
    before = snapshot(model)
    record, _ = probe_and_trace(model, list(convolutions(model).values()))
    assert record is not None
    assert snapshot(model) == before
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("build", [nnunet, BatchNorm2d])
def test_sees_what_a_real_pass_does(build):
    model = build()
    convs = convolutions(model)
    shape = (2, 1, 16, 24, 16) if build is nnunet else (2, 3, 21, 30)
    seen = []
    hooks = [
        conv.register_forward_hook(lambda m, x, y: seen.append((id(m), tuple(x[0].shape), tuple(y.shape))))
        for conv in convs.values()
    ]
    model(torch.randn(shape))
    for hook in hooks:
        hook.remove()
    record = trace(model, list(convs.values()), shape)
    flat = sorted(
        (call.order, key, call.input_shape, call.output_shape)
        for key, c in record.calls.items()
        for call in c
    )
    assert [entry[1:] for entry in flat] == seen
    assert record.last == seen[-1][0]


def test_counts_what_norms_write():
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4))
    assert trace(model, [model[0]], (1, 1, 5, 6, 7)).norm_elements == 2 * 4 * 5 * 6 * 7


def test_knows_inputs_outputs_and_idle_layers():
    model = nnunet(deep_supervision=True)
    heads = model.decoder.seg_layers
    record = trace(model, list(convolutions(model).values()), (1, 1, 16, 16, 16))
    assert all(record.calls[id(head)][0].returned for head in heads)
    readers = [key for key, calls in record.calls.items() if calls[0].reads_input]
    assert readers == [id(model.encoder.stages[0][0].convs[0].conv)]
    model.decoder.deep_supervision = False
    record = trace(model, list(convolutions(model).values()), (1, 1, 16, 16, 16))
    assert [id(head) in record.calls for head in heads] == [False, True]


def test_tied_weights_and_keyword_arguments():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(input=self.a(input=self.a(x)))

    model = Tied()
    before = snapshot(model)
    record = trace(model, [model.a, model.b], (1, 4, 9, 9))
    assert [len(record.calls[id(m)]) for m in (model.a, model.b)] == [2, 1]
    assert snapshot(model) == before


def test_puts_everything_back_when_the_model_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            x = self.conv(self.norm(x))
            return x if x.sum() > 0 else -x

    model = Fails().train()
    before = snapshot(model)
    record, why = probe_and_trace(model, [model.conv])
    assert record is None and why
    assert snapshot(model) == before
