"""Counter-based random numbers: moments, and that nothing but (seed, step, index, name) matters."""

import math

import pytest
import torch

from diffdistill.diffusion.step_random import StepRandom, integer_of

COUNT = 200_000


def test_several_names_in_one_pass_give_the_numbers_of_each_name_alone():
    rng, names = StepRandom(7, 3, torch.arange(10)), ["z", "eps", "fresh 0"]
    normals, uniforms = rng.normals(names, (1, 5)), rng.uniforms(names)
    for name in names:
        assert torch.equal(normals[name], rng.normal(name, (1, 5)))
        assert torch.equal(uniforms[name], rng.uniform(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_normals_are_the_rounded_float32_ones(dtype):
    rng = StepRandom(7, 3, torch.arange(1000))
    assert torch.equal(rng.normal("eps", (8,), dtype), rng.normal("eps", (8,)).to(dtype))


def test_float32_normals_are_the_float64_ones_to_float32_precision():
    rng = StepRandom(7, 3, torch.arange(1000))
    single, double = (rng.normal("eps", (8,), dtype).double() for dtype in (torch.float32, torch.float64))
    # Near the median a float32 uniform close to 1 leaves the radius an error of sqrt(2 x 6e-8).
    torch.testing.assert_close(single, double, rtol=1e-5, atol=4e-4)


def test_integers_of_the_ends_of_the_unit_interval_stay_in_range():
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33, 1.0], dtype=torch.float64)
    assert integer_of(ends, 7).tolist() == [0, 6, 6]


@pytest.mark.parametrize("shape", [(), (3,), (1, 8, 8)])
def test_a_sample_s_numbers_do_not_depend_on_the_batch_it_is_in(shape):
    whole = StepRandom(7, 3, torch.arange(10)).normal("eps", shape)
    parts = [StepRandom(7, 3, index).normal("eps", shape) for index in torch.arange(10).split(4)]
    assert torch.equal(whole, torch.cat(parts))


def test_uniforms_and_integers_do_not_depend_on_the_batch_either():
    whole, second = StepRandom(7, 3, torch.arange(10)), StepRandom(7, 3, torch.arange(5, 10))
    assert torch.equal(whole.uniform("t")[5:], second.uniform("t"))
    assert torch.equal(whole.integers("label", 10)[5:], second.integers("label", 10))


def test_a_longer_shape_starts_with_the_numbers_of_a_shorter_one():
    rng = StepRandom(7, 3, torch.arange(4))
    assert torch.equal(rng.normal("eps", (16,))[:, :8], rng.normal("eps", (8,)))


def test_normals_have_the_moments_of_a_normal_law():
    x = StepRandom(0, 0, torch.arange(COUNT // 8)).normal("eps", (8,), torch.float64)
    # Five standard errors of each moment: those of x, x^2, x^3 and x^4 have variances 1, 2, 15 and 96.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (x**power).mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / COUNT))


def test_normals_of_one_sample_are_uncorrelated():
    x = StepRandom(0, 0, torch.arange(COUNT // 8)).normal("eps", (8,), torch.float64)
    off_diagonal = (x.T @ x / len(x)).fill_diagonal_(0)
    assert off_diagonal.abs().max().item() < 5 / math.sqrt(len(x))  # five standard errors


def test_uniforms_have_the_moments_of_a_uniform_law_and_stay_inside_it():
    u = StepRandom(0, 0, torch.arange(COUNT)).uniform("t")
    assert bool(((u > 0) & (u < 1)).all())
    assert u.mean().item() == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / COUNT))
    assert u.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / COUNT))


def test_integers_are_equally_frequent():
    counts = StepRandom(0, 0, torch.arange(COUNT)).integers("label", 7).bincount()
    expected = COUNT / 7
    assert len(counts) == 7
    assert (counts - expected).abs().max().item() < 5 * math.sqrt(expected)  # five standard errors


@pytest.mark.parametrize(
    "other",
    [
        StepRandom(0, 1, torch.arange(COUNT)),
        StepRandom(1, 0, torch.arange(COUNT)),
        StepRandom(1 << 40, 0, torch.arange(COUNT)),
    ],
    ids=["another step", "another seed", "a seed beyond 32 bits"],
)
def test_another_step_or_seed_gives_independent_numbers(other):
    first = StepRandom(0, 0, torch.arange(COUNT)).normal("eps", (), torch.float64)
    second = other.normal("eps", (), torch.float64)
    assert (first * second).mean().abs().item() < 5 / math.sqrt(COUNT)  # five standard errors


def test_two_names_are_independent_and_one_name_repeats():
    rng = StepRandom(0, 0, torch.arange(COUNT))
    first, second = rng.normal("z", (), torch.float64), rng.normal("eps", (), torch.float64)
    assert (first * second).mean().abs().item() < 5 / math.sqrt(COUNT)  # five standard errors
    assert torch.equal(first, rng.normal("z", (), torch.float64))


def test_sample_numbers_beyond_32_bits_have_numbers_of_their_own():
    far = StepRandom(0, 0, torch.tensor([5, 5 + (1 << 32)])).uniform("t")
    assert far[0] != far[1]


def test_a_shared_integer_is_the_same_for_every_part_of_the_batch():
    parts = [StepRandom(0, 11, index).shared_integer("step", 1000) for index in torch.arange(12).split(3)]
    assert len(set(parts)) == 1


def test_a_shared_integer_takes_every_value_over_the_steps():
    index = torch.arange(2)
    values = [StepRandom(0, step, index).shared_integer("step", 4) for step in range(100)]
    # Each count is binomial(100, 1/4): 25 +- 4.3, so five standard errors leave at least 4.
    assert all(values.count(value) >= 4 for value in range(4))


def test_a_torch_seed_is_accepted_by_torch_and_differs_between_steps():
    seeds = {StepRandom(0, step, torch.arange(2)).torch_seed("dropout") for step in range(50)}
    assert len(seeds) == 50
    for seed in seeds:
        torch.Generator().manual_seed(seed)
