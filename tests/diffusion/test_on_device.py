"""What the host told a device it need not ask back."""

import gc
from unittest import mock

import pytest
import torch
from support.far_device import counted, far_device, near
from torch import Tensor

from diffdistill.diffusion import on_device
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, VPDiscrete
from diffdistill.diffusion.sampling import FewSteps, times_on
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.networks.mlp import MLP, MLPConfig

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_copied_or_remembered():
    tensor = torch.arange(3)
    assert on_device.upload(tensor, CPU) is tensor
    assert on_device.known_on_host(tensor) is on_device.on_host(tensor) is tensor


def test_the_host_knows_what_it_sent_its_slices_and_joints():
    with far_device() as device, counted() as crossings:
        there = on_device.upload(torch.arange(6), device)
        cond = Cond.cat(Cond(label=there)[1:3], Cond(label=on_device.filled(2, 9, device)))
        assert cond.label is not None
        assert cond.label.device == device
        assert on_device.on_host(cond.label).tolist() == [1, 2, 9, 9]
        assert crossings.num_waits == 0, crossings.table()
        assert near(cond.label).tolist() == [1, 2, 9, 9]


def test_the_host_forgets_what_was_changed_or_computed_there():
    with far_device() as device:
        changed, computed = on_device.upload(torch.arange(3), device), on_device.upload(torch.arange(3), device) + 1
        changed.add_(1)
        for tensor in (changed, computed):
            assert on_device.known_on_host(tensor) is None
            assert on_device.on_host(tensor).tolist() == [1, 2, 3]


def test_what_is_remembered_ends_with_its_tensor():
    with far_device() as device:
        before = len(on_device._HOST_COPIES)
        there = on_device.upload(torch.arange(3), device)
        assert len(on_device._HOST_COPIES) == before + 1
        del there
        gc.collect()
        assert len(on_device._HOST_COPIES) == before


def test_a_copy_to_a_gpu_goes_through_pinned_memory_and_is_not_waited_for():
    tensor, steps = torch.arange(3), list[str]()

    def pin(self: Tensor) -> Tensor:
        steps.append("pinned")
        return self.clone()

    def to(self: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        steps.append(f"to {device}, {non_blocking}")
        return self

    has_gpu = mock.patch.object(torch.cuda, "is_available", return_value=True)
    with has_gpu, mock.patch.object(Tensor, "pin_memory", pin), mock.patch.object(Tensor, "to", to):
        on_device.upload(tensor, torch.device("cuda"))
    assert steps == ["pinned", "to cuda, True"]


def test_constants_and_times_are_copied_to_a_device_once():
    path, steps = VPDiscrete(beta_end=0.0203), FewSteps(init_ratio=5, later_ratios=(1,))
    with far_device() as device, counted() as crossings:
        for _ in range(3):
            t = times_on(steps, path, device)
            on_device.constant((3, 5, 78123), device, torch.int64)
            path.sigma(t), path.alpha(t), path.time_of_ratio(path.ratio(t)), path.log_ratio_derivative(t)
        assert crossings.num_waits == 0, crossings.table()
        assert crossings.uploads.total() == 3  # times, constants, the path's table
        assert torch.equal(near(t), steps.times(path))
    assert times_on(steps, VPDiscrete(beta_end=0.0203), CPU) is times_on(steps, path, CPU)
    assert not torch.equal(times_on(steps, EDM(), CPU), times_on(steps, path, CPU))


@pytest.mark.parametrize("size", [1, 3])
def test_uniform_numbers_and_seeds_of_an_index_that_the_host_knows_are_not_waited_for(size):
    index = torch.arange(5, 11)
    with far_device() as device, counted() as crossings:
        rng = StepRandom(3, 4, on_device.upload(index, device)).grouped(size)
        uniform, seed, normal = rng.uniform("t"), rng.torch_seed("loss"), rng.normal("eps", (2, 3))
        assert crossings.num_waits == 0, crossings.table()
    there = StepRandom(3, 4, index).grouped(size)
    assert torch.equal(near(uniform), there.uniform("t"))
    assert torch.equal(near(normal), there.normal("eps", (2, 3)))
    assert seed == there.torch_seed("loss")


def test_what_is_kept_can_be_trained_with_after_inference_mode():
    path, x = VPDiscrete(beta_end=0.0201), torch.ones(2, 3, requires_grad=True)
    with torch.inference_mode():
        t = times_on(FewSteps(), path, CPU).expand(2)
        path.sigma(t)
    path.diffuse(x, torch.zeros(2, 3), times_on(FewSteps(), path, CPU).expand(2)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_compiled_call_of_a_denoiser_is_one_graph(guidance):
    torch._dynamo.reset()
    net = MLP(MLPConfig(width=8, blocks=1), (1, 2, 2), 3, has_null_condition=True)
    denoiser = Denoiser(net, path=VPDiscrete(), predicts="eps")
    x, t, cond = torch.ones(2, 1, 2, 2), torch.tensor([3.0, 500.0]), Cond(label=torch.tensor([0, 2]))
    expected = denoiser(x, t, cond, guidance=guidance)  # what is kept is there: in a run a step's draw asks for it
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t, cond, guidance=guidance), expected)
