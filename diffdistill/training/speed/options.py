"""Memory against time: recomputed activations, compiled players, layouts, a half-precision teacher. Off by default.

docs/memory.md has what each saves and costs; `diffdistill doctor CONFIG` says what a config needs.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.grid import Grid
from diffdistill.networks.lora import lora_of
from diffdistill.networks.quantised import is_quantised, quantise
from diffdistill.networks.recompute import parts_of, recomputable_blocks, set_recompute
from diffdistill.settings.schema import UserError, schema
from diffdistill.training.speed.offload import offload

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]

RECOMPILES = 64  # graphs kept for one function: each player has one for each want, mode and set of live gradients


@schema
class SpeedConfig:
    """Trade-offs of time and memory, all off by default. All but teacher_dtype may change when a run is resumed.

    activation_checkpointing: gradient checkpointing: each block is recomputed in the backward pass; the gradients
    are the same, bit for bit.  compile: torch.compile of the players, by its backend.  compile_mode: what inductor is
    asked for; reduce-overhead and max-autotune record CUDA graphs, which are of one shape each.  channels_last: the
    layout of convolutions; on many GPUs faster in bf16.  ema_device: cpu keeps the averages off the GPU and costs a
    copy of the weights at each update.  teacher_device: cpu keeps the teacher's weights off the GPU, to which each
    layer comes when it is called.  teacher_dtype: bf16 stores the teacher's convolutions and linear layers in it and
    computes them as autocast would; its D, and so the score difference, stays in float32. nf4, int8 and fp8 store its
    large linear layers so, and the rest as bf16 does; LoRA's factors stand over them.  shard: the processes share out
    weights, gradients, moments and averages, those of one machine or all, each block gathered for its own length.
    """

    activation_checkpointing: bool = False
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    compile_mode: CompileMode = "default"
    channels_last: bool = False
    ema_device: Literal["same", "cpu"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"
    teacher_dtype: Literal["fp32", "bf16", "nf4", "int8", "fp8"] = "fp32"
    shard: Literal["none", "machine", "all"] = "none"

    @property
    def is_quantised(self) -> bool:
        """Whether the teacher's weights are in fewer than 16 bits."""
        return self.teacher_dtype not in ("fp32", "bf16")

    @property
    def records_graphs(self) -> bool:
        """Whether a GPU replays the players' calls as CUDA graphs."""
        return self.compile_mode != "default"


def apply_speed(
    speed: SpeedConfig,
    trained: Mapping[str, nn.Module],
    teachers: Mapping[str, Denoiser],
    followers: Mapping[str, nn.Module] | None = None,
    device: torch.device | None = None,
) -> None:
    """Change the players in place, before their optimisers are made.

    followers: players that are not trained; they change only where they stand over the teacher's weights.
    teachers: by their names among the players.  device: where one computes whose weights are elsewhere; default: where
    it is.
    Raises UserError where a setting would do nothing: no teacher, no blocks, no convolutions.
    """
    players = {**teachers, **trained}
    denoisers = {name: module for name, module in players.items() if isinstance(module, Denoiser)}
    _check(speed, denoisers, has_teacher=bool(teachers))
    if speed.teacher_dtype != "fp32":
        over = [player for player in (*trained.values(), *(followers or {}).values()) if isinstance(player, Denoiser)]
        over = [player for player in over if lora_of(player)]
        if speed.is_quantised:
            _quantise(speed, teachers, over, device)
        for teacher in teachers.values():
            store_in_bf16(teacher)
        for player in over:
            player.run_with(autocast=torch.bfloat16)
    if speed.channels_last:
        for module in players.values():
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for teacher in teachers.values() if speed.teacher_device == "cpu" else ():
        offload(teacher, device or device_of(teacher))
    if speed.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
        for denoiser in denoisers.values():
            place = device or device_of(denoiser)
            denoiser.path.alpha(torch.full((1,), denoiser.path.t_max, device=place))  # makes its table, in no graph
            for part in _compiled_parts(denoiser):
                part.compile(backend=speed.compile, mode=speed.compile_mode)


def mark_step(speed: SpeedConfig) -> None:
    """Before a step: CUDA graphs may write over what the players returned in an earlier one, and in no other case.

    Without it a second call of the teacher in a step would write over the first one's result.
    """
    if speed.records_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def _quantise(
    speed: SpeedConfig, teachers: Mapping[str, Denoiser], over: Sequence[Denoiser], device: torch.device | None
) -> None:
    """The teachers, and what stands over the first one's weights, on the device."""
    trees = [found.shared_tree for found in map(lora_of, over) if found]
    for teacher in teachers.values():
        place = device or device_of(teacher)
        quantise(teacher.net, trees, speed.teacher_dtype, dtype=torch.bfloat16, device=place)  # type: ignore[arg-type]


def _check(speed: SpeedConfig, players: Mapping[str, Denoiser], *, has_teacher: bool) -> None:
    """Raise UserError for what cannot be; blocks that can be recomputed are told to be."""
    if speed.teacher_dtype != "fp32" and not has_teacher:
        raise UserError(f"speed.teacher_dtype = {speed.teacher_dtype!r}: this method has no teacher; use fp32")
    if speed.is_quantised and (speed.teacher_device == "cpu" or speed.channels_last):
        why = "speed.teacher_device and speed.channels_last"
        raise UserError(f"speed.teacher_dtype = {speed.teacher_dtype!r}: does not work with {why}; leave them out")
    if speed.records_graphs and speed.compile != "inductor":
        raise UserError(
            f"speed.compile_mode = {speed.compile_mode!r}: inductor's alone, and speed.compile is "
            f"{speed.compile or 'null'}; use speed.compile = inductor, or default"
        )
    for name, denoiser in players.items():
        network = type(denoiser.net).__name__
        if speed.records_graphs and any(getattr(part, "cuts_text", False) for part in parts_of(denoiser.net)):
            raise UserError(
                f"speed.compile_mode = {speed.compile_mode!r}: {name}'s network {network} cuts its prompts to the "
                "longest of a batch, and CUDA graphs are of one shape; use default"
            )
        if speed.activation_checkpointing and not set_recompute(denoiser.net):
            raise UserError(
                f"speed.activation_checkpointing: {name}'s network {network} has no blocks to recompute; use false"
            )
        if speed.channels_last and not _has_convolutions(denoiser):
            raise UserError(f"speed.channels_last: {name}'s network {network} has no convolutions; use false")
        if speed.teacher_device == "cpu" and lora_of(denoiser):
            raise UserError(f"speed.teacher_device = 'cpu': {name} is LoRA over the teacher's weights; use same")
    if speed.teacher_device == "cpu" and (speed.compile or not has_teacher):
        why = "does not go with speed.compile" if speed.compile else "this method has no teacher"
        raise UserError(f"speed.teacher_device = 'cpu': {why}; use same")


def store_in_bf16(denoiser: Denoiser) -> None:
    """The weights that autocast would round at every call, rounded once: the same D, in float32, from half the bytes.

    Norms and the arithmetic around the network stay as they are. So do the sines and cosines of time, but the layers
    that take them are rounded as any others, and some of diffusers' networks round the time itself (docs/teachers.md).
    """
    for module in denoiser.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not is_quantised(module):
            module.to(torch.bfloat16)
    denoiser.run_with(autocast=torch.bfloat16)


def _has_convolutions(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in parts_of(module))


def _compiled_parts(denoiser: Denoiser) -> list[nn.Module]:
    """The denoiser as a whole, but where a hook comes and goes, which compiled code does not see: of diffusers'
    networks all blocks but the middle one, whose output it taps; of a grid all blocks, behind which it widens the
    last layer."""
    parts = list(parts_of(denoiser))
    net = next((part for part in parts if isinstance(part, DiffusersNetwork)), None)
    if net is not None:
        return [block for block in net.blocks if block is not net.middle]
    if any(isinstance(part, Grid) for part in parts):
        blocks = recomputable_blocks(denoiser)
        if not blocks:
            raise UserError("speed.compile: the network under pi_flow's wide last layer has no blocks; leave it out")
        return [*blocks]
    return [denoiser]
