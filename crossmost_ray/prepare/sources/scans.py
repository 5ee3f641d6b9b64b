"""Scans with the frames of a video: what their collections load alike."""

from __future__ import annotations

from pathlib import Path

from crossmost_ray.prepare.arrays import read_colored_npy
from crossmost_ray.prepare.photos import list_photos, read_photos, spread
from crossmost_ray.prepare.sources.base import Content, Object


def load_scan(item: Object, max_views: int) -> Content:
    """Loads a cloud, and frames of its video from beginning to end, if there are any.

    Args:
        item: Its place holds the file `cloud` and the folder `frames`.
        max_views: Frames that are kept, evenly spread.

    Raises:
        ObjectError: If the cloud or a frame is broken, or the cloud is missing.
    """
    points, colors = read_colored_npy(Path(item.place["cloud"]))
    # By name, and so by time: the order in which a folder lists its files is another on each disk.
    frames = spread(list_photos(Path(item.place["frames"])), max_views)
    return Content(points=points, colors=colors, photos=read_photos(frames))
