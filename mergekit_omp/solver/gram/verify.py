"""Scan a strip of atoms for the drafted steps of many targets.

The cosines of the scan, in 16-bit integers and float32, only exclude atoms, by a bound on their error. What the bound
does not exclude is listed as a rival, and :mod:`mergekit_omp.solver.gram.rivals` compares them in float64.

Letters in shapes: T slots, n steps of a draft, k sparsity.
"""

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.kernels import (
    any_may_reach,
    compiled,
    entry_point,
    transpose,
)
from mergekit_omp.solver.gram.layout import LINE, STRIP
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.rivals import add_rival
from mergekit_omp.solver.gram.state import DRAFTED, Pursuits
from mergekit_omp.solver.gram.vectors import (
    AHEAD,
    COLUMNS,
    COLUMNS_OF_FEW,
    COLUMNS_OF_MANY,
    FEW,
    MANY,
    accumulate_few,
    accumulate_many,
    address,
    integer_at,
    request_line,
)
from mergekit_omp.solver.gram.workspace import Workspace

GROUP = 32
"""Atoms that are compared with the least correlation together; few groups contain a candidate."""


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
    for slot in range(first, last):
        if gram.half and slot + 1 < last and pursuits.status[slot + 1] == DRAFTED:
            _request_rows(gram, first_strip, below, pursuits, slot + 1, work.places)
        if pursuits.status[slot] == DRAFTED:
            scan(gram, first_strip, last_strip, below, pursuits, slot, work)


@compiled
def scan(
    gram: Gram, first_strip: int, last_strip: int, below: ndarray, pursuits: Pursuits, slot: int, work: Workspace
) -> None:
    """Scan strips for the draft of one slot."""
    work.known[:] = False
    for strip in range(first_strip, last_strip):
        _scan_strip(gram, strip, below, pursuits, slot, work)


@entry_point
def add_rows(places: ndarray, weights: ndarray, inner: ndarray, scans: int, sums: ndarray) -> None:
    """Compute the cosines ``sums`` float32 (n, STRIP) of a strip as often as told, to be timed.

    The rows are those at ``places`` int64 (k,), with ``weights`` float32 (n, k); ``inner`` is int16 (STRIP,).
    """
    for _ in range(scans):
        _accumulate(places, len(places), weights, inner, len(weights), sums)


@compiled
def _rows_read(pursuits: Pursuits, slot: int) -> int:
    """Return the number of atoms of the support whose rows the scan of a slot reads."""
    return pursuits.verified[slot] + pursuits.scanned[slot] - 1


@compiled
def _request_rows(gram: Gram, strip: int, below: ndarray, pursuits: Pursuits, slot: int, places: ndarray) -> None:
    """Ask the memory for the first lines of a slot's rows, which come from anywhere in a half matrix's strip."""
    size = _rows_read(pursuits, slot)
    _locate(gram, strip, below, pursuits.support[slot], size, places)
    for place in range(size):
        for line in range(0, AHEAD, 2 * LINE):
            request_line(places[place] + line)


@compiled
def _scan_strip(gram: Gram, strip: int, below: ndarray, pursuits: Pursuits, slot: int, work: Workspace) -> None:
    start, sums, places = strip * STRIP, work.sums, work.places
    inverse_norms, norms = gram.inverse_norms[start : start + STRIP], gram.norms[start : start + STRIP]
    count, size = pursuits.scanned[slot], _rows_read(pursuits, slot)
    inner = pursuits.inner[slot, start : start + STRIP]
    _locate(gram, strip, below, pursuits.support[slot], size, places)
    _accumulate(places, size, pursuits.weights[slot], inner, count, sums)
    correlations, errors = pursuits.correlations[slot], pursuits.errors[slot]
    for step in range(count):
        if step < pursuits.scanned[slot] and any_may_reach(
            sums[step], inverse_norms, np.float32(correlations[step]), errors[step]
        ):
            _list_rivals(gram, pursuits, slot, step, start, sums[step], work)
    _list_candidates(places, pursuits, slot, size, start, sums[count - 1], norms, work.kept)


@compiled
def _locate(gram: Gram, strip: int, below: ndarray, support: ndarray, size: int, places: ndarray) -> None:
    """Write the addresses of the support's rows in a strip to ``places`` (k,)."""
    above, missing, row_bytes = address(gram.cosines, gram.starts[strip]), address(below, 0), 2 * gram.stride
    stored = (strip + 1) * STRIP if gram.half else len(gram.atoms)
    for slot in range(size):
        atom = support[slot]
        places[slot] = above + atom * row_bytes if atom < stored else missing + (atom - stored) * row_bytes


@compiled
def _accumulate(places: ndarray, size: int, weights: ndarray, inner: ndarray, count: int, sums: ndarray) -> None:
    """Compute the cosines ``sums`` (n, STRIP) of a strip of atoms with the residuals of ``count`` steps."""
    for step in range(0, count, MANY):
        if count - step > FEW:
            for column in range(0, STRIP, COLUMNS_OF_MANY):
                accumulate_many(places, size, inner, weights, sums, step, column)
        else:
            for column in range(0, STRIP, COLUMNS_OF_FEW):
                accumulate_few(places, size, inner, weights, sums, step, column)


@compiled
def _list_rivals(
    gram: Gram, pursuits: Pursuits, slot: int, step: int, start: int, cosines: ndarray, work: Workspace
) -> None:
    """List the atoms of a strip that the error bound does not exclude from being better than the choice of a step.

    Steps after one that is certainly wrong are not scanned any more.
    """
    correlation, error = np.float32(pursuits.correlations[slot, step]), pursuits.errors[slot, step]
    for column in range(STRIP):
        atom = start + column
        least = correlation * gram.inverse_norms[atom]
        if abs(cosines[column]) + error >= least and atom != pursuits.choices[slot, step] and atom < len(gram.atoms):
            add_rival(gram, pursuits, slot, step, atom, work)
            if abs(cosines[column]) - error > least:
                pursuits.scanned[slot] = min(pursuits.scanned[slot], step + 1)


@compiled
def _list_candidates(
    places: ndarray,
    pursuits: Pursuits,
    slot: int,
    size: int,
    start: int,
    cosines: ndarray,
    norms: ndarray,
    kept: ndarray,
) -> None:
    """Add the atoms of a strip whose correlation is high enough; raise what is enough when the list is full."""
    atoms, estimates, found = pursuits.candidates[slot], pursuits.estimates[slot], pursuits.found[slot]
    first = listed = pursuits.listed[slot]
    least, room = pursuits.least[slot], len(atoms)
    for left in range(0, STRIP, GROUP):
        excess = np.float32(0)
        for column in range(left, left + GROUP):
            excess += max(abs(cosines[column]) * norms[column] - least, np.float32(0))
        if not excess > 0:
            continue
        if listed > room - GROUP:
            _copy_cosines(places, size, start, atoms, first, listed, found)
            mean = np.mean(estimates[:listed])
            least = max(np.float32(1.1) * least, np.float32(0.5) * mean)
            first = listed = _shorten(atoms, estimates, found, size, listed, least, kept)
        for column in range(left, left + GROUP):
            estimate = abs(cosines[column]) * norms[column]
            atoms[listed], estimates[listed] = start + column, estimate
            listed += estimate > least
    _copy_cosines(places, size, start, atoms, first, listed, found)
    pursuits.listed[slot], pursuits.least[slot] = listed, least


@compiled
def _copy_cosines(
    places: ndarray, size: int, start: int, atoms: ndarray, first: int, last: int, found: ndarray
) -> None:
    """Copy the cosines of candidates ``first`` to ``last``, all of this strip, with the support."""
    for place in range(size if first < last else 0):
        for candidate in range(first, last):
            found[place, candidate] = integer_at(places[place] + 2 * (atoms[candidate] - start))


@compiled
def _shorten(
    atoms: ndarray,
    estimates: ndarray,
    found: ndarray,
    size: int,
    listed: int,
    least: np.floating,
    kept: ndarray,
) -> int:
    """Keep the candidates whose correlation exceeds ``least``, but always leave room; return their number."""
    count = 0
    for candidate in range(listed):
        if estimates[candidate] > least and count < len(atoms) - 2 * GROUP:
            kept[count] = candidate
            atoms[count], estimates[count] = atoms[candidate], estimates[candidate]
            count += 1
    for place in range(size):
        for candidate in range(count):
            found[place, candidate] = found[place, kept[candidate]]
    return count
