"""`diffdistill merge`: linear, the ends to the bit, LoRA by its products, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_matrix import origin, train
from torch import Tensor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.distillation.method import shapes_of
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model, load_players, merge_model
from diffdistill.models.merge import merge_runs, mix
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="module")
def pair(home: Path) -> tuple[Path, Path]:
    """Two SiD students of one teacher, with an average and another one."""
    teacher, more = origin("mlp", "sid", home / "mlp"), "more_emas={slow: {halflife_images: 100}}"
    return (
        train("sid", teacher, home / "a", more),
        train("sid", teacher, home / "b", more, "train.seed=7", "optimizers.default.lr=0.01"),
    )


@pytest.fixture(scope="module")
def factors(home: Path) -> tuple[Path, Path]:
    teacher = origin("mlp", "sid", home / "mlp2")
    return (
        train("sid", teacher, home / "fa", "lora.default={rank: 2}"),
        train("sid", teacher, home / "fb", "lora.default={rank: 3, alpha: 6}", "train.seed=7"),
    )


def tensors(place: Path) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(group)
        for name, group in load_checkpoint(list_checkpoints(place / "checkpoints")[-1]).tensors.items()
    }


def difference(one: Path, other: Path) -> float:
    first, second = (tensors(place) for place in (one, other))
    shared = [group for group in first if group in second and (group == "players" or group.startswith("ema"))]
    assert shared
    return max(float((first[g][n].double() - second[g][n].double()).abs().max()) for g in shared for n in first[g])


def test_a_run_with_itself_is_itself_to_the_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_runs([pair[0], pair[0]], tmp_path / "m", (0.3,))
    made, own = tensors(tmp_path / "m"), tensors(pair[0])
    assert made.keys() == {"players", "ema", "ema-slow"}
    for group, weights in made.items():
        assert weights.keys() == own[group].keys()
        assert all(torch.equal(weights[name], own[group][name]) for name in weights), group


@pytest.mark.parametrize(("weight", "end"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_the_runs_to_the_bit(pair: tuple[Path, Path], tmp_path: Path, weight: float, end: int) -> None:
    merge_runs(pair, tmp_path / "m", (weight,))
    assert difference(tmp_path / "m", pair[end]) == 0
    images = [sample_images(load_model(place), count=4) for place in (tmp_path / "m", pair[end])]
    assert torch.equal(*images)


def test_it_is_linear_in_every_player_and_average(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = merge_runs(pair, tmp_path / "m", (0.25, 0.75))
    assert made.players == ("fake", "generator")
    a, b, mixed = (tensors(place) for place in (*pair, tmp_path / "m"))
    for group, weights in mixed.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, 0.25 * a[group][name] + 0.75 * b[group][name], rtol=0, atol=1e-6)
    assert difference(tmp_path / "m", pair[0]) > 1e-4


def test_a_player_may_have_weights_of_its_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_runs(pair, tmp_path / "m", (0.5,), {"fake": (1.0,)})
    mixed, a, b = (tensors(place)["players"] for place in (tmp_path / "m", *pair))
    for name, tensor in mixed.items():
        expected = b[name] if name.startswith("fake.") else (a[name] + b[name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_several_runs_have_as_many_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_runs([*pair, pair[0]], tmp_path / "m", (0.5, 0.75, -0.25))
    a, b, mixed = (tensors(place)["players"] for place in (*pair, tmp_path / "m"))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name], rtol=0, atol=1e-6)


def test_what_it_is_made_of_stands_in_the_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = merge_runs(pair, tmp_path / "m", (0.5,), {"fake": (0.0,)})
    state = json.loads((made.folder / "state.json").read_text())
    assert [one["weights"] for one in state["merged"]] == [
        {"fake": 1.0, "generator": 0.5},
        {"fake": 0.0, "generator": 0.5},
    ]
    assert [Path(one["place"]).parent.parent.name for one in state["merged"]] == ["a", "b"]
    assert len({one["sha256"] for one in state["merged"]}) == 2
    assert made.has_one_start
    players = load_players(tmp_path / "m").denoisers
    assert players.keys() == {"fake", "generator"}


def test_products_of_factors_are_mixed_exactly(factors: tuple[Path, Path], tmp_path: Path) -> None:
    made = merge_runs(factors, tmp_path / "m", (0.4,))
    assert made.players == ("generator",)
    assert made.left_out == ("fake",)
    a, b, mixed = (merge_model(load_model(place)).denoiser.state_dict() for place in (*factors, tmp_path / "m"))
    moved = 0.0
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.6 * a[name] + 0.4 * b[name], rtol=0, atol=1e-6)
        moved = max(moved, float((a[name] - b[name]).abs().max()))
    assert moved > 1e-4
    found = load_model(tmp_path / "m").spec.model.network.lora  # type: ignore[union-attr]
    assert (found.rank, found.alpha) == (5, None)


def test_factors_with_themselves_or_alone_keep_their_rank(factors: tuple[Path, Path], tmp_path: Path) -> None:
    merge_runs([factors[1], factors[1]], tmp_path / "m", (0.3,))
    assert difference(tmp_path / "m", factors[1]) == 0
    merge_runs(factors, tmp_path / "n", (1.0,))
    a, mixed = (merge_model(load_model(place)).denoiser.state_dict() for place in (factors[1], tmp_path / "n"))
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, a[name], rtol=0, atol=1e-6)


def test_affine_students_are_interpolated_on_the_same_noise() -> None:
    """Merged samples of generators that are linear in their noise are the samples' mix."""
    first, second, noise = (torch.randn(5, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    made = noise @ mix([first, second], (0.7, 0.3)).T
    torch.testing.assert_close(made, 0.7 * noise @ first.T + 0.3 * noise @ second.T)


def test_what_does_not_fit_is_refused(
    pair: tuple[Path, Path], factors: tuple[Path, Path], home: Path, tmp_path: Path
) -> None:
    other = train("sid", origin("own dit", "sid", home / "dit"), home / "dit-run")
    out = tmp_path / "m"
    cases: list[tuple[Any, tuple[float, ...], dict[str, tuple[float, ...]], str]] = [
        ((pair[0], other), (0.5,), {}, "network, image shape, sampler or LoRA's base than"),
        ((pair[0], factors[0]), (0.5,), {}, "network, image shape, sampler or LoRA's base than"),
        ((pair[0],), (1.0,), {}, "needs at least two runs"),
        (pair, (0.5, 0.6), {}, "must sum to 1; 0.5 \\+ 0.6 = 1.1"),
        ((*pair, pair[0]), (0.5,), {}, "3 runs need as many weights; there are 1"),
        (pair, (0.5,), {"critic": (0.5,)}, "--player critic: not one of the merged players: fake, generator"),
        ((pair[0], tmp_path / "none"), (0.5,), {}, "no such folder"),
    ]
    for places, weights, by_player, said in cases:
        with pytest.raises(UserError, match=said):
            merge_runs(places, out, weights, by_player)
    assert not out.exists()
    with pytest.raises(UserError, match="holds a run already"):
        merge_runs(pair, pair[0], (0.5,))
    with pytest.raises(UserError, match="integers that differ"):
        mix([torch.tensor([1]), torch.tensor([2])], (0.5, 0.5))


def test_another_start_is_said(pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    teacher = origin("mlp", "sid", home / "mlp3", "train.seed=7")
    other = train("sid", teacher, home / "c")
    assert shapes_of(load_model(other).denoiser) == shapes_of(load_model(pair[0]).denoiser)
    assert not merge_runs([pair[0], other], tmp_path / "m", (0.5,)).has_one_start


def test_the_command_mixes_and_says_what(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["merge", *map(str, pair), "--out", str(tmp_path / "m"), "--weight", "0.25", "--player", "fake=0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "fake, generator" in result.stdout
    a, b, mixed = (tensors(place)["ema"] for place in (*pair, tmp_path / "m"))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name], rtol=0, atol=1e-6)
    for given in ("fake", "fake=x", "=0.5"):
        result = CliRunner().invoke(app, [*arguments[:3], "--out", str(tmp_path / "n"), "--player", given])
        assert result.exit_code == 2
        assert f"--player {given}: give a player and its weights" in result.stderr
