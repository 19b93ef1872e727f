"""Which weights count as quantized."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sigmix.models import weights


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_weight_that_is_spread_over_processes_is_not_quantised(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = nn.Linear(4, 6, bias=False)
    whole = layer.weight.detach().clone()
    layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    assert not weights.is_quantized(layer.weight)
    assert weights.kind(layer) == weights.PLAIN
    assert torch.equal(weights.value(layer).full_tensor(), whole)


def test_tensors_of_tensors_are_quantised_only_if_they_say_how_to_undo_it():
    class Halves(TwoTensor):
        def dequantize(self):
            return self.a + self.b

    whole = torch.randn(6, 4)
    assert not weights.is_quantized(TwoTensor(whole, whole))
    assert weights.is_quantized(Halves(whole / 2, whole / 2))
    assert weights.is_quantized(torch.ones(2, 2, dtype=torch.int8))
