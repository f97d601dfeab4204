"""Random patterns: no larger than asked, of many shapes, the same again under the same seed."""

from __future__ import annotations

import pytest
import torch

from bdu.defenses.random_patterns import with_random_patterns

SIZE = 0.2


def patterned(images, size=SIZE, seed=0):
    return with_random_patterns(images, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (5, 1, 7, 12), (1, 3, 1, 1), (0, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_stay_images(shape, dtype):
    images = torch.rand(shape).to(dtype)
    before = images.clone()
    moved = patterned(images)
    assert moved.shape == images.shape
    assert moved.dtype == dtype
    assert torch.equal(images, before)
    assert bool(((moved >= 0) & (moved <= 1)).all())


def test_sizes_are_spread_up_to_the_one_asked_for():
    moves = patterned(torch.full((400, 3, 16, 16), 0.5), 0.1) - 0.5  # hardly any is cut
    sizes = moves.abs().mean((1, 2, 3))
    assert float(sizes.max()) <= 0.1 * (1 + 1e-5)
    assert float(sizes.mean()) == pytest.approx(0.05, abs=0.008)
    assert torch.equal(patterned(moves.abs(), 0.0), moves.abs())


def test_there_are_stripes_both_ways_fields_and_noise():
    moves = torch.cat(
        [patterned(torch.full((64, 3, 32, 32), 0.5), seed=seed) - 0.5 for seed in range(8)]
    )

    def flat(axis):
        return (moves - moves.mean(axis, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5

    down, across = flat(2), flat(3)
    for share in (down, across, ~(down | across)):
        assert 0.2 < float(share.float().mean()) < 0.5
    rough = (moves[..., 1:] - moves[..., :-1]).abs().mean((1, 2, 3)) / moves.abs().mean((1, 2, 3))
    assert float(rough[~across].min()) < 0.2 < 1.0 < float(rough.max())
    grey = (moves - moves.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.3 < float(grey.float().mean()) < 0.7


def test_a_seed_gives_the_same_and_leaves_the_global_state_alone():
    images = torch.rand(20, 3, 8, 8)
    state = torch.get_rng_state()
    one = patterned(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, patterned(images))
    assert not torch.equal(one, patterned(images, seed=1))
    assert len(torch.unique((one - images).flatten(1), dim=0)) == len(images)
