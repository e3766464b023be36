"""A condition can grow a part: what handles conditions takes it along, and no user of `Cond` changes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffdistill.diffusion import cond as cond_module
from diffdistill.diffusion import denoiser as denoiser_module
from diffdistill.diffusion import prompt_table as prompt_table_module
from diffdistill.diffusion import router as router_module
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPCosine
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.diffusion.sampling import DDIM


@dataclass(frozen=True, kw_only=True)
class Grown(Cond):
    """As `Cond` would be with one part more.  depth: [B, 1, H, W]."""

    depth: Tensor | None = None


class TakesDepth(torch.nn.Module):
    """Says the depth times 1 + label, so that every part that is lost shows."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset({"label", "depth"}), 3, True, 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Grown) -> Tensor:
        assert cond.depth is not None
        assert cond.label is not None
        return cond.depth * (1 + cond.label.reshape(-1, 1, 1, 1))


DEPTH = torch.arange(8.0).reshape(2, 1, 2, 2)
GIVEN = Grown(label=torch.tensor([0, 2]), depth=DEPTH)
X, T = torch.zeros(2, 1, 2, 2), torch.full((2,), 0.5)


@pytest.fixture(autouse=True)
def grown(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cond_module, denoiser_module, prompt_table_module, router_module):
        monkeypatch.setattr(module, "Cond", Grown)


def depth_of(cond: Cond) -> Tensor:
    assert isinstance(cond, Grown)
    assert cond.depth is not None
    return cond.depth


def test_a_new_part_is_moved_indexed_and_joined() -> None:
    assert depth_of(GIVEN.map(lambda part: part.to("meta"))).device.type == "meta"
    assert torch.equal(depth_of(GIVEN[torch.tensor([1])]), DEPTH[1:])
    assert torch.equal(depth_of(GIVEN[:1]), DEPTH[:1])
    assert torch.equal(depth_of(Cond.cat(GIVEN, GIVEN[:1])), torch.cat([DEPTH, DEPTH[:1]]))
    with pytest.raises(ValueError, match=r"cannot join conditions with \['depth', 'label'\] and \['label'\]"):
        Cond.cat(GIVEN, Grown(label=GIVEN.label))


def test_a_new_part_comes_through_dropout_and_guidance() -> None:
    net = Denoiser(TakesDepth(), VPCosine(), "x0")  # type: ignore[arg-type]
    dropped = net.drop_condition(GIVEN, torch.tensor([True, False]))
    assert dropped.label is not None
    assert dropped.label.tolist() == [3, 2]
    assert torch.equal(depth_of(dropped), DEPTH)
    for model in (net, RoutedDenoiser([net, net], lambda cond: torch.tensor([0, 1]))):
        guided = model(X, T, GIVEN, guidance=2.0)
        factor = torch.tensor([4 + 2 * (1 - 4), 4 + 2 * (3 - 4)]).reshape(2, 1, 1, 1)
        assert torch.equal(guided, DEPTH * factor)
    assert torch.equal(DDIM(num_steps=2)(net, X, GIVEN), net(X, T, GIVEN))


def test_a_new_part_is_encoded_or_given_beside_a_prompt() -> None:
    net = Denoiser(TakesDepth(), VPCosine(), "x0")  # type: ignore[arg-type]
    table = PromptTable([Grown(depth=DEPTH)], Grown(depth=torch.zeros(1, 1, 2, 2)))
    net.run_with(conditions=table)
    assert torch.equal(depth_of(net.resolve(Grown(label=torch.tensor([1, 2])))), torch.stack([DEPTH[1], 0 * DEPTH[0]]))
    given = Grown(label=torch.tensor([0, 0]), depth=-DEPTH)
    assert torch.equal(depth_of(net.resolve(given)), -DEPTH)
