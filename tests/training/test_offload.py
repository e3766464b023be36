"""The teacher in the machine's memory: its layers come to the device for their call, and only they."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.stand_ins import STAND_INS, save_stand_in
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, device_of, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.method import Problem
from diffdistill.methods.pretrain import Pretrain
from diffdistill.models.teachers import open_pipeline
from diffdistill.networks import DiTConfig, UNetConfig
from diffdistill.networks.recompute import set_recompute
from diffdistill.settings.schema import UserError
from diffdistill.training.assembly import prepare_once
from diffdistill.training.memory.prediction import plan_memory
from diffdistill.training.speed.offload import offload
from diffdistill.training.trainer import Trainer

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NETWORKS = {"unet": UNetConfig(channels=(8, 16)), "dit": DiTConfig(width=16, depth=2, heads=2)}


@pytest.fixture
def gpu() -> Iterator[None]:
    """Tensors without numbers, of which some are said to be on a GPU: to mix them is an error."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        yield


def make_teacher(network: str, device: torch.device = CPU) -> Denoiser:
    """Its weights on the CPU, its buffers on a device."""
    return on_the_gpu_but_for_its_weights(Denoiser(NETWORKS[network].build((1, 8, 8), 3, 0.1), EDM(), "edm"), device)


def on_the_gpu_but_for_its_weights(teacher: Denoiser, device: torch.device = GPU) -> Denoiser:
    """Frozen, its buffers on the device."""
    freeze(teacher)
    for part in teacher.modules():
        part._buffers.update({name: b if b is None else b.to(device) for name, b in part._buffers.items()})
    return teacher


def call(denoiser: Denoiser, x: Tensor, **options: object) -> Tensor:
    t, label = torch.full((2,), 0.5, device=x.device), torch.zeros(2, dtype=torch.int64, device=x.device)
    asked = denoiser.features if "taps" in options else denoiser
    return asked(x, t, Cond(label=label), **options)  # type: ignore[operator]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"taps": None}], ids=str)
def test_an_offloaded_network_computes_on_the_gpu_and_lies_on_the_cpu(
    gpu: None, network: str, options: dict[str, object]
) -> None:
    teacher = make_teacher(network, GPU)
    offload(teacher, GPU)
    made = call(teacher, torch.zeros(2, 1, 8, 8, device=GPU), **options)
    assert made.device == GPU
    assert {parameter.device for parameter in teacher.parameters()} == {CPU}
    assert device_of(teacher) == GPU


READ_NUMBERS = ("z_image", "qwen_image", "lumina2", "cogview4")
"""Their networks ask a mask how long its texts are, and tensors without numbers cannot say."""


@pytest.mark.parametrize("family", [family for family in STAND_INS if family not in READ_NUMBERS])
def test_every_family_of_pipelines_can_lie_on_the_cpu(family: str, tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in(family, tmp_path))
    cond = Cond(label=torch.zeros(2, dtype=torch.int64)) if opened.spec.num_classes else NO_COND
    if opened.family.takes_text:
        cond = opened.conditions(["a red fox", "two blue birds"]).rows(torch.arange(2))
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        teacher = on_the_gpu_but_for_its_weights(opened.spec.build())
        cond = cond.map(lambda part: torch.zeros(part.shape, dtype=part.dtype, device=GPU))
        offload(teacher, GPU)
        x, t = torch.zeros(2, *opened.spec.image_shape, device=GPU), torch.full((2,), 0.5, device=GPU)
        assert teacher(x, t, cond).device == GPU
        assert teacher.features(x, t, cond).device == GPU
        assert {parameter.device for parameter in teacher.parameters()} == {CPU}


def test_without_offload_weights_on_the_cpu_are_an_error(gpu: None) -> None:
    with pytest.raises(Exception, match="device"):
        call(make_teacher("unet"), torch.zeros(2, 1, 8, 8, device=GPU))


def test_at_any_time_one_layer_s_weights_are_on_the_gpu(gpu: None) -> None:
    teacher = make_teacher("unet", GPU)
    offload(teacher, GPU)
    seen: list[int] = []

    def count(*_: object) -> None:
        seen.append(sum(any(p.device == GPU for p in part._parameters.values() if p is not None) for part in parts))

    parts = [part for part in teacher.modules() if part._parameters]
    for part in parts:
        part.register_forward_hook(count, prepend=True)
    with torch.no_grad():
        call(teacher, torch.zeros(2, 1, 8, 8, device=GPU))
    assert len(seen) >= len(parts)
    assert set(seen) == {1}


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gradient_through_an_offloaded_network_is_the_same(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = make_teacher("unet")
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    call(teacher, x).square().sum().backward()
    expected, x.grad = x.grad, None
    offload(teacher, CPU)
    # As if every weight were elsewhere: the layer has another parameter for its call.
    monkeypatch.setattr("diffdistill.training.speed.offload._is_elsewhere", lambda *_: True)
    if recomputed:
        set_recompute(teacher)
    call(teacher, x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_a_run_with_an_offloaded_teacher_ends_as_one_without(make_config: MakeConfig) -> None:
    ends = []
    for device in ("same", "cpu"):
        trainer = Trainer(make_config("disback", "train.steps=2", f"speed.teacher_device={device}"), quiet=True)
        trainer.run()
        ends.append(trainer.trained["generator"].state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_memory_plan_leaves_an_offloaded_teacher_out(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("sid", "speed.teacher_device=cpu"), quiet=True)
    assert plan_memory(trainer.plan, trainer.assembly.iteration).players["teacher"].weights == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sid", "lora.fake={rank: 2}"), "fake is LoRA over the teacher's weights"),
        (("sid", "speed.compile=eager"), "does not go with speed.compile"),
        (("pretrain",), "this method has no teacher"),
    ],
)
def test_what_does_not_go_with_an_offloaded_teacher_is_refused(
    make_config: MakeConfig, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(make_config(*settings, "speed.teacher_device=cpu"), quiet=True)


def test_buffers_come_to_where_the_weights_are_brought() -> None:
    """Of a module that was built elsewhere, as a teacher of a sharded run is."""
    module = nn.BatchNorm2d(2).eval()
    offload(module, torch.device("meta"))
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert device_of(module) == torch.device("meta")


def test_a_method_prepares_with_all_networks_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places: dict[Denoiser, torch.device] = {}

    class Looks(Pretrain):
        def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
            assert places == {teacher: GPU, generator: GPU}
            return {}

    monkeypatch.setattr(Denoiser, "to", lambda net, device: places.update({net: torch.device(device)}))
    teacher, generator = make_teacher("unet"), make_teacher("unet")
    problem = Problem((1, 8, 8), 3, EDM(), teacher=teacher, initial={"generator": generator})
    prepare_once(tmp_path / "prepared", Looks(), problem, 0, is_kept=False, device=GPU)
    assert places == {teacher: GPU, generator: CPU}
