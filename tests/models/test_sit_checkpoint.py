"""Checkpoints of SiT and REPA: the velocities of the published networks' equations, and a file that can do nothing."""

import math
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support.stand_ins import save_stand_in
from torch import Tensor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.cond import Cond
from diffdistill.export.self_contained import network_code
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import open_pipeline
from diffdistill.models.teachers.pickle_reader import Refused
from diffdistill.models.teachers.sit_checkpoint import SiTOptions, import_sit, read_sit
from diffdistill.networks.dit import DiTConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.config import find_config, load_config
from diffdistill.training.trainer import Trainer

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 16, 2, 2, 2, 4, 8, 5
OPTIONS = SiTOptions(heads=HEADS)


def published(
    *, outputs: int = CHANNELS, with_projectors: bool = True, seed: int = 0, side: int = SIDE
) -> dict[str, Tensor]:
    """Random weights by the published names; positions as both repositories compute them, with NumPy."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH**2 * outputs, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        inner = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "adaLN_modulation.1": 6}
        shapes |= {f"blocks.{i}.{name}": (times * WIDTH, WIDTH) for name, times in inner.items()}
        shapes[f"blocks.{i}.mlp.fc2"] = (WIDTH, 4 * WIDTH)
    shapes |= {"projectors.0.0": (8, WIDTH), "projectors.0.2": (8, 8)} if with_projectors else {}
    rng = torch.Generator().manual_seed(seed)
    weights = {f"{name}.weight": torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0], generator=rng) * 0.2 for name, shape in shapes.items()}
    weights["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, generator=rng)
    rows = side // PATCH
    omega = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH / 4))
    row, column = (place.reshape(-1, 1) * omega for place in np.indices((rows, rows)))
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1)
    return weights | {"pos_embed": torch.from_numpy(table).float()[None]}


def velocity(w: Mapping[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The published networks' output for x [B, C, H, W] at their own t [B] in [0, 1], from their equations."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def adapted(name: str, parts: int) -> list[Tensor]:
        return list(linear(name, F.silu(c))[:, None].chunk(parts, 2))

    def normed(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    time = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time))) + w["y_embedder.embedding_table.weight"][y]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT + w["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = adapted(f"{block}.adaLN_modulation.1", 6)
        qkv = linear(f"{block}.attn.qkv", normed(h, shift, scale)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = h + gate * linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{block}.mlp.fc1", normed(h, mlp_shift, mlp_scale)), approximate="tanh")
        h = h + mlp_gate * linear(f"{block}.mlp.fc2", inner)
    patches = linear("final_layer.linear", normed(h, *adapted("final_layer.adaLN_modulation.1", 2)))
    rows = SIDE // PATCH
    tiles = patches.unflatten(1, (rows, rows)).unflatten(3, (PATCH, PATCH, -1))
    return torch.einsum("bijpqc->bcipjq", tiles).flatten(2, 3).flatten(3, 4)[:, :CHANNELS]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "last.pt"


def repa(file: Path, **change: Any) -> Path:
    """As REPA's training writes it, with an average that is not its weights."""
    arguments = Namespace(model="SiT-XL/2", path_type="linear", prediction="v", qk_norm=False, cfg_prob=0.1)
    content = {"model": published(seed=1), "ema": published(), "opt": {"state": {}}, "args": arguments, "steps": 3}
    torch.save(content | change, file)
    return file


def sit(file: Path) -> Path:
    """As SiT publishes it: the tensors alone, with twice the outputs."""
    torch.save(published(outputs=2 * CHANNELS, with_projectors=False), file)
    return file


def asked() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, torch.tensor([0.001, 0.4, 0.999], dtype=torch.float64), torch.tensor([0, 3, CLASSES])


@torch.no_grad()
def estimate(model: TrainedModel) -> Tensor:
    x, s, y = asked()
    return model.denoiser.double()(x, s, Cond(label=y))


def test_repa_s_network_gives_the_published_velocity(file: Path, tmp_path: Path) -> None:
    """x_s = (1 - s) x0 + s n and v = n - x0, so that D = x_s - s v."""
    import_sit(repa(file), tmp_path / "teacher", OPTIONS)
    model, (x, s, y) = load_model(tmp_path / "teacher"), asked()
    assert model.spec.model.network == DiTConfig(patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, time_scale=1e-3)
    assert (model.spec.image_shape, model.spec.num_classes) == ((CHANNELS, SIDE, SIDE), CLASSES)
    assert model.denoiser.net.has_null_condition
    expected = x - s[:, None, None, None] * velocity(published(), x, s, y)
    torch.testing.assert_close(estimate(model), expected, rtol=0, atol=1e-6)


def test_sit_s_network_is_turned_about_in_time(file: Path, tmp_path: Path) -> None:
    """x_t = t x0 + (1 - t) n and v = x0 - n with s = 1 - t, so that D = x_s + s v(x_s, 1 - s)."""
    import_sit(sit(file), tmp_path / "teacher", OPTIONS)
    model, (x, s, y) = load_model(tmp_path / "teacher"), asked()
    assert model.spec.model.network.learn_sigma  # type: ignore[attr-defined]
    weights = published(outputs=2 * CHANNELS, with_projectors=False)
    expected = x + s[:, None, None, None] * velocity(weights, x, 1 - s, y)
    torch.testing.assert_close(estimate(model), expected, rtol=0, atol=1e-6)


def test_noise_at_overrules_what_the_file_looks_like(file: Path) -> None:
    x, s, y = asked()
    found = estimate(read_sit(repa(file), SiTOptions(heads=HEADS, noise_at=0)))
    expected = x + s[:, None, None, None] * velocity(published(), x, 1 - s, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_tensors_behind_a_wrapper_and_in_the_old_format_are_read(file: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in published().items()}
    torch.save({"model": wrapped}, file, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(estimate(read_sit(file, OPTIONS)), estimate(read_sit(repa(file), OPTIONS)))


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in published().items() if key != name}


@pytest.mark.parametrize(
    ("ema", "said"),
    [
        (without("pos_embed"), r"no network of SiT's: pos_embed is missing \(1 in all\)"),
        ({"a": torch.zeros(1)}, r"no network of SiT's: pos_embed is missing \(9 in all\)"),
        (without("blocks.1.mlp.fc2.bias"), r"another architecture: net.blocks.1.mlp.2.bias is missing \(1 in all\)"),
        (published() | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "qk_norm: a network with normalised"),
        (published() | {"extra.weight": torch.ones(8)}, r"another architecture: net.extra.weight is unknown"),
        (published() | {"pos_embed": torch.zeros(1, 16, WIDTH)}, "pos_embed: other positions than sines"),
        (published() | {"pos_embed": torch.zeros(1, 15, WIDTH)}, "15 positions, 256 frequencies, 4 outputs of 4"),
        (published() | {"pos_embed": torch.zeros(16)}, r"pos_embed is \(16,\): no SiT"),
        (published() | {"x_embedder.proj.weight": torch.zeros(16, 4, 0, 0)}, r"\(16, 4, 0, 0\): no SiT"),
        (published() | {"t_embedder.mlp.0.weight": torch.ones(1, 1).expand(16, 256)}, "more than the file holds of it"),
        (
            published() | {"extra": torch.zeros(2, 2).to_sparse()},
            r"'extra': \(2, 2\) of torch.float32, torch.sparse_coo on",
        ),
        (
            published() | {"final_layer.linear.bias": torch.zeros(16, device="meta")},
            "on meta: no dense tensor of floats",
        ),
        (
            published() | {"final_layer.linear.bias": torch.zeros(16).int()},
            "torch.int32, .*: no dense tensor of floats",
        ),
        (published() | {"blocks.9999.attn.qkv.bias": torch.ones(1)}, "network's shapes: .*depth"),
        ({"a": 3}, "its network is no dict of tensors"),
        (published() | {"a\nb.weight": torch.ones(1)}, r"of another architecture: net.a\\nb.weight is unknown"),
    ],
)
def test_what_is_no_such_network_is_refused_in_one_line(ema: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_sit(repa(file, ema=ema), OPTIONS)
    assert "\n" not in str(refused.value)


def test_repa_s_early_names_are_numbered_through(file: Path) -> None:
    early = {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in published().items()}
    assert any(name.startswith("decoder_blocks.0.") for name in early)
    assert torch.equal(estimate(read_sit(repa(file, ema=early), OPTIONS)), estimate(read_sit(repa(file), OPTIONS)))


@pytest.mark.parametrize(
    ("rows", "told", "classes", "has_null"),
    [(1000, None, 1000, False), (1001, None, 1000, True), (6, 6, 6, False), (6, 5, 5, True), (1000, 999, 999, True)],
)
def test_a_table_of_labels_has_a_row_for_no_class_or_not(
    rows: int, told: int | None, classes: int, has_null: bool, file: Path
) -> None:
    table = torch.randn(rows, WIDTH)
    arguments = Namespace() if told is None else Namespace(num_classes=told)
    ema = published() | {"y_embedder.embedding_table.weight": table}
    model = read_sit(repa(file, ema=ema, args=arguments), OPTIONS)
    assert model.spec.num_classes == classes
    assert model.denoiser.net.has_null_condition == has_null
    own = model.denoiser.state_dict()["net.embed_label.weight"]
    assert own.shape == (classes + 1, WIDTH)
    assert torch.equal(own[:rows], table)


def test_a_table_of_labels_that_is_not_the_told_classes_is_refused(file: Path) -> None:
    with pytest.raises(Refused, match=r"num_classes = 4: y_embedder.embedding_table has 6 rows"):
        read_sit(repa(file, args=Namespace(num_classes=4)), OPTIONS)


@pytest.mark.parametrize("kind", [Namespace, dict])
@pytest.mark.parametrize("change", [{"path_type": "cosine"}, {"path_type": "GVP"}, {"prediction": "noise"}])
def test_another_path_or_prediction_is_refused(change: dict[str, str], kind: Callable[..., Any], file: Path) -> None:
    ((name, value),) = change.items()
    with pytest.raises(Refused, match=f"{name} = '{value}': only"):
        read_sit(repa(file, args=kind(**change)), OPTIONS)


def test_what_the_file_does_not_say_is_asked_for_by_the_option(file: Path) -> None:
    with pytest.raises(
        UserError, match=r"a width of 16 is none of SiT's \(384, 768, 1024, 1152\); say how many --heads"
    ):
        read_sit(repa(file))
    with pytest.raises(UserError, match="heads = 3 must divide width = 16"):
        read_sit(repa(file), SiTOptions(heads=3))
    with pytest.raises(UserError, match=r"say which it is: --noise-at 1 \(REPA\) or 0 \(SiT\)"):
        read_sit(repa(file, ema=published(with_projectors=False)), OPTIONS)


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_runs_a_command_is_refused_and_runs_nothing(is_zip: bool, file: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = {"ema": published(), "args": Call(os.system, f"touch {ran}")}
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(Refused, match=r"names posix\.system, which is not read; refused, and nothing was run"):
        import_sit(file, tmp_path / "teacher", OPTIONS)
    assert not ran.exists()
    assert not (tmp_path / "teacher").exists()


def test_a_pipeline_of_other_latents_is_refused(file: Path, tmp_path: Path) -> None:
    save_stand_in("dit", tmp_path / "dit")
    with pytest.raises(UserError, match=r"--pipeline .*: its latents are \[4, 8, 8\], the network's \[4, 4, 4\]"):
        read_sit(repa(file, ema=published(side=4)), SiTOptions(heads=HEADS, pipeline=str(tmp_path / "dit")))


def test_a_pt_as_a_teacher_names_the_command(file: Path) -> None:
    with pytest.raises(UserError, match="SiT's and REPA's are converted: diffdistill import-sit"):
        load_model(repa(file))


def test_other_files_are_named_for_what_they_are(file: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_sit(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(Refused, match=r"a safetensors file; give SiT's or REPA's \.pt"):
        read_sit(file)
    file.write_text("<html>")
    with pytest.raises(Refused, match="a web page"):
        read_sit(file)
    file.write_text("weights")
    with pytest.raises(Refused, match=r"nothing that torch\.save wrote"):
        read_sit(file)
    with file.open("wb") as handle:
        np.savez(handle, a=np.zeros(3))
    with pytest.raises(Refused, match=r"cannot be read \(\w+\); refused, and nothing was run"):
        read_sit(file)
    file.write_bytes(pickle.dumps({"ema": None}))
    with pytest.raises(Refused, match=r"give SiT's or REPA's \.pt; EDM's \.pkl is for import-edm"):
        read_sit(file)
    torch.save([1, 2], file)
    with pytest.raises(Refused, match="holds no dict but a list"):
        read_sit(file)
    cut = repa(file).read_bytes()[:5000]
    file.write_bytes(cut)
    with pytest.raises(Refused, match=r"cannot be read \(\w+\); refused, and nothing was run"):
        read_sit(file)


@pytest.fixture
def teacher(file: Path, tmp_path: Path) -> Path:
    """An imported run, with the VAE of a small DiT's pipeline."""
    save_stand_in("dit", tmp_path / "dit")
    arguments = ["import-sit", str(repa(file)), "--out", str(tmp_path / "teacher"), "--heads", str(HEADS)]
    done = CliRunner().invoke(app, [*arguments, "--pipeline", str(tmp_path / "dit")])
    assert (done.exit_code, f"dit, {CHANNELS} x {SIDE} x {SIDE}, {CLASSES} classes" in done.output) == (0, True)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "holds a run already" in again.output
    return tmp_path / "teacher"


def test_an_export_has_the_code_of_the_network_and_of_its_vae_s_pipeline(teacher: Path, tmp_path: Path) -> None:
    """Two classes of different names, though both are DiTs."""
    code = network_code(load_model(teacher), open_pipeline(tmp_path / "dit"))
    assert all(defined in code for defined in ("class DiT(Network):", "class DiffusersDiT(Family):"))
    assert "source = Source(DiffusersDiT(), 'DiTPipeline'" in code


@pytest.mark.parametrize("recipe", ["dmd2/sit256", "rcm/sit256", "free_flow/sit256"])
def test_a_recipe_for_it_trains_a_step_on_latents(
    recipe: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    side = open_pipeline(tmp_path / "dit").image_size[0]
    rng = np.random.default_rng(0)
    for number in range(4):
        place = tmp_path / "images" / f"{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(place)
    overrides = [f"teacher={teacher}", f"run={tmp_path}/run", f"data.path={tmp_path}/images", f"data.resolution={side}"]
    overrides += ["train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=2", "train.device=cpu"]
    overrides += ["train.preview_every=0", "train.on_nonfinite=stop"]
    overrides += ["method.warmup=0"] if recipe.startswith("rcm") else []
    trainer = Trainer(load_config(find_config(recipe), overrides), quiet=True)
    before = {name: tensor.clone() for name, tensor in trainer.trained["generator"].state_dict().items()}
    trainer.run()
    after = load_model(tmp_path / "run").denoiser
    assert any(getattr(module, "time_scale", 1) == 1e-3 for module in after.net.modules())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())
