"""The nearest of many points, from boxes that hold equally many of them, compiled by numba on first use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gyroquant.grids.point_search import Floats, Whole, _jit, largest
from gyroquant.grids.threads import WORTH_A_THREAD, in_parts

_BOX = 128  # points in a box
_FIRST = 4  # boxes that are searched in the order of their distances; all others in their own order
_SEEN = 16  # about one in so many points is looked at


class Boxes(NamedTuple):
    """Points in boxes.

    low, high: the corners of each box, shape (length, boxes).
    points: those of each box, shape (boxes, length, points of a box).
    places: the place of each point in the list, int32, shape (boxes, points of a box).
    """

    low: Floats
    high: Floats
    points: Floats
    places: Whole


def boxes_of(points: Floats) -> Boxes:
    """Boxes for a list of points, shape (points, length), a power of two of them: cut in halves along the widest axis
    again and again.
    """
    parts = np.arange(len(points), dtype=np.int32)[None]
    while parts.shape[1] > _BOX:
        within = points[parts]
        axis = within.var(1).argmax(1)
        along = np.take_along_axis(within, axis[:, None, None], 2)[..., 0]
        order = np.argsort(along, 1, kind="stable")
        parts = np.take_along_axis(parts, order, 1).reshape(2 * len(parts), -1)
    within = points[parts].astype(np.float32)
    low, high = (np.ascontiguousarray(corner.T) for corner in (within.min(1), within.max(1)))
    return Boxes(low, high, np.ascontiguousarray(within.transpose(0, 2, 1)), parts)


@_jit  # type: ignore[untyped-decorator]
def _look(x: Floats, points: Floats, tree: Floats, least: np.float32) -> tuple[int, np.float32]:
    """The place of a point that is nearer than the distance `least`, and its distance; -1 if there is none."""
    length, count = points.shape
    distance = tree[:count]
    distance[:] = 0
    for i in range(length):
        for v in range(count):
            away = points[i, v] - x[i]
            distance[v] -= away * away
    found = largest(tree, count)
    return (found, -tree[found]) if -tree[found] < least else (-1, least)


@_jit  # type: ignore[untyped-decorator]
def _search(
    x: Floats, low: Floats, high: Floats, points: Floats, index: Whole, share: np.float32, found: Whole, error: Floats
) -> None:
    length, boxes = low.shape
    bound = np.empty(2 * boxes, np.float32)
    tree = np.empty(2 * points.shape[2], np.float32)
    for n in range(len(x)):
        nearness = bound[:boxes]
        nearness[:] = 0
        for i in range(length):
            for b in range(boxes):
                away = max(max(low[i, b] - x[n, i], x[n, i] - high[i, b]), np.float32(0))
                nearness[b] -= away * away
        box, best, least = 0, 0, np.float32(np.inf)
        for _ in range(_FIRST):
            box = largest(bound, boxes)
            if -nearness[box] >= share * least:
                break
            place, least = _look(x[n], points[box], tree, least)
            best = index[box, place] if place >= 0 else best
            nearness[box] = -np.inf
        for b in range(boxes):
            if -nearness[b] < share * least:
                place, least = _look(x[n], points[b], tree, least)
                best = index[b, place] if place >= 0 else best
        found[n], error[n] = best, least


def nearest_in_boxes(x: Floats, boxes: Boxes, share: float = 1.0, threads: int = 1) -> tuple[Whole, Floats]:
    """The points nearest to vectors, shape (vectors, length), as places in the list, and their squared distances.

    A box is left out if its squared distance is more than `share` times that of the nearest point so far. Below 1, the
    search is faster and may miss the nearest point.
    """
    found, error = np.empty(len(x), np.int32), np.empty(len(x), np.float32)
    threads = threads if x.size * boxes.places.size // _SEEN >= WORTH_A_THREAD else 1
    in_parts(lambda part: _search(x[part], *boxes, np.float32(share), found[part], error[part]), len(x), threads)
    return found, error
