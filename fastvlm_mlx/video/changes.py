"""Whether a frame shows something else than another one, noise apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

GRID = 32  # blocks along each side
FLOOR = 10.0  # of 255: a smaller change of a block's mean is none
NOISE = 6.0  # standard deviations that noise stays within, for some hours of frames
MOST_NOISE = 5.0  # of 255, of a block's mean: a small camera's in the dark
LEAST_BLOCKS = 2  # of the grid's 1024 that must differ: one may be a stuck pixel's


def sketch(image: PILImage) -> np.ndarray:
    """The mean colour of each block of a picture, float32 [GRID, GRID, 3]."""
    import numpy as np
    from PIL import Image

    small = image.resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """How much of 255 the blocks of two sketches differ on average."""
    return float(abs(one - other).mean())


class Changes:
    """Tells frames that show something new from those that look like the last that did.

    A frame is compared with the last one that was new, so that slow changes add up. What sensor
    noise does to a block is measured between frames that follow one another: the median over all
    blocks, which moving things don't reach.
    """

    def __init__(self) -> None:
        self._shown: np.ndarray | None = None
        self._previous: np.ndarray | None = None
        self._noise = 0.0

    def is_new(self, image: PILImage) -> bool:
        """Whether a frame shows something new, and then the next ones are compared with it."""
        import numpy as np

        now = sketch(image)
        if self._previous is not None:
            # 1.4826 times the median of absolute values is the standard deviation of a normal
            # distribution. A cut, or a camera that moves, changes all blocks too, but by more.
            noise = 1.4826 * float(np.median(abs(now - self._previous)))
            self._noise += (min(noise, MOST_NOISE) - self._noise) / 2
        self._previous = now
        if self._shown is None or self._differs(now, self._shown):
            self._shown = now
            return True
        return False

    def _differs(self, now: np.ndarray, shown: np.ndarray) -> bool:
        blocks = abs(now - shown).max(axis=-1)
        return int((blocks > max(FLOOR, NOISE * self._noise)).sum()) >= LEAST_BLOCKS
