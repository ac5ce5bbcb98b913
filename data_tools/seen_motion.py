"""What the one shape of a clip does, measured: the demo's check that clips show their captions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.make_video_demo import BACKGROUND, COLOURS, MOVES

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

_MOVED_FRAC = 0.2  # of the frame's width, the least that counts as moving
_GROWN = 1.7  # times the area
_SEEN_LEVELS = 90  # difference from the ground, of all colours, that is shape and not haze


def seen_motion(frames: Frames) -> str:
    """One of the demo's motions, by where the shape's middle and area go over the clip.

    Coarse on purpose: it looks at the first and last quarter. A shape that neither moves nor
    changes its size is said to rotate.
    """
    weight = _weight(frames)
    quarter = max(len(frames) // 4, 1)
    (x0, y0, area0), (x1, y1, area1) = (
        np.array([_middle(frame) for frame in part]).mean(0)
        for part in (weight[:quarter], weight[-quarter:])
    )
    right, down = (x1 - x0) / frames.shape[2], (y1 - y0) / frames.shape[1]
    if max(abs(right), abs(down)) >= _MOVED_FRAC:
        along = (np.sign(right), 0) if abs(right) > abs(down) else (0, np.sign(down))
        return next(name for name, direction in MOVES.items() if direction == along)
    if area1 > _GROWN * area0:
        return "grows"
    return "shrinks" if area0 > _GROWN * area1 else "rotates"


def seen_colour(frames: Frames) -> str:
    """The demo's colour that is nearest to the shape's."""
    weight = _weight(frames)[..., None]
    mean = (frames * weight).sum((0, 1, 2)) / max(weight.sum(), 1e-9)
    direction = mean / np.linalg.norm(mean)
    return max(
        COLOURS,
        key=lambda name: float(
            direction @ (np.array(COLOURS[name]) / np.linalg.norm(COLOURS[name]))
        ),
    )


def _weight(frames: Frames) -> Floats:
    """How much of the shape is in each place, [F, H, W]."""
    away = np.abs(frames.astype(float) - np.array(BACKGROUND)).sum(3)
    return np.clip(away - _SEEN_LEVELS, 0, None)


def _middle(weight: Floats) -> tuple[float, float, float]:
    """Centre of mass in pixels, and mass."""
    total = weight.sum()
    rows, columns = np.indices(weight.shape)
    if total <= 0:
        return weight.shape[1] / 2, weight.shape[0] / 2, 1e-9
    return float((columns * weight).sum() / total), float((rows * weight).sum() / total), total
