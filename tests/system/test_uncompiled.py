"""Optimizers that leave torch's compiler out are torch's own in every bit, and DistributedDataParallel needs no compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vaescale.system import uncompiled


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_they_update_as_torch_s_own(kind: str) -> None:
    def trained(optimizers: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = getattr(optimizers, kind)([{"params": [weight]}], lr=0.1, weight_decay=0.2, fused=True)
        for step in range(4):
            (weight.square() * torch.arange(50.0)).sum().backward()
            optimizer.grad_scale = torch.full((), 2.0)
            optimizer.found_inf = torch.full((), float(step == 2))
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach(), optimizer.state[weight]

    (weight, state), (known, known_state) = trained(uncompiled), trained(torch.optim)
    assert torch.equal(weight, known)
    assert state.keys() == known_state.keys()
    assert all(torch.equal(state[name], known_state[name]) for name in state)
    assert not weight.equal(torch.linspace(-1, 1, 50))


def test_their_hooks_run() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = uncompiled.Adam([weight], lr=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    weight.sum().backward()
    optimizer.step()
    assert called == ["before", "after"]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("of_gradient", [torch.channels_last, torch.contiguous_format])
def test_a_gradient_in_another_order_than_its_weight_moves_the_same_numbers(
    layout: torch.memory_format, of_gradient: torch.memory_format
) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 6, 3, 3), torch.randn(3, 8, 6, 3, 3)

    def trained(kind: type[torch.optim.Optimizer], fused: bool, *orders: torch.memory_format) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone().contiguous(memory_format=orders[0]))
        optimizer = kind([weight], lr=0.1, fused=fused)  # type: ignore[call-arg]
        ordered = [gradient.contiguous(memory_format=orders[1]) for gradient in gradients]
        with torch.profiler.profile() as profile:
            for gradient in ordered:
                weight.grad = gradient
                optimizer.step()
        copies = sum("clone" in event.name for event in profile.events() or [])
        assert not fused or copies == (len(gradients) if layout != of_gradient else 0)
        assert weight.stride() == start.contiguous(memory_format=orders[0]).stride()
        return weight.detach()

    expected = trained(torch.optim.AdamW, False, torch.contiguous_format, torch.contiguous_format)
    torch.testing.assert_close(trained(uncompiled.AdamW, True, layout, of_gradient), expected)


def test_a_weight_whose_memory_is_replaced_is_updated_where_it_lies() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = uncompiled.Adam([weight], lr=0.1, fused=True)
    for value in (1.0, 5.0):
        weight.data = torch.full_like(weight, value)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, value - 0.1))


PARALLEL = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from vaescale.system.uncompiled import parallel_uncompiled
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
with parallel_uncompiled():
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
for _ in range(2):
    model(torch.ones(2, 3)).sum().backward()
assert model.module.weight.grad.tolist() == [[4, 4, 4]]
assert "torch._dynamo" not in sys.modules
assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer", "torch has another default"
assert "torch._dynamo" in sys.modules and torch._dynamo is sys.modules["torch._dynamo"]
with parallel_uncompiled():
    assert torch._dynamo is sys.modules["torch._dynamo"]
distributed.destroy_process_group()
"""


def test_ranks_train_without_the_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARALLEL, str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
