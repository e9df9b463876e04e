"""Each way of rounding weights, against what its format allows, worked out here a second time."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from weighbridge.reference.roundings import (
    E2M1_LEVELS,
    E4M3_LARGEST,
    NF4_LEVELS,
    WEIGHT_ROUNDINGS,
    Matrix,
    Rounding,
)
from weighbridge.stats.grid import round_bfloat16

NAMES = sorted(WEIGHT_ROUNDINGS)
TENSOR = ("int8-tensor", "fp8-e4m3-tensor")  # one scale for a whole matrix
SYMMETRIC = [name for name in NAMES if name.startswith("int") and "asym" not in name]
ASYMMETRIC = [name for name in NAMES if "asym" in name]
NF4 = [name for name in NAMES if name.startswith("nf4")]
# A grid that holds its own largest value gives the same scale a second time. An asymmetric one may not: its zero point
# is rounded, so the rounded values may span one step less than the grid.
SAME_TWICE = [name for name in NAMES if name not in ASYMMETRIC]
# A scale is stored in 16 bits, so the largest value may lie this much beyond the grid's end.
STORED = 2.0**-11
E4M3_LEVELS = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
)


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    """Weights as they occur: heavy tails, rows of very different size, rows and groups of zeros, one sign only."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    # Not below: a scale that is a subnormal half float is coarser than the formats' own steps.
    sizes = 10.0 ** rng.uniform(-1.5, 2, (rows, 1))
    values = rng.standard_t(3, (rows, columns)) * sizes
    values[np.abs(values) < 1e-3 * sizes] = 0
    if draw(st.booleans()):
        values = np.abs(values)
    if draw(st.booleans()):
        values[rng.integers(rows)] = 0
    if draw(st.booleans()):
        values[:, : columns // 2] = 0
    top = np.abs(values).max(axis=1, keepdims=True)
    return np.asarray(np.where(top < 0.02, 0, values), np.float32)


def groups_of(values: Matrix, group: int | None) -> list[NDArray[np.float64]]:
    """The groups that share a scale, cut with a plain loop."""
    size = group or values.shape[1]
    return [row[i : i + size].astype(np.float64) for row in values for i in range(0, len(row), size)]


def compared(rounding: Rounding, values: Matrix) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    return list(zip(groups_of(values, rounding.group), groups_of(rounding.apply(values), rounding.group), strict=True))


def half(value: float) -> float:
    """A scale as 16 bits hold it."""
    return float(np.float16(np.float32(value)))


@pytest.mark.parametrize("name", NAMES)
@given(values=matrices())
@settings(max_examples=25, deadline=None)
def test_every_rounding_keeps_shape_dtype_zeros_and_its_argument(name: str, values: Matrix) -> None:
    before = values.copy()
    rounded = WEIGHT_ROUNDINGS[name].apply(values)
    assert rounded.shape == values.shape
    assert rounded.dtype == np.float32
    assert np.isfinite(rounded).all()
    assert np.array_equal(values, before)
    assert not rounded[~values.any(axis=1)].any()
    assert not rounded[values == 0].any()
    assert (np.sign(rounded) * np.sign(values) >= 0).all()


@pytest.mark.parametrize("name", SAME_TWICE)
@given(values=matrices())
@settings(max_examples=25, deadline=None)
def test_a_grid_that_holds_its_largest_value_rounds_to_the_same_twice(name: str, values: Matrix) -> None:
    once = WEIGHT_ROUNDINGS[name].apply(values)
    np.testing.assert_allclose(WEIGHT_ROUNDINGS[name].apply(once), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TENSOR])
@given(values=matrices())
@settings(max_examples=15, deadline=None)
def test_rows_are_rounded_alone_and_groups_that_do_not_divide_a_row_end_with_it(name: str, values: Matrix) -> None:
    rounding = WEIGHT_ROUNDINGS[name]
    whole = rounding.apply(values)
    for i in range(len(values)):
        assert np.array_equal(rounding.apply(values[i : i + 1])[0], whole[i])
    for before, after in compared(rounding, values):
        alone = rounding.apply(before.astype(np.float32)[None, :])[0]
        assert np.array_equal(alone.astype(np.float64), after)


@pytest.mark.parametrize("name", TENSOR)
@given(values=matrices())
@settings(max_examples=15, deadline=None)
def test_one_scale_for_a_matrix_is_one_scale_for_a_row_that_is_the_matrix(name: str, values: Matrix) -> None:
    whole = WEIGHT_ROUNDINGS[name].apply(values)
    row = WEIGHT_ROUNDINGS[name.removesuffix("-tensor")].apply(values.reshape(1, -1))
    assert np.array_equal(whole, row.reshape(values.shape))
    assert WEIGHT_ROUNDINGS[name].bits_per_weight(576) == 8


@pytest.mark.parametrize("name", [name for name in SYMMETRIC if name not in TENSOR])
@given(values=matrices())
@settings(max_examples=25, deadline=None)
def test_symmetric_integers_are_multiples_of_the_stored_scale_and_nearest(name: str, values: Matrix) -> None:
    rounding = WEIGHT_ROUNDINGS[name]
    top = 2 ** (rounding.code_bits - 1) - 1
    for before, after in compared(rounding, values):
        step = half(np.abs(before).max() / top) or 1.0
        codes = after / step
        assert np.array_equal(codes, np.round(codes))
        assert np.abs(codes).max() <= top + 1
        assert np.abs(after - before).max() <= step * (0.5 + 1e-5)


@pytest.mark.parametrize("name", ASYMMETRIC)
@given(values=matrices())
@settings(max_examples=25, deadline=None)
def test_asymmetric_integers_span_the_groups_range_and_miss_by_half_a_step(name: str, values: Matrix) -> None:
    rounding = WEIGHT_ROUNDINGS[name]
    top = 2**rounding.code_bits - 1
    for before, after in compared(rounding, values):
        step = half((max(before.max(), 0) - min(before.min(), 0)) / top) or 1.0
        codes = after / step
        # Where the scale lies between two halves, arithmetic of another order may take the other one.
        assert np.abs(codes - np.round(codes)).max() <= 2 * top * STORED
        codes = np.round(codes)
        assert codes.max() - codes.min() <= top
        # At the ends a scale that was rounded down leaves up to its own rounding, once for each code.
        assert np.abs(after - before).max() <= step * (0.5 + top * STORED + 1e-5)


def test_asymmetric_integers_are_nearer_than_symmetric_ones_where_all_values_have_one_sign() -> None:
    values = np.abs(np.random.default_rng(3).standard_t(5, (32, 576))).astype(np.float32)
    for group in (32, 64, 128):
        error = [
            float(np.square(WEIGHT_ROUNDINGS[name].apply(values) - values).sum())
            for name in (f"int4-asym-g{group}", f"int4-g{group}")
        ]
        assert error[0] < 0.5 * error[1]


@pytest.mark.parametrize(("name", "levels"), [*((name, NF4_LEVELS) for name in NF4), ("mxfp4", E2M1_LEVELS)])
@given(values=matrices())
@settings(max_examples=25, deadline=None)
def test_four_bit_floats_take_the_nearest_level(name: str, levels: NDArray[np.float32], values: Matrix) -> None:
    rounding = WEIGHT_ROUNDINGS[name]
    for before, after in compared(rounding, values):
        largest = np.abs(before).max()
        power = 2.0 ** (np.frexp(largest)[1] - 1 - 2) if largest else 1.0
        scale = power if name == "mxfp4" else half(largest) or 1.0
        distance = np.abs(before[:, None] - levels.astype(np.float64) * scale)
        taken = np.abs(after - before)
        assert (taken <= distance.min(axis=1) + 1e-6 * scale).all()
        assert np.abs(after[:, None] / scale - levels).min(axis=1).max() <= 1e-6


@pytest.mark.parametrize("name", NF4)
def test_nf4_levels_are_hit_exactly(name: str) -> None:
    rounding = WEIGHT_ROUNDINGS[name]
    assert rounding.group is not None
    for scale in (1.0, 0.25, half(0.0371)):
        values = np.tile(NF4_LEVELS, rounding.group // 16)[None, :] * np.float32(scale)
        assert np.array_equal(rounding.apply(values), values)


def test_mxfp4_levels_are_hit_exactly_and_its_scale_is_a_power_of_two() -> None:
    block = np.concatenate([E2M1_LEVELS, E2M1_LEVELS, [0, 0]]).astype(np.float32)
    for exponent in range(-20, 10):
        values = block[None, :] * np.float32(2.0**exponent)
        assert np.array_equal(WEIGHT_ROUNDINGS["mxfp4"].apply(values), values)
    # Not a power of two: 7 is beyond 6, the largest element at the scale 1, and is cut to it.
    assert WEIGHT_ROUNDINGS["mxfp4"].apply(np.full((1, 32), 7, np.float32))[0, 0] == 6
    assert WEIGHT_ROUNDINGS["mxfp4"].apply(np.full((1, 32), 8.5, np.float32))[0, 0] == 8


@given(values=matrices())
@settings(max_examples=40, deadline=None)
def test_fp8_takes_the_nearest_of_its_own_levels(values: Matrix) -> None:
    for before, after in compared(WEIGHT_ROUNDINGS["fp8-e4m3"], values):
        scale = np.abs(before).max() / E4M3_LARGEST or 1.0
        distance = np.abs(np.abs(before)[:, None] - E4M3_LEVELS * scale)
        assert (np.abs(after - before) <= distance.min(axis=1) + 1e-6 * scale * E4M3_LARGEST).all()
        nearest = np.abs(np.abs(after)[:, None] / scale - E4M3_LEVELS).min(axis=1)
        assert (nearest <= 1e-6 * np.maximum(np.abs(after) / scale, 1)).all()


def test_fp8_has_as_many_levels_as_its_bits_allow() -> None:
    assert len(E4M3_LEVELS) == 2**7 - 1  # one code of the positive half is NaN
    values = np.concatenate([-E4M3_LEVELS[::-1], E4M3_LEVELS])[None, :].astype(np.float32)
    assert np.array_equal(WEIGHT_ROUNDINGS["fp8-e4m3"].apply(values), values)
    ramp = np.linspace(-E4M3_LARGEST, E4M3_LARGEST, 200_001, dtype=np.float32)[None, :]
    assert len(np.unique(WEIGHT_ROUNDINGS["fp8-e4m3"].apply(ramp))) <= 2 * len(E4M3_LEVELS) - 1


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_bfloat16_is_the_nearest_with_ties_to_even(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    found = round_bfloat16(values)
    assert not (found.view(np.uint32) & 0xFFFF).any()
    for value, got in zip(values, found, strict=True):
        bits = int(np.abs(value).view(np.uint32))
        if np.isinf(value):
            assert got == value
            continue
        below = bits >> 16
        # 2**128 stands for what lies beyond the largest finite number.
        low, high = (_exact(code << 16) for code in (below, below + 1))
        exact = Fraction(float(np.abs(value)))
        up = exact - low > high - exact or (exact - low == high - exact and below % 2 == 1)
        assert int(np.abs(got).view(np.uint32)) >> 16 == below + up
        assert np.signbit(got) == np.signbit(value)


def _exact(bits: int) -> Fraction:
    return Fraction(2) ** 128 if bits == 0x7F800000 else Fraction(float(np.uint32(bits).view(np.float32)))


@pytest.mark.parametrize(
    ("name", "inputs", "bits"),
    [
        ("int8", 576, 8 + 16 / 576), ("fp8-e4m3", 576, 8 + 16 / 576), ("int8", 4096, 8 + 16 / 4096),
        ("int4-g32", 576, 4.5), ("int4-g64", 576, 4.25), ("int4-g128", 1024, 4.125),
        ("int4-asym-g32", 576, 4.625), ("int4-asym-g64", 576, 4.3125), ("int4-asym-g128", 1024, 4.15625),
        ("nf4-g64", 576, 4.25), ("mxfp4", 576, 4.25), ("int3-g64", 576, 3.25), ("int2-asym-g64", 576, 2.28125),
        ("int4-g64", 100, 4 + 16 * 2 / 100), ("int4-g128", 576, 4 + 16 * 5 / 576), ("int4-g64", 1, 20),
    ],
)  # fmt: skip
def test_bits_of_a_weight_count_its_share_of_scale_and_zero_point(name: str, inputs: int, bits: float) -> None:
    assert WEIGHT_ROUNDINGS[name].bits_per_weight(inputs) == pytest.approx(bits, abs=1e-12)


@given(inputs=st.integers(1, 20_000))
def test_larger_groups_never_hold_more_bits(inputs: int) -> None:
    for kind in ("int4-g", "int4-asym-g", "nf4-g"):
        bits = [WEIGHT_ROUNDINGS[f"{kind}{group}"].bits_per_weight(inputs) for group in (32, 64, 128)]
        assert bits == sorted(bits, reverse=True)
        assert bits[2] > 4


def test_fewer_bits_lose_more_on_weights_as_they_occur() -> None:
    values = np.random.default_rng(7).standard_t(5, (64, 576)).astype(np.float32) * np.float32(0.05)
    order = ["int8", "fp8-e4m3", "nf4-g32", "nf4-g64", "nf4-g128", "int3-g64", "int2-asym-g64"]
    errors = [float(np.square(WEIGHT_ROUNDINGS[name].apply(values) - values).mean()) for name in order]
    assert errors == sorted(errors)
    assert all(b > 1.05 * a for a, b in pairwise(errors))
