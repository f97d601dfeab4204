"""Fisher diagonals in 8 bits: what is stored, how far it is off, and which memory it follows."""

from __future__ import annotations

import pytest
import torch

from bdu.quantization import BLOCK, dequantize, quantize

KINDS = ("square_root", "logarithmic")


def fisher_like(*shape: int, octaves: float = 6.0) -> torch.Tensor:
    """Squares of normal numbers times a lognormal factor: a Fisher's shape, in short."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(*shape, generator=generator)
    return gradients.square() * (octaves * torch.rand(*shape, generator=generator)).exp2() * 1e-6


def scales_of(quantized, like: torch.Tensor) -> torch.Tensor:
    return quantized.scale.float().repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def test_the_scale_is_the_least_bfloat16_that_is_not_below_the_largest_entry():
    fisher = fisher_like(32 * 100).view(100, 32)
    scale = quantize(fisher, "square_root").scale
    top = fisher.amax(1)
    assert scale.dtype == torch.bfloat16
    below = (scale.view(torch.int16) - 1).view(torch.bfloat16)
    assert (scale.float() >= top).all()
    assert (below.float() < top).all()


def test_an_entry_of_the_square_root_map_is_off_by_half_a_step_of_its_root():
    fisher = fisher_like(1000, 7)
    quantized = quantize(fisher, "square_root")
    assert quantized.codes.dtype == torch.uint8
    scale = scales_of(quantized, fisher)
    error = (dequantize(*quantized).sqrt() - fisher.sqrt()).abs() / scale.sqrt()
    assert error.max() <= 0.5 / 255 + 4 * torch.finfo(torch.float32).eps


def test_an_entry_of_the_logarithmic_map_is_off_by_half_a_step_within_24_octaves():
    fisher = fisher_like(1000, 7, octaves=20)
    quantized = quantize(fisher, "logarithmic")
    assert quantized.codes.dtype == torch.int8
    back, share = dequantize(*quantized), fisher / scales_of(quantized, fisher)
    kept = share >= 2.0**-24
    half_a_step = 2 ** (12 / 254) - 1
    error = (back - fisher).abs() / fisher
    assert error[kept].max() <= half_a_step + 1e-5
    # Beyond, an entry becomes 0 or the smallest.
    assert (back[~kept] <= scales_of(quantized, fisher)[~kept] * 2.0**-23.9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_a_block_of_them_has_no_nan(kind):
    fisher = torch.zeros(100)
    fisher[70] = 3.0
    back = dequantize(*quantize(fisher, kind))
    assert torch.equal(back, fisher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", [1e-44, 1e-38, 1e38, 3.4028234e38])
def test_the_ends_of_float32_stay_finite(kind, extreme):
    back = dequantize(*quantize(torch.full((33,), extreme), kind))
    assert torch.isfinite(back).all()
    if extreme > 1e-37:  # s / 255² is subnormal below
        torch.testing.assert_close(back, torch.full((33,), extreme), rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (33,), (5, 7, 3), (4_194_304 + 5,)])
def test_any_shape_and_dtype(kind, shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fisher = torch.rand(shape).to(dtype)
        codes, scale = quantize(fisher, kind)
        assert codes.shape == shape
        assert scale.shape == (-(-fisher.numel() // BLOCK),)
        atol = 0.005 if kind == "square_root" else 0.04
        torch.testing.assert_close(dequantize(codes, scale), fisher.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_follow_the_memory_and_not_the_indices(kind):
    fisher = fisher_like(8, 6, 5, 4)
    last = fisher.to(memory_format=torch.channels_last)
    codes, scale = quantize(last, kind)
    assert codes.stride() == last.stride()
    plain = quantize(last.permute(0, 2, 3, 1).contiguous(), kind)
    assert torch.equal(scale, plain.scale)
    assert torch.equal(codes.permute(0, 2, 3, 1), plain.codes)
    assert dequantize(codes, scale).stride() == last.stride()


def test_what_cannot_be_stored_is_named():
    with pytest.raises(ValueError, match="kind: expected one of square_root, logarithmic"):
        quantize(torch.ones(3), "linear")
    with pytest.raises(ValueError, match="fisher: expected elements without gaps"):
        quantize(torch.ones(8, 4)[:, :2], "square_root")
