"""Which cases of a grid run: pairs of options instead of the product, a sample by default."""

from itertools import combinations

import pytest


def pairwise(*axes):
    """Tuples of one value per axis; any two values of two axes occur together in at least one.

    Greedy, and the same on every run: starts from a missing pair, and fills the other axes with the
    values that add the most missing pairs.
    """
    sizes = [range(len(axis)) for axis in axes]
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(axes)), 2)
        for a in sizes[i]
        for b in sizes[j]
    }
    cases = []
    while missing:
        case = dict(min(missing))
        for axis in range(len(axes)):
            if axis in case:
                continue

            def gain(value, axis=axis, case=case):
                new = sum(tuple(sorted([(axis, value), item])) in missing for item in case.items())
                return new, (value + len(cases)) % len(axes[axis])

            case[axis] = max(sizes[axis], key=gain)
        missing.difference_update(combinations(sorted(case.items()), 2))
        cases.append(tuple(axes[axis][case[axis]] for axis in range(len(axes))))
    return cases


def sampled(cases, keep):
    """The cases for `pytest.mark.parametrize`; all but `keep` of them, evenly spread, are slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    kept = {i * len(cases) // keep for i in range(keep)}
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=() if i in kept else slow) for i, case in enumerate(cases)]
