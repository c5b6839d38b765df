"""Compiled inner loops (numba, an optional extra) for what merges do most: count magnitudes, and TIES.

They compute what `thresholds` and `rules` compute in torch, operation for operation and in the same order, so that both
give the same bits; they only read bf16 and float32 in place and keep a block of entries in the first-level cache.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 512  # entries: what a few branches need of them stays in the first-level cache
DELTA, BF16, F32, NOTHING = 0, 1, 2, 3  # what memory holds: float32 differences, a model's own values, no change at all


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


_fast = {"nogil": True, "cache": True, "error_model": "numpy"}
_loose = {**_fast, "fastmath": {"reassoc", "contract"}}  # for sums in any order: statistics, never results


@numba.njit(inline="never", **_fast)
def _decode(address, kind, start, count, out):  # type: ignore[no-untyped-def]
    """`count` values from `start` on, as the bits of float32, into `out` (uint32)."""
    if kind == 1:
        half = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out[i] = np.uint32(half[i]) << np.uint32(16)
    else:
        full = numba.carray(_pointer(address + 4 * start), count, np.uint32)
        for i in range(count):
            out[i] = full[i]


@numba.njit(**_fast)
def _difference(address, kind, start, count, base, bits, out):  # type: ignore[no-untyped-def]
    """A branch's entries minus the base's, float32; `bits` is scratch."""
    if kind == 3:
        for i in range(count):
            out[i] = np.float32(0)
        return
    _decode(address, kind, start, count, bits)
    values = bits.view(np.float32)
    if kind == 0:
        for i in range(count):
            out[i] = values[i]
    else:
        for i in range(count):
            out[i] = values[i] - base[i]


@numba.njit(**_fast)
def count_keys(address, kind, base, base_kind, entries, low, high, inside):  # type: ignore[no-untyped-def]
    """Write the keys in low..high to `inside` (int32); returns (how many keys lie above, how many were written)."""
    values, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    scratch = np.empty(BLOCK, np.uint32)
    keys = values.view(np.int32)
    marks = np.empty(BLOCK, np.uint8)
    eights = marks.view(np.uint64)  # few entries are marked: look for them eight at a time
    above = 0
    found = 0
    bottom, top = np.int32(low), np.int32(high)
    for start in range(0, entries, BLOCK):
        count = min(BLOCK, entries - start)
        if kind != 0:
            _decode(base, base_kind, start, count, bits)
        _difference(address, kind, start, count, bits.view(np.float32), scratch, values)
        for i in range(count):
            values[i] = abs(values[i])
        above += np.int64(_larger(keys, top, count))
        for i in range(count):
            marks[i] = (keys[i] >= bottom) & (keys[i] <= top)
        marks[count:] = 0
        for eight in range(BLOCK // 8):
            if eights[eight] != 0:
                for i in range(8 * eight, 8 * eight + 8):
                    if marks[i]:
                        inside[found] = keys[i]
                        found += 1
    return above, found


@numba.njit(**_fast)
def sample_keys(address, kind, base, base_kind, starts, length, out):  # type: ignore[no-untyped-def]
    """The keys of runs of `length` <= BLOCK entries from each of `starts`, one run after the other, into `out` (int32)."""
    values, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    scratch = np.empty(BLOCK, np.uint32)
    keys = values.view(np.int32)
    for run in range(len(starts)):
        if kind != 0:
            _decode(base, base_kind, starts[run], length, bits)
        _difference(address, kind, starts[run], length, bits.view(np.float32), scratch, values)
        for i in range(length):
            out[run * length + i] = keys[i] & 0x7FFFFFFF


@numba.njit(**_loose)
def _dot(a, b, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += a[i] * b[i]
    return total


# Loops over few arrays each: the compiler gives up on vectors where it would have to check many pairs for overlap.
@numba.njit(**_fast)
def _trim(row, cut, weight, total, count):  # type: ignore[no-untyped-def]
    """Zero what lies below the cut, and add what is left, times its weight, to `total`."""
    for i in range(count):
        row[i] = row[i] if abs(row[i]) >= cut else np.float32(0)
        total[i] += row[i] * weight


# Counts of at most BLOCK in float32, which adds in vectors where Python's integers would not.
@numba.njit(**_loose)
def _nonzero(row, count):  # type: ignore[no-untyped-def]
    kept = np.float32(0)
    for i in range(count):
        kept += np.float32(1) if row[i] != 0 else np.float32(0)
    return kept


@numba.njit(**_loose)
def _several(positive, negative, count):  # type: ignore[no-untyped-def]
    """How many entries two branches or more keep, and how many of those have both signs."""
    contested, conflicts = np.float32(0), np.float32(0)
    for i in range(count):
        contested += np.float32(1) if positive[i] + negative[i] >= 2 else np.float32(0)
        conflicts += np.float32(1) if min(positive[i], negative[i]) > 0 else np.float32(0)
    return contested, conflicts


@numba.njit(**_loose)
def _larger(keys, top, count):  # type: ignore[no-untyped-def]
    above = np.float32(0)
    for i in range(count):
        above += np.float32(1) if keys[i] > top else np.float32(0)
    return above


@numba.njit(**_fast)
def _agreeing(row, weight, total, merged, share, count):  # type: ignore[no-untyped-def]
    """Add the entries that have the sign of `total` to `merged`, and their weight to `share`."""
    nothing = np.float32(0)
    for i in range(count):
        weighted = row[i] * weight
        merged[i] += weighted if ((weighted > 0) if total[i] >= 0 else (weighted < 0)) else nothing
        share[i] += weight if ((weighted > 0) if total[i] >= 0 else (weighted < 0)) else nothing


@numba.njit(**_fast)
def _signs(row, positive, negative, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        positive[i] += np.float32(1) if row[i] > 0 else np.float32(0)
        negative[i] += np.float32(1) if row[i] < 0 else np.float32(0)


@numba.njit(**_fast)
def ties_block(deltas, cuts, weights, scale, count, merged, work, counts):  # type: ignore[no-untyped-def]
    """TIES on one block of float32 differences (k, BLOCK), trimmed in place; `work` is scratch (4, BLOCK).

    Adds to counts (k + 2,): entries kept per branch, contested, conflicts.
    """
    k = deltas.shape[0]
    work[:] = np.float32(0)
    merged[:] = np.float32(0)
    total, share, positive, negative = work[0], work[1], work[2], work[3]
    for b in range(k):
        _trim(deltas[b], cuts[b], weights[b], total, count)
        counts[b] += np.int64(_nonzero(deltas[b], count))
    for b in range(k):
        _agreeing(deltas[b], weights[b], total, merged, share, count)
        _signs(deltas[b], positive, negative, count)
    contested, conflicts = _several(positive, negative, count)
    for i in range(count):
        merged[i] = scale * (merged[i] / share[i] if share[i] != 0 else np.float32(0))
    counts[k] += np.int64(contested)
    counts[k + 1] += np.int64(conflicts)


@numba.njit(**_fast)
def _store(bits, count, out, out_kind, start):  # type: ignore[no-untyped-def]
    """Write float32 values, rounded to nearest and even where the output is bf16; returns how many are not finite."""
    bad = 0
    values = bits.view(np.float32)
    if out_kind == 1:
        half = numba.carray(_pointer(out + 2 * start), count, np.uint16)
        for i in range(count):
            bits[i] += np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
        for i in range(count):
            half[i] = np.uint16(bits[i] >> np.uint32(16))
    else:
        full = numba.carray(_pointer(out + 4 * start), count, np.uint32)
        for i in range(count):
            full[i] = bits[i]
    for i in range(count):
        bad += not abs(values[i]) < np.float32(np.inf)
    return bad


@numba.njit(**_fast)
def ties(addresses, kinds, base, base_kind, entries, cuts, weights, scale, out, out_kind, gram, counts):  # type: ignore[no-untyped-def]
    """TIES over `entries`; writes the merged model to the memory at `out`, bf16 or float32.

    Adds to gram (k + 1, k): inner products, and in [k, 0] the merged delta's squared norm; and to counts (k + 3,): kept
    per branch, contested, conflicts, values of the output that are not finite.
    """
    k = len(addresses)
    deltas, merged = np.empty((k, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    work = np.empty((4, BLOCK), np.float32)
    bits, scratch = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    values = bits.view(np.float32)
    for start in range(0, entries, BLOCK):
        count = min(BLOCK, entries - start)
        _decode(base, base_kind, start, count, bits)
        for b in range(k):
            _difference(addresses[b], kinds[b], start, count, values, scratch, deltas[b])
            for c in range(b + 1):
                gram[b, c] += _dot(deltas[b], deltas[c], count)
        ties_block(deltas, cuts, weights, scale, count, merged, work, counts)
        gram[k, 0] += _dot(merged, merged, count)
        for i in range(count):
            values[i] += merged[i]
        counts[k + 2] += _store(bits, count, out, out_kind, start)
