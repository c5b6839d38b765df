"""Compiled inner loops (numba) for what merges do most: count magnitudes, and TIES.

They compute what `thresholds` and `rules` compute in torch, operation for operation and in the same order, so that both
give the same bits; they read bf16 and float32 where it lies and keep a block of entries in a core's cache. Each loop
goes over few arrays: the compiler gives up on vectors where it would have to check many pairs of them for overlap.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 2048  # entries: what a few branches need of them stays in a core's cache, and calls cost little beside them
DELTA, BF16, F32, NOTHING = 0, 1, 2, 3  # what memory holds: float32 differences, a model's own values, no change at all


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _widened(context: Any, half: Any) -> Any:
    """The float32 of a bf16's bits, in one step: numba's own integers would grow to 64 bits on the way."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic  # type: ignore[untyped-decorator]
def _key(context: Any, value: Any) -> Any:
    """The bits of a float32's magnitude, as an integer in the same order."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.and_(bits, ir.Constant(ir.IntType(32), 0x7FFFFFFF))

    return types.int32(types.float32), build


_fast = {"nogil": True, "cache": True, "error_model": "numpy"}
# For sums in any order: statistics, never results. Counts of a block are kept in float32, which adds in vectors.
_loose = {**_fast, "fastmath": {"reassoc", "contract"}}


@numba.njit(**_fast)
def _values(address, kind, start, count, out):  # type: ignore[no-untyped-def]
    """`count` values from `start` on, as float32."""
    if kind == BF16:
        half = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out[i] = _widened(half[i])
    else:
        full = numba.carray(_pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            out[i] = full[i]


@numba.njit(**_fast)
def _difference(address, kind, base, base_kind, start, count, out, scratch):  # type: ignore[no-untyped-def]
    """A branch's entries minus the base's, float32."""
    if kind == NOTHING:
        for i in range(count):
            out[i] = np.float32(0)
    elif kind == BF16 and base_kind == BF16:
        half = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        plain = numba.carray(_pointer(base + 2 * start), count, np.uint16)
        for i in range(count):
            out[i] = _widened(half[i]) - _widened(plain[i])
    else:
        _values(address, kind, start, count, out)
        if kind != DELTA:
            _values(base, base_kind, start, count, scratch)
            for i in range(count):
                out[i] -= scratch[i]


@numba.njit(**_loose)
def _marked(values, bottom, top, marks, count):  # type: ignore[no-untyped-def]
    """Mark the entries whose key lies in bottom..top; returns how many lie above."""
    above = np.float32(0)
    for i in range(count):
        key = _key(values[i])
        marks[i] = (key >= bottom) & (key <= top)
        above += np.float32(1) if key > top else np.float32(0)
    return above


@numba.njit(**_fast)
def count_keys(address, kind, base, base_kind, entries, low, high, inside):  # type: ignore[no-untyped-def]
    """Write the keys in low..high to `inside` (int32, one longer than entries).

    Returns (how many keys lie above, how many were written).
    """
    values, scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    marks = np.zeros(BLOCK, np.uint8)
    eights = marks.view(np.uint64)  # few entries are marked: look for them eight at a time
    above = 0
    inside_count = 0
    for start in range(0, entries, BLOCK):
        count = min(BLOCK, entries - start)
        _difference(address, kind, base, base_kind, start, count, values, scratch)
        above += np.int64(_marked(values, np.int32(low), np.int32(high), marks, count))
        marks[count:] = 0
        for eight in range(BLOCK // 8):
            if eights[eight] != 0:
                for i in range(8 * eight, 8 * eight + 8):  # no branch: which of the eight is marked can't be foretold
                    inside[inside_count] = _key(values[i])
                    inside_count += np.int64(marks[i])
    return above, inside_count


@numba.njit(**_fast)
def sample_keys(address, kind, base, base_kind, starts, length, out):  # type: ignore[no-untyped-def]
    """The keys of runs of `length` <= BLOCK entries from each of `starts`, run after run, into `out` (int32)."""
    values, scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for run in range(len(starts)):
        _difference(address, kind, base, base_kind, starts[run], length, values, scratch)
        for i in range(length):
            out[run * length + i] = _key(values[i])


@numba.njit(**_loose)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(BLOCK):
        total += a[i] * b[i]
    return total


# A block's sums lie in one array, at these places: within one array the compiler knows how far they are apart, where
# for several it would check every pair of them for overlap before each loop.
TOTAL, MERGED, SHARE, SIGNS, WORK = 0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK
NEGATIVE = 1024  # SIGNS counts branches with a positive entry, and this many for each with a negative one


@numba.njit(**_fast)
def _trim(row, cut, weight, work):  # type: ignore[no-untyped-def]
    """Zero what lies below the cut, and add what is left, times its weight, to the total."""
    for i in range(BLOCK):
        row[i] = row[i] if abs(row[i]) >= cut else np.float32(0)
        work[TOTAL + i] += row[i] * weight


@numba.njit(**_loose)
def _nonzero(row):  # type: ignore[no-untyped-def]
    kept = np.float32(0)
    for i in range(BLOCK):
        kept += np.float32(1) if row[i] != 0 else np.float32(0)
    return kept


@numba.njit(**_fast)
def _agreeing(row, weight, work):  # type: ignore[no-untyped-def]
    """Add the entries that have the total's sign to the merged sum, and their weight to its share; count weighted signs."""
    nothing = np.float32(0)
    for i in range(BLOCK):
        weighted = row[i] * weight
        agrees = (weighted > 0) if work[TOTAL + i] >= 0 else (weighted < 0)
        work[MERGED + i] += weighted if agrees else nothing
        work[SHARE + i] += weight if agrees else nothing
        work[SIGNS + i] += np.float32(1) if weighted > 0 else (np.float32(NEGATIVE) if weighted < 0 else nothing)


@numba.njit(**_loose)
def _several(work):  # type: ignore[no-untyped-def]
    """How many entries two branches or more keep, and how many of those have both signs."""
    contested, conflicts = np.float32(0), np.float32(0)
    for i in range(BLOCK):
        negative = np.floor(work[SIGNS + i] * np.float32(1 / NEGATIVE))
        positive = work[SIGNS + i] - negative * np.float32(NEGATIVE)
        contested += np.float32(1) if positive + negative >= 2 else np.float32(0)
        conflicts += np.float32(1) if min(positive, negative) > 0 else np.float32(0)
    return contested, conflicts


@numba.njit(**_fast)
def ties_block(deltas, cuts, weights, scale, merged, work, counts):  # type: ignore[no-untyped-def]
    """TIES on one block of float32 differences (k, BLOCK), trimmed in place; `work` is scratch (WORK,); k < NEGATIVE.

    Adds to counts (k + 2,): entries kept per branch, contested, conflicts.
    """
    k = deltas.shape[0]
    work[:] = np.float32(0)
    for b in range(k):
        _trim(deltas[b], cuts[b], weights[b], work)
        counts[b] += np.int64(_nonzero(deltas[b]))
    for b in range(k):
        _agreeing(deltas[b], weights[b], work)
    contested, conflicts = _several(work)
    for i in range(BLOCK):
        share = work[SHARE + i]
        merged[i] = scale * (work[MERGED + i] / share if share != 0 else np.float32(0))
    counts[k] += np.int64(contested)
    counts[k + 1] += np.int64(conflicts)


@numba.njit(**_loose)
def _not_finite(values, count):  # type: ignore[no-untyped-def]
    bad = np.float32(0)
    for i in range(count):
        bad += np.float32(1) if _key(values[i]) >= 0x7F800000 else np.float32(0)
    return bad


@numba.njit(**_fast)
def _round_to_bf16(values, count):  # type: ignore[no-untyped-def]
    """float32 values -> the nearest bf16's, the even one of two; still float32."""
    bits = values.view(np.uint32)
    for i in range(count):
        bits[i] += np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
        bits[i] &= np.uint32(0xFFFF0000)


@numba.njit(**_fast)
def _draw_to_bf16(values, count, place):  # type: ignore[no-untyped-def]
    """The same, up or down by `rounding.draws`; `place` is the first entry's, with the tensor's seed."""
    bits = values.view(np.uint32)
    for i in range(count):
        x = np.uint64(place + i) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        up = bits[i] + np.uint32((x >> np.uint64(8)) & np.uint64(0xFFFF))
        if bits[i] & np.uint32(0x7F800000) != np.uint32(0x7F800000):
            bits[i] = up
        bits[i] &= np.uint32(0xFFFF0000)


@numba.njit(**_fast)
def _store(values, count, out, out_kind, start):  # type: ignore[no-untyped-def]
    """Write float32 values, as bf16 where they have been rounded to it."""
    bits = values.view(np.uint32)
    if out_kind == BF16:
        half = numba.carray(_pointer(out + 2 * start), count, np.uint16)
        for i in range(count):
            half[i] = np.uint16(bits[i] >> np.uint32(16))
    else:
        full = numba.carray(_pointer(out + 4 * start), count, np.uint32)
        for i in range(count):
            full[i] = bits[i]


@numba.njit(**_loose)
def _compare(base, merged, written, count):  # type: ignore[no-untyped-def]
    """What was written, set against what was merged: squared error, inner product, entries changed, and left as they were."""
    error, along, changed, stayed = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(count):
        change = written[i] - base[i]
        error += (change - merged[i]) * (change - merged[i])
        along += change * merged[i]
    for i in range(count):  # one loop for all of it is no longer done in vectors
        changed += np.float32(1) if merged[i] != 0 else np.float32(0)
    for i in range(count):
        stayed += np.float32(1) if (merged[i] != 0) & (written[i] == base[i]) else np.float32(0)
    return error, along, changed, stayed


@numba.njit(**_fast)
def ties(  # type: ignore[no-untyped-def]
    addresses,
    kinds,
    base,
    base_kind,
    entries,
    cuts,
    weights,
    scale,
    out,
    out_kind,
    at_random,
    place,
    gram,
    sums,
    counts,
):
    """TIES over `entries`; writes the merged model to the memory at `out`, bf16 or float32, or (DELTA) the merged delta.

    at_random: whether bf16 is rounded by draws; place: the first entry's, with the tensor's seed. Adds to gram (k, k): inner
    products; to sums (3,): squared norms of the merged delta and of rounding's error, and the inner product of the delta
    with the written change; to counts (k + 5,): kept per branch, contested, conflicts, values of the output that are not
    finite, entries changed, entries written as the base has them.
    """
    k = len(addresses)
    deltas, merged = np.empty((k, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    work, values, scratch = np.empty(WORK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, entries, BLOCK):
        count = min(BLOCK, entries - start)
        for b in range(k):
            _difference(addresses[b], kinds[b], base, base_kind, start, count, deltas[b], scratch)
            deltas[b, count:] = np.float32(0)
            for c in range(b + 1):
                gram[b, c] += _dot(deltas[b], deltas[c])
        ties_block(deltas, cuts, weights, scale, merged, work, counts)
        sums[0] += _dot(merged, merged)
        if out_kind == DELTA:
            _store(merged, count, out, out_kind, start)
            counts[k + 2] += np.int64(_not_finite(merged, count))
            continue
        _values(base, base_kind, start, count, values)
        for i in range(count):
            scratch[i] = values[i] + merged[i]
        if out_kind == BF16:
            if at_random:
                _draw_to_bf16(scratch, count, place + start)
            else:
                _round_to_bf16(scratch, count)
        _store(scratch, count, out, out_kind, start)
        error, along, changed, stayed = _compare(values, merged, scratch, count)
        if not np.isfinite(error):  # of values that are not, or of squares too large: look
            counts[k + 2] += np.int64(_not_finite(scratch, count))
        sums[1] += error
        sums[2] += along
        counts[k + 3] += np.int64(changed)
        counts[k + 4] += np.int64(stayed)


def tried() -> bool:
    """Call each kernel as `compiled` calls it, which compiles it, on a few numbers; returns whether the outcome is right."""
    base, out = np.zeros(4, np.float32), np.empty(4, np.float32)
    deltas = np.array([[3, 1, -2, 0], [1, -1, -4, 0]], np.float32)
    keys, inside = np.zeros((1, 4), np.int32), np.empty(5, np.int32)
    first, lying, written = deltas[0].ctypes.data, base.ctypes.data, out.ctypes.data
    one = int(np.float32(1).view(np.int32))
    counted = count_keys(first, DELTA, lying, F32, 4, one, one, inside)
    sample_keys(first, DELTA, lying, F32, np.array([0]), 4, keys[0])
    ties(
        np.array([row.ctypes.data for row in deltas]),
        np.array([DELTA, DELTA]),
        lying,
        F32,
        4,
        np.zeros(2, np.float32),
        np.ones(2, np.float32),
        np.float32(1),
        written,
        F32,
        False,
        np.int64(0),
        np.zeros((2, 2)),
        np.zeros(3),
        np.zeros(7, np.int64),
    )
    right = np.array_equal(keys[0], np.abs(deltas[0]).view(np.int32)) and out.tolist() == [2, 1, -3, 0]
    return right and tuple(counted) == (2, 1) and int(inside[0]) == one
