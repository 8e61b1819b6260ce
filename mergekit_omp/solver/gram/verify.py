"""Scan a strip of atoms for the drafted steps of many targets.

The correlations of the scan, sums of products of 16-bit integers, only exclude atoms, by a bound on their error. What
the bound does not exclude is listed as a rival, and :mod:`mergekit_omp.solver.gram.rivals` compares them in float64.

Letters in shapes: T slots, n steps of a draft, k sparsity.
"""

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.kernels import compiled, copy, entry_point, transpose
from mergekit_omp.solver.gram.layout import LINE, STRIP, UNIT
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.rivals import add_rival
from mergekit_omp.solver.gram.state import DRAFTED, Pursuits
from mergekit_omp.solver.gram.vectors import (
    COLUMNS,
    FEW,
    GROUP,
    MANY,
    WIDTH,
    accumulate_few,
    accumulate_many,
    address,
    exceeding,
    first_of,
    integer_at,
    request_early,
)
from mergekit_omp.solver.gram.workspace import Workspace


@entry_point
def mark_rows(pursuits: Pursuits, first: int, last: int, needed: ndarray) -> None:
    """Set ``needed`` bool (P / COLUMNS,) to the blocks of atoms whose rows the scans of slots of a range read."""
    needed[:] = False
    for slot in range(first, last):
        if pursuits.status[slot] == DRAFTED:
            for place in range(_rows_read(pursuits, slot)):
                needed[pursuits.support[slot, place] // COLUMNS] = True


@entry_point
def mirror(gram: Gram, strip: int, first: int, last: int, below: ndarray, needed: ndarray) -> None:
    """Write the rows of a half matrix's strip that are not stored: those of the atoms of strips ``first`` to ``last``.

    ``first`` is above ``strip``, and ``below`` int16 (places,) holds the rows that follow those of the strip. Blocks
    of rows that are not ``needed`` bool (P / COLUMNS,) are left as they are: at the end few targets remain.
    """
    stride = gram.stride
    for other in range(first, last):
        source = gram.starts[other] + strip * STRIP * stride
        target = (other - strip - 1) * STRIP * stride
        for column in range(0, STRIP, COLUMNS):
            if needed[(other * STRIP + column) // COLUMNS]:
                out = below[target + column * stride :]
                transpose(gram.cosines[source + column :], stride, out, stride, COLUMNS)


@entry_point
def verify(
    gram: Gram,
    first_strip: int,
    last_strip: int,
    below: ndarray,
    pursuits: Pursuits,
    first: int,
    last: int,
    work: Workspace,
) -> None:
    """Scan strips for the drafts in slots ``first`` to ``last``; list rivals of the choices, and new candidates."""
    slot = _next_draft(pursuits, first, last)
    while slot < last:
        following = _next_draft(pursuits, slot + 1, last)
        scan(gram, first_strip, last_strip, below, pursuits, slot, following if following < last else slot, work)
        slot = following


@compiled
def _next_draft(pursuits: Pursuits, slot: int, last: int) -> int:
    """Return the first slot with a draft, from ``slot`` on, or ``last``."""
    while slot < last and pursuits.status[slot] != DRAFTED:
        slot += 1
    return slot


@compiled
def scan(
    gram: Gram,
    first_strip: int,
    last_strip: int,
    below: ndarray,
    pursuits: Pursuits,
    slot: int,
    following: int,
    work: Workspace,
) -> None:
    """Scan strips for the draft of one slot; in each, request the rows of the next one, last those of another slot."""
    work.known[:] = False
    for strip in range(first_strip, last_strip):
        is_last = strip + 1 == last_strip
        next_slot, next_strip = (following, first_strip) if is_last else (slot, strip + 1)
        requested = _locate(gram, next_strip, below, pursuits, next_slot, work.next_places)
        _scan_strip(gram, strip, below, pursuits, slot, requested, work)


@entry_point
def add_rows(
    places: ndarray, weights: ndarray, scales: ndarray, norms: ndarray, scans: int, correlations: ndarray
) -> None:
    """Compute the ``correlations`` float32 (n, STRIP) of a strip as often as told, to be timed.

    The rows are those at ``places`` int64 (W,), with ``weights`` int16 (n, W), ``scales`` float32 (n,) and ``norms``
    float32 (STRIP,).
    """
    for _ in range(scans):
        _accumulate(places, len(places), weights, scales, norms, len(weights), places, 0, correlations)


@compiled
def _rows_read(pursuits: Pursuits, slot: int) -> int:
    """Return the number of atoms of the support whose rows the scan of a slot reads."""
    return pursuits.verified[slot] + pursuits.scanned[slot] - 1


@compiled
def _locate(gram: Gram, strip: int, below: ndarray, pursuits: Pursuits, slot: int, places: ndarray) -> int:
    """Write the addresses of the rows of a slot's scan of a strip to ``places`` (W,), and return their number.

    The first row are the target's cosines; those of the support follow. A last one is repeated where pairs need it.
    """
    above, missing, row_bytes = address(gram.cosines, gram.starts[strip]), address(below, 0), 2 * gram.stride
    stored = (strip + 1) * STRIP if gram.half else len(gram.atoms)
    support, size = pursuits.support[slot], _rows_read(pursuits, slot)
    places[0] = address(pursuits.inner[slot], strip * STRIP)
    for place in range(size):
        atom = support[place]
        places[1 + place] = above + atom * row_bytes if atom < stored else missing + (atom - stored) * row_bytes
    rows = 1 + size
    places[rows - 1 + rows % 2] = places[rows - 1]
    return rows


@compiled
def _scan_strip(
    gram: Gram, strip: int, below: ndarray, pursuits: Pursuits, slot: int, requested: int, work: Workspace
) -> None:
    """Scan one strip for one slot; request as many rows of the next scan as told."""
    start, places, correlations = strip * STRIP, work.places, work.correlations
    norms, weights, scales = gram.norms[start : start + STRIP], pursuits.weights[slot], pursuits.scales[slot]
    count, rows = pursuits.scanned[slot], _locate(gram, strip, below, pursuits, slot, places)
    _accumulate(places, rows, weights, scales, norms, count, work.next_places, requested, correlations)
    for step in range(count):
        if step < pursuits.scanned[slot]:
            _list_rivals(gram, pursuits, slot, step, start, correlations[step], work)
    _list_candidates(places[1:rows], pursuits, slot, start, correlations[count - 1])


@compiled
def _accumulate(
    places: ndarray,
    rows: int,
    weights: ndarray,
    scales: ndarray,
    norms: ndarray,
    count: int,
    next_places: ndarray,
    requested: int,
    correlations: ndarray,
) -> None:
    """Compute the ``correlations`` (n, STRIP) of a strip of atoms with the residuals of ``count`` steps.

    The first pass over the rows requests so many at ``next_places``.
    """
    pairs = (rows + 1) // 2
    for step in range(0, count, MANY):
        for column in range(0, STRIP, WIDTH):
            if step == 0 and column % LINE == 0:
                for place in range(requested):
                    request_early(next_places[place] + 2 * column)
            if count - step > FEW:
                accumulate_many(places, pairs, weights, scales, norms, correlations, step, column)
            else:
                accumulate_few(places, pairs, weights, scales, norms, correlations, step, column)


@compiled
def _list_rivals(
    gram: Gram, pursuits: Pursuits, slot: int, step: int, start: int, correlations: ndarray, work: Workspace
) -> None:
    """List the atoms of a strip that the error bound does not exclude from being better than the choice of a step.

    Steps after one that is certainly wrong are not scanned any more.
    """
    highest, error = np.float32(pursuits.correlations[slot, step] * UNIT), pursuits.errors[slot, step]
    for left in range(0, STRIP, GROUP):
        open_ones = exceeding(correlations, left, highest - error)
        while open_ones:
            column = left + first_of(open_ones)
            open_ones &= open_ones - np.uint64(1)
            atom = start + column
            bound = error * gram.norms[atom]
            if (
                correlations[column] + bound >= highest
                and atom != pursuits.choices[slot, step]
                and atom < len(gram.atoms)
            ):
                add_rival(gram, pursuits, slot, step, atom, work)
                if correlations[column] - bound > highest:
                    pursuits.scanned[slot] = min(pursuits.scanned[slot], step + 1)


@compiled
def _list_candidates(places: ndarray, pursuits: Pursuits, slot: int, start: int, correlations: ndarray) -> None:
    """Add the atoms of a strip whose correlation is high enough; raise what is enough when the list is full.

    ``places`` are the addresses of the support's rows.
    """
    atoms, estimates, found = pursuits.candidates[slot], pursuits.estimates[slot], pursuits.found[slot]
    first = listed = pursuits.listed[slot]
    least, room = pursuits.least[slot], len(atoms)
    for left in range(0, STRIP, GROUP):
        high_ones = exceeding(correlations, left, least)
        if high_ones and listed > room - GROUP:
            _copy_cosines(places, start, atoms, first, listed, found)
            mean = np.mean(estimates[:listed])
            least = max(np.float32(1.1) * least, np.float32(0.5) * mean)
            first = listed = _shorten(atoms, estimates, found, len(places), listed, least)
        while high_ones:
            column = left + first_of(high_ones)
            high_ones &= high_ones - np.uint64(1)
            atoms[listed], estimates[listed] = start + column, correlations[column]
            listed += 1
    _copy_cosines(places, start, atoms, first, listed, found)
    pursuits.listed[slot], pursuits.least[slot] = listed, least


@compiled
def _copy_cosines(places: ndarray, start: int, atoms: ndarray, first: int, last: int, found: ndarray) -> None:
    """Copy the cosines of candidates ``first`` to ``last``, all of this strip, with the support."""
    for candidate in range(first, last):
        offset = 2 * (atoms[candidate] - start)
        for place in range(len(places)):
            found[candidate, place] = integer_at(places[place] + offset)


@compiled
def _shorten(
    atoms: ndarray,
    estimates: ndarray,
    found: ndarray,
    size: int,
    listed: int,
    least: np.floating,
) -> int:
    """Keep the candidates whose correlation exceeds ``least``, but always leave room; return their number."""
    count = 0
    for candidate in range(listed):
        if estimates[candidate] > least and count < len(atoms) - 2 * GROUP:
            atoms[count], estimates[count] = atoms[candidate], estimates[candidate]
            copy(found[count], found[candidate], size)
            count += 1
    return count
