"""Segments of a grid: edges, jumps, stages, on every path."""

from itertools import pairwise

import pytest
import torch
from support.closed_forms import on_every_path

from diffdistill.diffusion.path import EDM, Path, VPDiscrete
from diffdistill.diffusion.sampling import DDIM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.segments import Stage, draw_jump, pick, segment_edges, segment_of, stage_at, stage_starts

BATCH = torch.arange(2000)
ALL = Stage(segments=1)


def jumps(path: Path, stage: Stage, ends: str, num_steps: int = 8) -> dict[str, torch.Tensor]:
    return draw_jump(StepRandom(0, 0, BATCH), path, stage, DDIM(num_steps=num_steps), ends)  # type: ignore[arg-type]


def test_the_lower_edge_is_strictly_smaller_for_all_grids_and_segments():
    for num_steps in range(1, 41):
        index = torch.arange(1, num_steps + 1)
        for num_segments in range(1, num_steps + 1):
            segment = segment_of(index, num_steps, num_segments)
            edges = segment_edges(num_steps, num_segments)
            expected = [max(int(e) for e in edges if e < n) for n in index]
            assert segment.low.tolist() == expected
            assert bool((index <= segment.high).all())


def test_eight_steps_in_four_segments_are_those_of_the_paper_s_drawing():
    segment = segment_of(torch.arange(1, 9), 8, 4)
    assert segment.low.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert segment.high.tolist() == [2, 2, 4, 4, 6, 6, 8, 8]


def test_the_paper_s_formula_leaves_nothing_to_jump_over_at_an_edge():
    num_steps, num_segments = 8, 4
    stride = num_steps // num_segments
    empty = [n for n in range(1, num_steps + 1) if n // stride * stride > n - 1]
    assert empty == [2, 4, 6, 8]
    assert segment_of(torch.tensor(empty), num_steps, num_segments).low.tolist() == [0, 2, 4, 6]


def test_segments_of_uneven_length_cover_the_grid():
    edges = segment_edges(50, 4)
    assert edges.tolist() == [0, 12, 25, 37, 50]
    index = torch.arange(1, 51)
    segment = segment_of(index, 50, 4)
    for low, high in pairwise(edges.tolist()):
        assert index[(segment.low == low) & (segment.high == high)].tolist() == list(range(low + 1, high + 1))


def test_fixed_ends_on_stable_diffusion_s_grid_are_pcm_s():
    drawn = jumps(VPDiscrete(), Stage(segments=4), "fixed", num_steps=50)
    assert sorted(set(drawn["end"].tolist())) == [0, 239, 499, 739]
    assert sorted(set(drawn["start"].tolist())) == [20 * i + 19 for i in range(50)]


@on_every_path
@pytest.mark.parametrize("num_segments", [1, 2, 4, 8])
def test_a_random_jump_ends_anywhere_between_the_segment_s_end_and_the_next_step(path, num_segments):
    times = ALL.times(path, DDIM(num_steps=8)).tolist()
    drawn = jumps(path, Stage(segments=num_segments), "random")
    found = {
        (times.index(s), times.index(e)) for s, e in zip(*(drawn[k].tolist() for k in ("start", "end")), strict=True)
    }
    low = segment_of(torch.arange(1, 9), 8, num_segments).low.tolist()
    assert found == {(n, e) for n in range(1, 9) for e in range(low[n - 1], n)}
    following = [times[times.index(s) - 1] for s in drawn["start"].tolist()]
    assert drawn["next"].tolist() == following


@on_every_path
def test_as_many_segments_as_steps_jump_one_step(path):
    drawn = jumps(path, Stage(segments=8), "random")
    assert torch.equal(drawn["end"], drawn["next"])


@on_every_path
def test_the_grid_s_times_are_those_of_ddim_and_time_zero(path):
    grid = DDIM(num_steps=8)
    times = ALL.times(path, grid)
    assert torch.equal(times[1:].flip(0), grid.times(path))
    assert times[0] == 0
    assert bool((times.diff() > 0).all())


@on_every_path
def test_a_discriminator_looks_within_the_segment_and_never_at_a_time_without_a_network(path):
    drawn = jumps(path, Stage(segments=2), "random")
    times = ALL.times(path, DDIM(num_steps=8))
    high = torch.where(drawn["start"] > times[4], times[8], times[4])
    assert bool((drawn["judged"] >= drawn["end"].clamp_min(path.t_min)).all())
    assert bool((drawn["judged"] < high).all())


def test_picks_are_even_over_the_indices_allowed():
    uniform = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    picked = pick(uniform, torch.full((1200,), 3), torch.full((1200,), 7))
    assert torch.bincount(picked).tolist() == [0, 0, 0, 300, 300, 300, 300]


def test_stages_follow_each_other_and_the_last_does_not_end():
    stages = [Stage(segments=k, num_steps=n) for k, n in ((4, 3), (2, 2), (1, 9))]
    assert stage_starts(stages) == (0, 3, 5)
    assert [stage_at(step, stages) for step in (0, 2, 3, 4, 5, 13, 14, 1000)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_more_segments_than_steps_are_refused():
    with pytest.raises(ValueError, match="9 segments need a grid"):
        Stage(segments=9).check(DDIM(num_steps=8))
    with pytest.raises(ValueError, match="4 segments need a grid of at least as many steps, not 2"):
        Stage(segments=4, grid_steps=2).check(DDIM(num_steps=8))


def test_a_stage_s_own_grid_is_an_even_choice_of_the_common_one():
    grid = DDIM(num_steps=32, spacing="karras")
    coarse = Stage(segments=4, grid_steps=8).times(EDM(), grid)
    assert torch.equal(coarse, ALL.times(EDM(), grid)[::4])
    with pytest.raises(ValueError, match="grid_steps = 5 must divide the grid's 32 steps"):
        Stage(segments=1, grid_steps=5).check(grid)
