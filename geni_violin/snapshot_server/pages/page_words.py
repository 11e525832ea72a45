"""What people call some pages of an image. Pure."""

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.pages.image_map import ImageMap


def words_for_pages(image: ImageMap, numbers: NDArray[np.intp]) -> str:
    """Pages by their numbers among all pages of the image: for each block the first and the last of them, and how many.

    :param numbers: at least one, in any order.
    """
    first_pages = image.first_pages()
    blocks = np.searchsorted(first_pages, numbers, "right") - 1
    parts = []
    for block in np.unique(blocks).tolist():
        pages = numbers[blocks == block] - first_pages[block]
        lowest, highest = int(pages.min()), int(pages.max())
        span = f"page {lowest}" if lowest == highest else f"pages {lowest} to {highest} ({len(pages)} of them)"
        parts.append(f"{span} of block {image.blocks[block].name}")
    return ", ".join(parts)
