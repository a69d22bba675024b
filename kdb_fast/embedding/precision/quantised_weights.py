"""The arithmetic of static int8: scales of channels, grids of values, rounded weights. Knows nothing of OpenVINO."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WEIGHT_ERROR = 0.25
"""Weight of the rounding error of weights beside that of activations when exponents are compared: step 4 halves it
afterwards, so its square counts a quarter."""

DAMPING = 0.01
"""Share of the mean of the diagonal added to the second moments, as in GPTQ, so that they can be inverted."""

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
    """Step of the int8 grid, −127 … 127, of each output channel. float32 [out]."""
    scale: Floats = np.maximum(np.abs(weight).max(axis=0), 1e-12).astype(np.float32) / np.float32(127)
    return scale


def output_error(rows: Floats, low: Floats, high: Floats, weight: Floats, smooth: Floats) -> float:
    """Squared error of the layer's output over ``rows`` with nearest rounding."""
    step, zero = activation_grid(low / smooth, high / smooth)
    rows, weight = rows / smooth, weight * smooth[:, None]
    scale = weight_scale(weight)
    activation_error = (np.clip(np.round(rows / step) + zero, 0, 255) - zero) * step - rows
    weight_error = np.round(weight / scale) * scale - weight
    return float(((activation_error @ weight) ** 2).sum() + WEIGHT_ERROR * ((rows @ weight_error) ** 2).sum())


def round_weights(weight: Floats, moments: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    """GPTQ: round one input channel after the other; those that follow make good for the error. int8 [in, out].

    Args:
        weight: float32 [in, out].
        moments: Second moments of the layer's inputs, float32 [in, in].
        scale: Step of the grid of each output channel, float32 [out].
    """
    block, inputs = 64, len(weight)
    order = np.argsort(-np.diag(moments), kind="stable")  # the most used channels first: they get the freest choice
    rest: Doubles = weight[order].astype(np.float64)
    hessian: Doubles = moments[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diag(hessian).copy()
    hessian[np.diag_indices(inputs)] += DAMPING * diagonal.mean() + (diagonal == 0) + 1e-12
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    result = np.empty(weight.shape, np.int8)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            rounded = np.clip(np.round(rest[i] / scale), -127, 127)
            result[order[i]] = rounded
            errors[i - start] = (rest[i] - rounded * scale) / upper[i, i]
            rest[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    return result
