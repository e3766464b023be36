"""Encoded prompts by number: the table, and a denoiser that looks its labels up in it."""

import copy

import pytest
import torch
from support.far_device import counted, far_device, near
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.on_device import filled, upload
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import ClassRouter, RoutedDenoiser

LENGTH, WIDTH = 3, 4


def table(count: int, seed: int) -> Cond:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(count, LENGTH, WIDTH, generator=rng)
    return Cond(text=text, text_mask=torch.randint(0, 2, (count, LENGTH), generator=rng))


SHARDS, EMPTY = (table(2, 0), table(3, 1)), table(1, 2)


class TextNetwork(nn.Module):
    """Its output is the mean of the tokens that count."""

    accepts = frozenset({"text", "text_mask"})
    num_classes = 0
    has_null_condition = True
    resolution_multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        assert cond.text is not None
        assert cond.text_mask is not None
        weighted = cond.text * cond.text_mask[..., None].to(cond.text.dtype)
        return self.scale * weighted.mean((1, 2))[:, None] + 0 * x


def denoiser(conditions: PromptTable | None = None) -> Denoiser:
    made = Denoiser(TextNetwork(), EDM(), "x0")
    made.run_with(conditions=conditions)
    return made


X, T = torch.zeros(4, 2), torch.ones(4, dtype=torch.float64)


def test_rows_come_from_their_shards_in_the_order_asked_for() -> None:
    rows = PromptTable(SHARDS, EMPTY).rows(torch.tensor([4, 0, 2, 1, 5]))
    expected = [SHARDS[1][2:], SHARDS[0][:1], SHARDS[1][:1], SHARDS[0][1:], EMPTY]
    assert torch.equal(rows.text, torch.cat([cond.text for cond in expected]))
    assert torch.equal(rows.text_mask, torch.cat([cond.text_mask for cond in expected]))


def test_the_number_after_the_last_is_the_empty_condition() -> None:
    conditions = PromptTable(SHARDS, EMPTY)
    assert len(conditions) == 5
    assert torch.equal(conditions.rows(torch.tensor([5])).text, EMPTY.text)


@pytest.mark.parametrize("number", [-1, 6])
def test_a_number_outside_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 5"):
        PromptTable(SHARDS, EMPTY).rows(torch.tensor([number]))


def test_shards_with_other_parts_or_shapes_are_refused() -> None:
    for other in (Cond(text=SHARDS[0].text), Cond(text=torch.zeros(2, 9, WIDTH), text_mask=torch.zeros(2, 9))):
        with pytest.raises(ValueError, match="shard"):
            PromptTable((SHARDS[0], other), EMPTY)


def test_the_key_is_of_the_numbers() -> None:
    key = PromptTable(SHARDS, EMPTY).key
    assert PromptTable(tuple(shard.map(torch.clone) for shard in SHARDS), EMPTY).key == key
    assert PromptTable(SHARDS[::-1], EMPTY).key != key
    assert PromptTable(SHARDS, table(1, 7)).key != key


def test_a_label_is_the_prompt_of_that_number() -> None:
    made = denoiser(PromptTable(SHARDS, EMPTY))
    number = torch.tensor([0, 3, 5, 1])
    by_number = made(X, T, made.class_cond(number))
    torch.testing.assert_close(
        by_number, made(X, T, PromptTable(SHARDS, EMPTY).rows(number).map(as_double)), rtol=0, atol=0
    )


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance_goes_from_the_empty_prompt_by_number_or_by_text(w: float) -> None:
    conditions = PromptTable(SHARDS, EMPTY)
    made, number = denoiser(conditions), torch.tensor([0, 3, 2, 1])
    with_prompt, without = made(X, T, Cond(label=number)), made(X, T, Cond(label=torch.full((4,), 5)))
    expected = without + w * (with_prompt - without)
    torch.testing.assert_close(made(X, T, Cond(label=number), guidance=w), expected, rtol=1e-12, atol=1e-12)
    text = conditions.rows(number).map(as_double)
    torch.testing.assert_close(made(X, T, text, guidance=w), expected, rtol=1e-12, atol=1e-12)


def test_copies_share_the_table_and_weights_do_not_hold_it() -> None:
    made = denoiser(PromptTable(SHARDS, EMPTY))
    assert copy.deepcopy(made).conditions is made.conditions
    assert made.state_dict().keys() == {"net.scale"}


def test_some_samples_lose_their_prompt() -> None:
    made = denoiser(PromptTable(SHARDS, EMPTY))
    is_dropped = torch.tensor([True, False, True, False])
    dropped = made.drop_condition(Cond(label=torch.tensor([0, 1, 2, 3])), is_dropped)
    assert dropped.label.tolist() == [5, 1, 5, 3]
    text = made.resolve(Cond(label=torch.tensor([0, 1, 2, 3])))
    torch.testing.assert_close(made.drop_condition(text, is_dropped).text, made.resolve(dropped).text, rtol=0, atol=0)


def test_without_a_table_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \['text', 'text_mask'\], not \['label'\]"):
        denoiser()(X, T, Cond(label=torch.zeros(4, dtype=torch.int64)))


def test_routed_students_know_prompts_by_number() -> None:
    conditions = PromptTable(SHARDS, EMPTY)
    students = [denoiser(conditions), denoiser(conditions)]
    with torch.no_grad():
        students[1].net.scale.fill_(3)
    routed = RoutedDenoiser(students, ClassRouter(table=(0, 1, 0, 1, 0)))
    number = torch.tensor([0, 1, 2, 3])
    found, plain = routed(X, T, Cond(label=number), guidance=2.0), students[0](X, T, Cond(label=number), guidance=2.0)
    torch.testing.assert_close(found, plain * torch.tensor([1.0, 3, 1, 3])[:, None], rtol=1e-12, atol=1e-12)


def as_double(part: Tensor) -> Tensor:
    return part.double() if part.is_floating_point() else part


def test_what_is_asked_again_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions, number, asked = PromptTable(SHARDS, EMPTY), torch.tensor([4, 0]), list[Tensor]()
    gather = PromptTable._gather
    monkeypatch.setattr(PromptTable, "_gather", lambda self, index: (asked.append(index), gather(self, index))[1])
    made = denoiser(conditions)
    for _ in range(3):
        made(X[:2], T[:2], Cond(label=number))
    assert len(asked) == 1
    number[0] = 1
    assert torch.equal(conditions.rows(number).text, conditions.rows(torch.tensor([1, 0])).text)
    with torch.inference_mode():
        inside = torch.tensor([2, 3])
        conditions.rows(inside)
        inside[0] = 0
        assert torch.equal(conditions.rows(inside).text, conditions.rows(torch.tensor([0, 3])).text)


def test_empty_prompts_lie_in_memory_as_others_do() -> None:
    rows = PromptTable(SHARDS, EMPTY).rows(torch.tensor([5, 5]))
    assert all(part.is_contiguous() for part in rows.parts().values())


def test_prompts_that_the_host_drew_are_not_waited_for() -> None:
    conditions = PromptTable(SHARDS, EMPTY)
    with far_device() as device, counted() as crossings:
        label = upload(torch.tensor([4, 0, 5]), device)
        rows, none = conditions.rows(label), conditions.rows(filled(3, 5, device))
        conditions.rows(filled(2, 5, device))
        assert crossings.num_waits == 0, crossings.table()
        assert crossings.uploads.total() == 1 + 2 * len(EMPTY.parts())
    assert rows.text is not None
    assert none.text is not None
    assert torch.equal(near(rows.text), conditions.rows(torch.tensor([4, 0, 5])).text)
    assert torch.equal(near(none.text), EMPTY.text.expand(3, -1, -1))
