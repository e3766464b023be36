"""EDM's checkpoints: the same pixels as EDM's own networks, and a pickle that can do nothing."""

import gzip
import os
import pickle
import pickletools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file
from support.edm_pickles import ARGUMENTS, SHAPE, Persistent, network_of, waves, write_checkpoint
from torch import Tensor, nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.cond import Cond
from diffdistill.models.load import load_model
from diffdistill.models.teachers.edm_checkpoint import import_edm, read_edm
from diffdistill.models.teachers.pickle_reader import Refused
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

OUTPUTS = Path(__file__).with_name("edm_outputs.safetensors")
CONFIGS = {
    "ddpmpp": DDPMPP(channels=16, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8, 4), augment_dim=9),
    "ncsnpp": NCSNPP(channels=16, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8, 4), augment_dim=9),
    "adm": ADM(channels=64, multipliers=(1, 2), blocks=1, attention_resolutions=(8,), dropout=0.1),
}


def tensors(kind: str) -> dict[str, Tensor]:
    return waves(CONFIGS[kind].build((3, 16, 16), 5, 0.0))


def network(kind: str = "ddpmpp", **change: Any) -> Persistent:
    return network_of(tensors(kind), ARGUMENTS[kind] | SHAPE | change)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "edm.pkl"


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_imported_network_gives_the_pixels_of_edm_s_own(kind: str, file: Path, tmp_path: Path) -> None:
    import_edm(write_checkpoint(file, {"ema": network(kind)}), tmp_path / "teacher")
    model = load_model(tmp_path / "teacher")
    assert model.spec.model.network == CONFIGS[kind]
    assert (model.spec.image_shape, model.spec.num_classes) == ((3, 16, 16), 5)
    sigma = torch.tensor([0.3, 5.0], dtype=torch.float64)
    x = torch.sin(torch.arange(2 * 3 * 16 * 16, dtype=torch.float32)).reshape(2, 3, 16, 16)
    with torch.no_grad():
        found = model.denoiser(x * sigma.float()[:, None, None, None], sigma, Cond(label=torch.tensor([1, 3])))
    # Stored: D of EDM's own EDMPrecond at its commit 008a4e5, with these weights, in float32 on a CPU.
    torch.testing.assert_close(found, load_file(OUTPUTS)[kind], rtol=0, atol=1e-5)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(protocol: int, file: Path) -> None:
    model = read_edm(write_checkpoint(file, {"ema": network()}, protocol=protocol))
    assert torch.equal(model.denoiser.net.input.weight, tensors("ddpmpp")["enc.16x16_conv.weight"])


def test_the_command_writes_a_teacher(file: Path, tmp_path: Path) -> None:
    write_checkpoint(file, {"ema": network()})
    done = CliRunner().invoke(app, ["import-edm", str(file), "--out", str(tmp_path / "teacher")])
    assert (done.exit_code, "ddpmpp, 3 x 16 x 16, 5 classes" in done.output) == (0, True)
    config = small_config("sim", tmp_path / "run", "train.steps=1", teacher=tmp_path / "teacher")
    with pytest.raises(UserError, match=r"images are \(1, 8, 8\), but the teacher's are \(3, 16, 16\)"):
        Trainer(config, quiet=True)


def test_a_pickle_as_a_teacher_names_the_command(file: Path) -> None:
    write_checkpoint(file, {"ema": network()})
    with pytest.raises(UserError, match="convert it: diffdistill import-edm"):
        load_model(file)


def test_a_folder_that_holds_a_run_is_left_alone(file: Path, tmp_path: Path) -> None:
    write_checkpoint(file, {"ema": network()})
    import_edm(file, tmp_path / "teacher")
    with pytest.raises(UserError, match="holds a run already"):
        import_edm(file, tmp_path / "teacher")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder_type": "skip"}, "encoder_type = 'skip'.*neither DDPM.. nor NCSN"),
        ({"model_type": "Mine"}, "model_type = 'Mine'"),
        ({"channel_mult_emb": 2}, "channel_mult_emb = 2"),
        ({"img_resolution": "16"}, "img_resolution = '16'"),
        ({"num_blocks": 60, "channel_mult": [1] * 12}, "num_blocks = 60: the file holds"),
        ({"num_blocks": 10**6}, "network's arguments.*blocks.*less than or equal to 64"),
        ({"model_channels": 2**14}, "32,768 channels, 5 classes: too many"),
        ({"label_dim": 2**15}, "32,768 classes: too many"),
        ({"label_dim": 2**20}, "network's arguments.*num_classes.*less than or equal to 1000000"),
        ({"model_channels": 32}, "another architecture"),
        ({"dropout": "x"}, "network's arguments"),
    ],
)
def test_arguments_that_no_network_of_edm_s_has_are_refused(change: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_edm(write_checkpoint(file, {"ema": network(**change)}))


# Hostile files


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


def planted(content: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """A checkpoint with something at a place of the network's state."""
    made = network()
    place = made.meta["state"]
    for name in path:
        place = place[name].meta["state"] if isinstance(place[name], Persistent) else place[name]
    place["planted"] = content
    return {"ema": made}


@pytest.mark.parametrize("path", [(), ("_modules", "model", "_buffers"), ("_init_kwargs",)])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_a_command_is_refused_by_the_function_s_name(
    path: tuple[str, ...], protocol: int, file: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    write_checkpoint(file, planted(Call(os.system, f"touch {ran}"), path), protocol=protocol)
    with pytest.raises(Refused, match=r"names posix.system, which is not read; refused, and nothing was run"):
        import_edm(file, tmp_path / "teacher")
    assert not ran.exists()
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Call(eval, "1"), "builtins.eval"),
        (Call(getattr, "x", "upper"), "builtins.getattr"),
        (Call(torch.load, "x.pt"), "torch.serialization.load"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Path, "pathlib"),
        (complex(1, 2), "builtins.complex"),
        ({(1, 2): 3}, "a key that is a tuple"),
        (2**4096, "a number of too many digits"),
    ],
)
def test_whatever_else_is_in_a_pickle_is_refused_by_name(content: Any, said: str, file: Path) -> None:
    write_checkpoint(file, planted(content, ()))
    with pytest.raises(Refused, match=said):
        read_edm(file)


def test_code_within_a_storage_s_own_pickle_is_refused(file: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    inner = pickle.dumps(Call(os.system, f"touch {ran}"), 2)
    write_checkpoint(file, planted(Call(torch.storage._load_from_bytes, inner), ()))
    with pytest.raises(Refused, match="a storage that cannot be read"):
        read_edm(file)
    assert not ran.exists()


def test_a_tensor_larger_than_its_storage_is_refused(file: Path) -> None:
    storage = torch.storage.TypedStorage(2, dtype=torch.float32, _internal=True)
    write_checkpoint(
        file, planted(Call(torch._utils._rebuild_tensor_v2, storage, 0, (10**6, 10**6), (0, 0), False, None), ())
    )
    with pytest.raises(Refused, match="whose storage holds 2 numbers"):
        read_edm(file)


def test_a_persistent_object_of_another_version_is_refused(file: Path) -> None:
    made = network()
    made.meta["version"] = 7
    with pytest.raises(Refused, match="a persistent object of another kind"):
        read_edm(write_checkpoint(file, {"ema": made}))


def test_a_module_within_itself_is_refused(file: Path) -> None:
    loop = nn.ModuleDict()
    loop.__dict__["_modules"] = {"again": loop}
    made = network()
    made.meta["state"]["_modules"]["loop"] = loop
    with pytest.raises(Refused, match="a module that is there already"):
        read_edm(write_checkpoint(file, {"ema": made}))


@pytest.mark.parametrize("keep", [0, 1, 100, 20_000, -1])
def test_a_file_that_was_cut_off_is_refused(keep: int, file: Path) -> None:
    write_checkpoint(file, {"ema": network()})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(Refused, match=r"not a whole pickle|0 bytes|it has no end|cannot be read"):
        read_edm(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"(i__builtin__\nexec\n.", "opcode INST"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"Pweights\n.", "opcode PERSID"),
        (b"\x80\x02]" + b"(" * 100_001 + b".", "too long, or too deep"),
        (b"\x80\x02K\x01K\x01R.", "a call of 1"),
        (b"\x80\x02K\x01K\x02b.", "a state for a int"),
        (b"\x80\x02u.", "a list without a beginning"),
        (b"\x80\x02h\x07.", "not a whole pickle"),
        (b"not a pickle at all", "opcode INT|not a whole pickle"),
        (b"\x80\x04N.", "holds no network under `ema`"),
    ],
)
def test_odd_opcodes_are_refused_by_name(content: bytes, said: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(Refused, match=said):
        read_edm(file)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("training-state-000000.pt", partial(torch.save, {"net": {}}), r"a zip, .*training-state-.* network-snapshot-"),
        ("old.pt", partial(torch.save, {}, _use_new_zipfile_serialization=False), r"before PyTorch 1\.6"),
        ("a.safetensors", partial(save_file, {"a": torch.ones(2)}), "a safetensors file"),
        ("a.pkl.gz", lambda file: file.write_bytes(gzip.compress(b"a pickle")), "a gzip file; unpack"),
        ("a.pkl", lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        ("b.pkl", lambda file: file.write_text("<!DOCTYPE html>"), "a web page"),
        ("a.npy", lambda file: np.save(file, np.zeros(3)), "a NumPy array"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(
    name: str, write: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(Refused, match=f"no bare pickle but .*{said}"):
        read_edm(tmp_path / name)


def test_no_opcode_imports_or_calls(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(file, {"ema": network()})

    def fail(*_: object) -> None:
        raise AssertionError("pickle's own machine ran")

    monkeypatch.setattr(pickle, "load", fail)
    monkeypatch.setattr(pickle, "loads", fail)
    assert read_edm(file).spec.num_classes == 5
    assert {opcode.name for opcode, _, _ in pickletools.genops(file.read_bytes())} >= {"REDUCE", "NEWOBJ", "BUILD"}
