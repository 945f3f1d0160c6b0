"""Smoothed self-information, against the formulas of spec 2.2 and 2.3 written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from enact.information import Information, filter_tokens, gaussian_taps, self_information


@pytest.mark.parametrize(
    ("sigma", "taps", "total", "centre", "end"),
    [
        (1, 5, 0.990866, 0.398942, 0.053991),
        (2, 11, 0.994544, 0.199471, 0.008764),
        (3, 17, 0.995579, 0.132981, 0.003799),
        (5, 29, 0.996325, 0.079788, 0.001583),
        (7, 41, 0.996622, 0.056992, 0.000962),
    ],
)
def test_gaussian_has_the_published_taps(sigma: float, taps: int, total: float, centre: float, end: float) -> None:
    found = gaussian_taps(sigma)
    assert len(found) == taps
    expected = torch.tensor([total, centre, end, end])
    assert_close(torch.stack([found.sum(), found[taps // 2], found[0], found[-1]]), expected, atol=1e-6, rtol=0)


def test_half_integer_sigma_gives_the_published_even_number_of_taps() -> None:
    found = gaussian_taps(2.5)
    assert len(found) == 14
    assert_close(found, found.flip(0))


def test_a_sigma_without_taps_is_refused() -> None:
    with pytest.raises(ValueError, match="smoothing_sigma"):
        gaussian_taps(0.3)


@pytest.mark.parametrize("taps", [1, 3, 5, 14])
def test_filter_is_a_correlation_that_is_zero_outside(taps: int) -> None:
    sequence, kernel = torch.randn(2, 9), torch.randn(taps)
    left = (taps - 1) // 2
    expected = torch.zeros(2, 9)
    for n in range(9):
        for j in range(taps):
            if 0 <= n + j - left < 9:
                expected[:, n] += kernel[j] * sequence[:, n + j - left]
    assert_close(filter_tokens(sequence, kernel), expected)


def test_information_is_minus_p_log2_p_over_the_real_tokens() -> None:
    logits = torch.randn(2, 6)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = self_information(logits, real)
    for image, count in enumerate((6, 4)):
        for n in range(count):
            p = math.exp(logits[image, n]) / sum(math.exp(logits[image, m]) for m in range(count)) + 1e-8
            assert found[image, n].item() == pytest.approx(-p * math.log2(p), rel=1e-5)
    assert_close(found[1, 4:], torch.zeros(2))


def test_an_image_of_padding_alone_has_no_information_and_no_nan() -> None:
    module = Information(8)
    real = torch.tensor([[True] * 5, [False] * 5])
    found = module(module.logits(torch.randn(2, 5, 8)), real)
    assert_close(found[1], torch.zeros(5))
    assert found.isfinite().all()


def test_information_stays_in_single_precision_under_autocast() -> None:
    module, keys = Information(16), torch.randn(2, 40, 16)
    expected = module(module.logits(keys))
    with torch.autocast("cpu", torch.bfloat16):
        found = module(module.logits(keys))
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)


def test_filters_move_with_the_module_and_stay_out_of_its_state() -> None:
    module = Information(8)
    assert set(module.state_dict()) == {"probability.weight", "probability.bias"}
    assert module.to("meta").gaussian.device.type == "meta"


def test_double_precision_stays_double() -> None:
    module = Information(8).double()
    assert module(module.logits(torch.randn(1, 12, 8, dtype=torch.float64))).dtype == torch.float64
