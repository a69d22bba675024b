"""The arithmetic of static int8: scales of channels, grids of values, rounded weights. Knows nothing of OpenVINO."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WEIGHT_ERROR = 0.25
"""Weight of the rounding error of weights beside that of activations when exponents are compared: step 4 halves it
afterwards, so its square counts a quarter."""

DAMPING = 0.01
"""Share of the mean of the diagonal added to the second moments, as in GPTQ, so that they can be inverted."""

LARGEST = 127
"""Of a weight in int8."""

PAIR = 128
"""Most that two neighbouring weights of one sign may be together, as int8.

Without VNNI, kernels for x86 multiply two neighbouring channels each by ``vpmaddubsw``, which adds both products in 16
bits: 255 · 128 is just within them. So the result is exact; weights of 7 bits, the usual answer, would be 64 at most.
"""

BLOCK = 64
"""Channels that are rounded before the errors of all others are looked at again, by one product."""

NOTHING = np.zeros(1, np.int16)

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def smoothing(low: Floats, high: Floats, weight: Floats, alpha: float) -> Floats:
    """SmoothQuant's divisor of each input channel; its geometric mean is 1. float32 [in]."""
    activation = np.maximum(np.maximum(-low, high), 1e-5)
    result = activation**alpha / np.maximum(np.abs(weight).max(axis=1), 1e-5) ** (1 - alpha)
    scaled: Floats = (result / np.exp(np.log(result).mean())).astype(np.float32)
    return scaled


def activation_grid(low: Floats, high: Floats) -> tuple[np.float32, np.float32]:
    """(step, zero point) of uint8 values that cover all channels; 0.0 is one of them exactly."""
    smallest, largest = min(0.0, float(low.min())), max(0.0, float(high.max()))
    step = np.float32(max(largest - smallest, 1e-6) / 255)
    return step, np.float32(np.round(-smallest / step))


def weight_scale(weight: Floats) -> Floats:
    """Step of the int8 grid of each output channel, in which no weight and no PAIR goes beyond its bound. float32
    [out]."""
    largest = np.abs(weight).max(axis=0) / LARGEST
    even = np.pad(weight, ((0, len(weight) % 2), (0, 0)))
    pairs = [np.maximum(sign * even, 0) for sign in (1, -1)]
    of_pairs = np.max([(part[::2] + part[1::2]).max(axis=0) for part in pairs], axis=0) / PAIR
    scale: Floats = np.maximum(np.maximum(largest, of_pairs), 1e-12).astype(np.float32)
    return scale


def output_error(rows: Floats, low: Floats, high: Floats, weight: Floats, smooth: Floats) -> float:
    """Squared error of the layer's output over ``rows`` with nearest rounding, about: as if the errors of no two
    channels went together. So it takes no product of matrices; the exponents chosen are as good."""
    step, zero = activation_grid(low / smooth, high / smooth)
    rows, weight = rows / smooth, weight * smooth[:, None]
    scale = weight_scale(weight)
    activation_error = (np.clip(np.round(rows / step) + zero, 0, 255) - zero) * step - rows
    weight_error = np.round(weight / scale) * scale - weight
    return float(
        _squares(activation_error) @ _squares(weight.T) + WEIGHT_ERROR * (_squares(rows) @ _squares(weight_error.T))
    )


def _squares(matrix: Floats) -> Floats:
    """Sum of the squares of each column."""
    sums: Floats = np.einsum("ij,ij->j", matrix, matrix)
    return sums


def round_weights(weight: Floats, moments: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    """GPTQ: round one input channel after the other; those that follow make good for the error. int8 [in, out].

    No PAIR goes beyond its bound.

    The error of the output is that of a triangular matrix times the errors of the weights, a factor of the second
    moments. Its last row shows one channel alone, the one before it two, and so on: from there on each channel is
    rounded where the errors of those already rounded leave its row least. (So the moments need not be inverted, as
    GPTQ is usually written; the integers are the same.)

    Args:
        weight: float32 [in, out].
        moments: Second moments of the layer's inputs, float32 [in, in].
        scale: Step of the grid of each output channel, float32 [out].
    """
    inputs = len(weight)
    order = np.argsort(-np.diag(moments), kind="stable")[::-1]  # the most used last: they get the freest choice
    hessian: Doubles = moments[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diag(hessian).copy()
    hessian[np.diag_indices(inputs)] += DAMPING * diagonal.mean() + (diagonal == 0) + 1e-12
    factor = np.linalg.cholesky(hessian)
    # Column i: how much of the errors of the channels behind it channel i makes good.
    share: Floats = (factor / np.diag(factor)).astype(np.float32)
    exact: Floats = weight[order] / scale
    errors = np.zeros_like(exact)
    result = np.zeros(weight.shape, np.int8)
    for stop in range(inputs, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        wanted = exact[start:stop] + share[stop:, start:stop].T @ errors[stop:]
        for i in range(stop - 1, start - 1, -1):
            place = order[i]
            value = wanted[i - start] + share[i + 1 : stop, i] @ errors[i + 1 : stop]
            beside = result[place ^ 1] if place ^ 1 < inputs else NOTHING
            least = np.maximum(-LARGEST, -PAIR - np.minimum(beside, NOTHING))
            most = np.minimum(LARGEST, PAIR - np.maximum(beside, NOTHING))
            rounded = np.clip(np.rint(value), least, most)
            result[place] = rounded
            errors[i] = exact[i] - rounded
    return result
