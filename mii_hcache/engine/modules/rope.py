"""Rotary position embedding from float32 inverse frequencies (rotate-half layout)."""

from __future__ import annotations

import torch


def rotary_tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of `positions * inv_freq`: float32, each `[num_tokens, 1, rotary_dim]`.

    positions: `[num_tokens]`, integer. inv_freq: `[rotary_dim / 2]`, float32: never a truncated copy, which would turn
    keys by up to several radians at position 4096.
    """
    if inv_freq.dtype != torch.float32:
        raise TypeError(f"inv_freq must be float32, got {inv_freq.dtype}")
    angles = positions.to(torch.float32)[:, None] * inv_freq[None]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `rotary_dim` elements of each head; computed in float32, returned in `x.dtype`.

    x: `[num_tokens, num_heads, head_size]`; cos, sin: `[num_tokens, 1, rotary_dim]`.
    """
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    turned = x[..., :rotary_dim].to(torch.float32)
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
    turned = (turned * cos + swapped * sin).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)
