"""Keys -> smoothed self-information of each token.

Shapes: B batch, N tokens in raster order, C channels, J filter taps.

Everything here stays in fp32 (fp64 for fp64 input) whatever autocast says: the clusters follow from the sign of
second differences of numbers near 0.01, which half precision and TF32 would flip. The filters are sums of shifted
copies for that reason, since a convolution may run in TF32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enact.sums import linear_of_sum

# The released code adds this to every probability, so that its logarithm is finite (spec 2.2).
PROBABILITY_FLOOR = 1e-8

# The logit of a token whose probability is 0: finite, and so in fp32 and fp64 alike.
LOWEST = torch.finfo(torch.float32).min


def gaussian_taps(sigma: float) -> Tensor:
    """Samples of the normal density at -M ... M, M = 3 sigma - 1, not renormalised (spec 2.3).

    Args:
        sigma: standard deviation in tokens, above 1/3. A half-integer gives an even number of taps.

    Returns:
        (J,) float32.
    """
    reach = 3 * sigma - 1
    if not reach > 0:
        raise ValueError(f"smoothing_sigma must be above 1/3 token, got {sigma}")
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return (torch.exp(-(offsets**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))).float()


def filter_tokens(sequence: Tensor, taps: Tensor) -> Tensor:
    """Correlate a sequence (B, N) with `taps` (J,), zero outside; the result has the same length."""
    left = (len(taps) - 1) // 2
    padded = F.pad(sequence, (left, len(taps) - 1 - left))
    return (padded.unfold(1, len(taps), 1) * taps).sum(-1)


def self_information(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """-p log2 p with p the softmax of `logits` over the real tokens of each image (spec 2.2).

    Args:
        logits: (B, N).
        real: (B, N) bool, False where a token is padding; None: every token is real.

    Returns:
        (B, N) in bits, 0 at padding.
    """
    if real is not None:
        logits = logits.masked_fill(~real, LOWEST)
    # A tensor, since the ONNX exporter's optimizer drops the addition of so small a number.
    probability = logits.softmax(1) + torch.full_like(logits, PROBABILITY_FLOOR)
    information = -probability * probability.log2()
    return information if real is None else information * real


class Information(nn.Module):
    """Learned self-information of each token, smoothed along the token sequence.

    Args:
        embed_dim: channels C of the keys.
        smoothing_sigma: standard deviation of the Gaussian filter, in tokens.
    """

    gaussian: Tensor

    def __init__(
        self,
        embed_dim: int,
        smoothing_sigma: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.smoothing_sigma = smoothing_sigma
        self.probability = nn.Linear(embed_dim, 1, device=device, dtype=dtype)
        self.register_buffer("gaussian", gaussian_taps(smoothing_sigma).to(device), persistent=False)

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Xavier times `gain`; 1 as the released code (spec 3.3, item 21)."""
        nn.init.xavier_uniform_(self.probability.weight, gain)
        nn.init.zeros_(self.probability.bias)

    def logits(self, keys: Tensor, addend: Tensor | None = None) -> Tensor:
        """Keys (B, N, C) -> the logit of each token's probability (B, N), float32 or float64.

        Or keys (S, C) plus `addend` (S, C) -> (S,).
        """
        dtype = torch.promote_types(self.probability.weight.dtype, torch.float32)
        with torch.autocast(keys.device.type, enabled=False):
            keys, addend = keys.to(dtype), None if addend is None else addend.to(dtype)
            weight, bias = self.probability.weight.to(dtype), self.probability.bias.to(dtype)
            return linear_of_sum(keys, addend, weight, bias).squeeze(-1)

    def forward(self, logits: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits -> smoothed self-information.

        Args:
            logits: (B, N), the real tokens of an image first, in raster order.
            real: (B, N) bool, True for the real tokens; None: all.

        Returns:
            (B, N) in bits, 0 at padding.
        """
        with torch.autocast(logits.device.type, enabled=False):
            smoothed = filter_tokens(self_information(logits, real), self.gaussian.to(logits.dtype))
        return smoothed if real is None else smoothed * real
