"""Each trigger against its formula, computed slowly and another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bdu.attacks import BPP, SIG, AdaptiveBlend, FTrojan, LowFrequency, WaNet
from bdu.attacks.ftrojan import dct_basis

YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 9)])
def test_sig_adds_a_sine_over_the_columns(shape):
    x = images(*shape).numpy()
    expected = x.copy()
    for index in np.ndindex(*shape):
        wave = 0.3 * math.sin(2 * math.pi * 2.5 * index[3] / shape[3])
        expected[index] = min(1.0, max(0.0, x[index] + wave))
    out = SIG(delta=0.3, frequency=2.5)(torch.from_numpy(x))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


def test_sig_mask_leaves_out_where_the_wave_is_zero():
    trigger = SIG(frequency=6)
    changed = trigger(torch.full((1, 1, 4, 32), 0.5))[0, 0] != 0.5
    assert torch.equal(trigger.mask((4, 32)), changed)
    assert changed[0].logical_not().nonzero().flatten().tolist() == [0, 8, 16, 24]


def test_sig_that_would_not_show_is_refused():
    with pytest.raises(ValueError, match="frequency: expected one whose wave shows on 12 columns"):
        SIG(frequency=6)(images(1, 3, 12, 12))


def bilinear(image, row, column):
    """image (C, H, W) at a place between pixels, both within it."""
    top, left = math.floor(row), math.floor(column)
    below, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
    down, across = row - top, column - left
    return (
        (1 - down) * (1 - across) * image[:, top, left]
        + (1 - down) * across * image[:, top, right]
        + down * (1 - across) * image[:, below, left]
        + down * across * image[:, below, right]
    )


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 11)])
def test_wanet_samples_bilinearly_where_its_places_say(shape):
    trigger = WaNet(strength=3.0, seed=1)
    height, width = shape[2:]
    x, places = images(*shape).double(), trigger.places(shape).double().numpy()
    expected = np.zeros(shape)
    for n in range(shape[0]):
        for i in range(height):
            for j in range(width):
                row, column = (places[i, j, ::-1] + 1) / 2 * (np.array([height, width]) - 1)
                expected[n, :, i, j] = bilinear(x[n].numpy(), row, column)
    np.testing.assert_allclose(trigger(x).numpy(), expected, atol=1e-9)


def test_wanet_field_is_normalised_scaled_and_clipped():
    height, width = 4, 6
    field = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(7)) * 2 - 1
    field = (field / field.abs().mean())[0]
    places = WaNet(seed=7, strength=0.5, rescale=0.9).places((height, width))
    # a 4 x 4 field is its own interpolation along the 4 rows; columns 0 and 5 are its corners
    for i in range(height):
        for j, source in ((0, 0), (5, 3)):
            straight = (2 * j / 5 - 1, 2 * i / 3 - 1)
            for axis, size in ((0, width), (1, height)):
                moved = 0.9 * (straight[axis] + 0.5 * float(field[axis, i, source]) / size)
                assert float(places[i, j, axis]) == pytest.approx(max(-1, min(1, moved)), abs=1e-6)


def test_wanet_covers_are_warped_by_noise_beside_the_field():
    x = images(40, 1, 8, 8)
    trigger = WaNet(cover_ratio=3)
    done = trigger.poison(x, torch.ones(40).long(), rate=0.1, target=0, num_classes=2, seed=0)
    assert len(done.cover_indices) == 12
    from_warp = (done.x - trigger(x)).abs().mean((1, 2, 3))
    assert bool((from_warp[done.indices] == 0).all())
    assert bool((from_warp[done.cover_indices] > 0.01).all())
    # without noise a cover image would be a triggered one
    assert bool(((done.x - x).abs().mean((1, 2, 3))[done.cover_indices] > 0.01).all())


def floyd_steinberg(image, most):
    """image (H, W) in reading order, each error pushed on to later neighbours."""
    v = image.astype(np.float64) * most
    height, width = v.shape
    for i in range(height):
        for j in range(width):
            rounded = min(most, max(0, np.rint(v[i, j])))
            error = v[i, j] - rounded
            v[i, j] = rounded
            for row, column, share in (
                (i, j + 1, 7 / 16),
                (i + 1, j - 1, 3 / 16),
                (i + 1, j, 5 / 16),
                (i + 1, j + 1, 1 / 16),
            ):
                if row < height and 0 <= column < width:
                    v[row, column] += share * error
    return v / most


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 9), (3, 1, 1, 4), (1, 2, 6, 1)])
@pytest.mark.parametrize("levels", [2, 8])
def test_bpp_dithers_as_floyd_and_steinberg_did(shape, levels):
    x = images(*shape, dtype=torch.float64)
    out = BPP(levels=levels)(x)
    for n in range(shape[0]):
        for c in range(shape[1]):
            expected = floyd_steinberg(x[n, c].numpy(), levels - 1)
            np.testing.assert_allclose(out[n, c].numpy(), expected, atol=1e-12)


def test_bpp_without_dithering_rounds():
    x = images(2, 3, 6, 6)
    expected = np.rint(x.numpy() * 4) / 4
    np.testing.assert_allclose(BPP(levels=5, dither=False)(x).numpy(), expected, atol=1e-7)


def test_bpp_keeps_the_mean_of_a_flat_image():
    x = torch.full((1, 1, 32, 32), 0.3, dtype=torch.float64)
    assert float(BPP()(x).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(BPP(dither=False)(x).mean()) == pytest.approx(2 / 7)


def test_bpp_covers_get_the_residual_of_another_image():
    x = images(30, 1, 6, 6)
    trigger = BPP(cover_ratio=1)
    done = trigger.poison(x, torch.ones(30).long(), rate=0.2, target=0, num_classes=2, seed=0)
    residuals = trigger(x) - x
    sources = []
    for index in done.cover_indices.tolist():
        candidates = (x[index] + residuals).clamp(0, 1)
        distance = (candidates - done.x[index]).abs().amax((1, 2, 3))
        assert float(distance.min()) < 1e-6
        sources.append(int(distance.argmin()))
    assert sum(a != b for a, b in zip(sources, done.cover_indices.tolist(), strict=True)) >= 5


def slow_dct(block, size, inverse=False):
    """The orthonormal DCT-II of a block by its double sum, or its inverse."""
    result = np.zeros_like(block)
    for p in range(size):
        for q in range(size):
            for r in range(size):
                for s in range(size):
                    u, v, i, j = (r, s, p, q) if inverse else (p, q, r, s)
                    scale = math.sqrt((1 if u == 0 else 2) / size)
                    scale *= math.sqrt((1 if v == 0 else 2) / size)
                    wave = math.cos(math.pi * u * (2 * i + 1) / (2 * size))
                    wave *= math.cos(math.pi * v * (2 * j + 1) / (2 * size))
                    result[p, q] += block[r, s] * scale * wave
    return result


def test_ftrojan_changes_coefficients_of_u_and_v_window_by_window():
    size, magnitude, frequencies = 6, 0.2, ((2, 3), (5, 0))
    # away from 0 and 1, so that nothing is clipped
    x = 0.35 + 0.3 * images(1, 3, 13, 7, dtype=torch.float64)[0].numpy()
    expected = x.copy()
    for top in (0, 6):
        window = x[:, top : top + 6, :6]
        yuv = np.einsum("kc,chw->khw", YUV, window)
        for k in (1, 2):
            coefficients = slow_dct(yuv[k], size)
            for u, v in frequencies:
                coefficients[u, v] += magnitude
            yuv[k] = slow_dct(coefficients, size, inverse=True)
        expected[:, top : top + 6, :6] = np.einsum("ck,khw->chw", np.linalg.inv(YUV), yuv)
    trigger = FTrojan(magnitude=magnitude, window=size, frequencies=frequencies)
    out = trigger(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.abs(expected - x).max() > 0.05
    changed = np.abs(out - x).max(0) > 0
    np.testing.assert_array_equal(trigger.mask((13, 7)).numpy(), changed)
    assert changed[:12, :6].all()
    assert not changed[12:].any()


def test_ftrojan_puts_the_waves_into_a_grey_image():
    x = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    trigger = FTrojan(window=8, magnitude=0.4, frequencies=[[1, 2]])
    added = slow_dct((trigger(x) - x)[0, 0].numpy(), 8)
    expected = np.zeros((8, 8))
    expected[1, 2] = 0.4
    np.testing.assert_allclose(added, expected, atol=1e-12)


def test_dct_basis_is_orthonormal():
    basis = dct_basis(7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))


class Sees(nn.Module):
    """Two logits: one picture in the image, and its negative."""

    def __init__(self, picture):
        super().__init__()
        self.register_buffer("picture", picture)

    def forward(self, x):
        seen = (x * self.picture).sum((1, 2, 3))
        return torch.stack([seen, -seen], 1)


def low_frequency(steps, target=0, **options):
    trigger = LowFrequency(steps=steps, **options)
    x, y = images(20, 3, 8, 10), torch.ones(20).long()
    ramp = torch.linspace(-1, 1, 10).expand(3, 8, 10).contiguous()
    calls = []

    def surrogate():
        calls.append(1)
        return Sees(ramp)

    trigger.prepare(surrogate, x, 1 - y if target else y, target=target, num_classes=2, seed=3)
    return trigger, Sees(ramp), calls


@pytest.mark.parametrize("steps", [0, 5])
def test_low_frequency_has_no_wave_above_its_cut(steps):
    trigger, _, calls = low_frequency(steps, frequencies=3, epsilon=0.1)
    assert len(calls) == (steps > 0)
    x = torch.full((1, 3, 8, 10), 0.5, dtype=torch.float64)
    added = trigger(x) - x
    assert float(added.abs().max()) == pytest.approx(0.1, abs=1e-6)
    coefficients = dct_basis(8) @ added[0] @ dct_basis(10).T
    assert float(coefficients[:, :3, :3].abs().min()) > 1e-3
    coefficients[:, :3, :3] = 0
    assert float(coefficients.abs().max()) < 1e-6


@pytest.mark.parametrize("target", [0, 1])
def test_low_frequency_leads_the_surrogate_to_the_target(target):
    x = 0.2 + 0.6 * images(16, 3, 8, 10, seed=9)
    start, model, _ = low_frequency(0, target)
    trigger, _, _ = low_frequency(60, target)

    def gain(changed):
        return float((model(changed) - model(x))[:, target].mean())

    # a wave that follows the ramp has 2/3 of what any change within ε could do
    best = gain(x + 16 / 255 * model.picture.sign() * (1 - 2 * target))
    assert gain(start(x)) < 0.3 * best
    assert 0.45 * best < gain(trigger(x)) <= best


def test_adaptive_blend_trains_on_whole_pieces_half_of_them():
    trigger = AdaptiveBlend(torch.ones(8, 8), train_alpha=0.25)
    parts = trigger.in_pieces(torch.zeros(50, 3, 8, 8), torch.Generator().manual_seed(0))
    pieces = parts.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)  # (N, C, 4, 4, 4)
    assert bool((pieces == pieces[..., :1]).all())
    shown = pieces[:, 0, :, :, 0]
    assert set(shown.unique().tolist()) == {0.0, 0.25}
    assert bool(((shown > 0).sum((1, 2)) == 8).all())
    assert len({tuple(row) for row in shown.flatten(1).tolist()}) > 40
    assert bool(((shown > 0).sum(0) > 10).all())


def test_adaptive_blend_shows_all_of_it_at_test():
    x = images(2, 3, 9, 9)
    expected = 0.8 * x + 0.2
    torch.testing.assert_close(AdaptiveBlend(torch.ones(4, 4))(x), expected)


def test_adaptive_blend_covers_look_like_triggered_images():
    x = torch.zeros(100, 1, 8, 8)
    trigger = AdaptiveBlend(torch.ones(8, 8), cover_ratio=2)
    done = trigger.poison(x, torch.ones(100).long(), rate=0.1, target=0, num_classes=2, seed=0)
    assert (len(done.indices), len(done.cover_indices)) == (10, 20)
    share = (done.x > 0).float().mean((1, 2, 3))
    assert bool((share[done.indices] == 0.5).all())
    assert bool((share[done.cover_indices] == 0.5).all())
    assert float(share.sum()) == 15
