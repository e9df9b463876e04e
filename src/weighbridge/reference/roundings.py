"""What quantization does to a weight matrix, emulated: round to nearest on the grid of a format, and back to floats.

These are the round-to-nearest forms. Formats that are fitted to calibration data (AWQ, GPTQ) round differently and
have to be served to be recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

E4M3_LARGEST = 448.0
# The 16 levels of NormalFloat4 (Dettmers et al. 2023, QLoRA, appendix E).
NF4_LEVELS = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip
# E2M1, the element of MXFP4 (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1_LEVELS = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True)
class Rounding:
    """One way of rounding a matrix.

    Attributes
    ----------
    name : str
        As a spec names it.
    code_bits : int
        Bits of each weight's code.
    group : int or None
        How many weights of a row share a scale; None for the whole row (one scale for each output channel).
    shared_bits : int
        Bits that each group holds besides: its scale and, where there is one, its zero point.
    apply : callable
        From a matrix of shape (outputs, inputs) to its rounded values, same shape.
    """

    name: str
    code_bits: int
    group: int | None
    shared_bits: int
    apply: Callable[[Matrix], Matrix]

    def bits_per_weight(self, inputs: int) -> float:
        """Bits that a weight of a row of so many inputs really holds, its share of the scale included."""
        groups = 1 if self.group is None else -(-inputs // self.group)
        return self.code_bits + self.shared_bits * groups / inputs


def _in_groups(values: Matrix, group: int | None, rounded: Callable[[Matrix], Matrix]) -> Matrix:
    """Apply a rounding to the groups of each row; the last group of a row may be shorter than the others."""
    rows, columns = values.shape
    size = group or columns
    # A zero changes neither the largest absolute value nor a range that holds zero.
    padded = np.pad(values, ((0, 0), (0, -columns % size)))
    whole = rounded(padded.reshape(rows, -1, size)).reshape(rows, -1)
    return np.ascontiguousarray(whole[:, :columns], np.float32)


def _scale(largest: Matrix) -> Matrix:
    """A scale as it is stored, in 16 bits; 1 where a group is all zero."""
    stored = largest.astype(np.float16).astype(np.float32)
    return np.where(stored == 0, np.float32(1), stored)


def _symmetric(bits: int, group: int | None) -> Rounding:
    top = 2 ** (bits - 1) - 1

    def rounded(grouped: Matrix) -> Matrix:
        scale = _scale(np.abs(grouped).max(axis=2, keepdims=True) / top)
        return np.asarray(np.clip(np.round(grouped / scale), -top - 1, top) * scale)

    name = f"int{bits}" + (f"-g{group}" if group else "")
    return Rounding(name, bits, group, 16, lambda values: _in_groups(values, group, rounded))


def _asymmetric(bits: int, group: int) -> Rounding:
    top = 2**bits - 1

    def rounded(grouped: Matrix) -> Matrix:
        low = np.minimum(grouped.min(axis=2, keepdims=True), 0)
        scale = _scale((np.maximum(grouped.max(axis=2, keepdims=True), 0) - low) / top)
        zero = np.clip(np.round(-low / scale), 0, top)
        codes = np.clip(np.round(grouped / scale) + zero, 0, top)
        return np.asarray((codes - zero) * scale)

    return Rounding(
        f"int{bits}-asym-g{group}", bits, group, 16 + bits, lambda values: _in_groups(values, group, rounded)
    )


def _per_tensor(rounding: Rounding) -> Rounding:
    """The same rounding with one scale for a whole matrix."""
    return Rounding(
        f"{rounding.name}-tensor", rounding.code_bits, None, 0,
        lambda values: rounding.apply(values.reshape(1, -1)).reshape(values.shape),
    )  # fmt: skip


def _nearest(scaled: Matrix, levels: Matrix) -> Matrix:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)]


def _nf4(group: int) -> Rounding:
    def rounded(grouped: Matrix) -> Matrix:
        scale = _scale(np.abs(grouped).max(axis=2, keepdims=True))
        return np.asarray(_nearest(grouped / scale, NF4_LEVELS) * scale)

    return Rounding(f"nf4-g{group}", 4, group, 16, lambda values: _in_groups(values, group, rounded))


def _mxfp4(grouped: Matrix) -> Matrix:
    """Elements of E2M1 with a power of two as each block's scale (OCP MX 1.0, section 6.3)."""
    largest = np.abs(grouped).max(axis=2, keepdims=True)
    scale = np.exp2(np.floor(np.log2(np.where(largest == 0, 1, largest))) - 2)
    return np.asarray(_nearest(np.clip(grouped / scale, -6, 6), E2M1_LEVELS) * scale)


def _e4m3(values: Matrix) -> Matrix:
    """8-bit floats with 4 exponent and 3 mantissa bits, largest 448, one scale for each row."""
    scale = np.abs(values).max(axis=1, keepdims=True) / E4M3_LARGEST
    scaled = values / np.where(scale == 0, 1, scale)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    rounded = np.clip(np.round(scaled / step) * step, -E4M3_LARGEST, E4M3_LARGEST)
    return np.asarray(rounded * scale, np.float32)


_GROUPS = (32, 64, 128)
_INT8, _FP8 = _symmetric(8, None), Rounding("fp8-e4m3", 8, None, 16, _e4m3)
WEIGHT_ROUNDINGS: dict[str, Rounding] = {
    rounding.name: rounding
    for rounding in (
        _INT8,
        _per_tensor(_INT8),
        _symmetric(8, 32),  # the grid of llama.cpp's Q8_0
        _FP8,
        _per_tensor(_FP8),
        _symmetric(6, 64),
        _symmetric(5, 64),
        *(_symmetric(4, group) for group in _GROUPS),
        *(_asymmetric(4, group) for group in _GROUPS),
        *(_nf4(group) for group in _GROUPS),
        Rounding("mxfp4", 4, 32, 8, lambda values: _in_groups(values, 32, _mxfp4)),
        _symmetric(3, 64),
        _asymmetric(2, 64),
    )
}
