"""The rotary arithmetic of DeepSpeed's kernel, step by step, and what it is off by.

`kv_rotary_pos_kernel` runs a block for each query head and turns that head's queries; the block of the first head of a
group turns K as well, and writes K and V. Where the frequencies come from:

    given (`inv_freq`)              float32, both branches: angle = inv_freq * position, in float32
    made, first head of a group     T(1.0 / powf(theta, 2i / rotary_dim)), back to float32, * position, in float32;
                                    T is the model's 16-bit type; used for that head's Q and for K
    made, other heads of a group    1.0 / powf(theta, 2i / rotary_dim) * position, in float64, rounded to float32

So with K and V for each head (groups of one) Q and K share the truncation; with grouped queries all heads but one of a
group turn Q by other frequencies than K. The product of a float and a T is rounded once, as float32 is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""Values of any precision, held in float64."""

_MANTISSA_BITS = {"float16": 11, "bfloat16": 8}
_LEAST_EXPONENT = {"float16": -13, "bfloat16": -125}
"""Of the least normal number, as `frexp` counts; below it the steps stay as they are."""


def rounded(x: Floats, dtype: str) -> Floats:
    """To the nearest value of a 16-bit type, ties to even; denormals as the types have them."""
    _, exponent = np.frexp(x)
    step = np.maximum(exponent, _LEAST_EXPONENT[dtype]) - _MANTISSA_BITS[dtype]
    return np.ldexp(np.rint(np.ldexp(x, -step)), step)


def float32(x: Floats) -> Floats:
    """Rounded to float32."""
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def true_frequencies(theta: float, head_size: int) -> Floats:
    """`[head_size / 2]`, in float64."""
    return theta ** -(np.arange(head_size // 2) * 2 / head_size)


def _powers(theta: float, head_size: int) -> Floats:
    """powf of the kernel, as if it were rounded correctly (under fast math it is not)."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    return float32(np.float64(theta) ** exponents.astype(np.float64))


def made_frequencies(theta: float, head_size: int, dtype: str) -> Floats:
    """What the kernel makes for K, and for Q of the first head of a group: `[head_size / 2]`."""
    return rounded(1.0 / _powers(theta, head_size), dtype)


def given_frequencies(theta: float, head_size: int) -> Floats:
    """What our modules use, and what `kv_trained_rotary_embeddings` is given: `[head_size / 2]`, float32."""
    return float32(1.0 / _powers(theta, head_size))


def angles(frequencies: Floats, position: int | Floats) -> Floats:
    """`frequencies * position` as the kernel's float32 product."""
    return float32(np.multiply.outer(np.asarray(position, dtype=np.float64), frequencies))


def other_head_angles(theta: float, head_size: int, position: int | Floats) -> Floats:
    """Of Q in the other heads of a group: a float64 expression that is rounded when it is stored."""
    return float32(np.multiply.outer(np.asarray(position, dtype=np.float64), 1.0 / _powers(theta, head_size)))


def fast_sine_angles(angle: Floats) -> Floats:
    """The angle whose sine the GPU's own instruction takes: in turns, the product with 1 / (2 pi) rounded to float32.
    A model: the instruction's own error, about 2^-21, comes on top."""
    return float32(angle * float32(np.float64(1 / (2 * np.pi)))) * (2 * np.pi)


def rotated(x: Floats, angle: Floats) -> Floats:
    """x: `[..., head_size]`, in halves; angle: `[..., head_size / 2]`."""
    low, high = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def kernel_angles(theta: float, head_size: int, dtype: str, position: int | Floats) -> Floats:
    """Of K, and of Q in the first head of a group."""
    return angles(made_frequencies(theta, head_size, dtype), position)


def kept_score(turned: Floats, true: Floats) -> float:
    """Of the score between a query and a key that match at their distance (the true turn undone, they are equal), the
    expected share that is left when the phases between them are `turned`; all dimensions weigh the same."""
    return float(np.mean(np.cos(turned - true)))
