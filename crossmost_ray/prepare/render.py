"""A mesh in, encoded views of it from a ring of cameras out."""

from __future__ import annotations

import ctypes
import functools
import io
import os
import sys
from collections.abc import Sequence

import numpy as np
import pyvista as pv
from PIL import Image

from crossmost_ray.prepare.config import RenderConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Floats, Mesh, Piece, Pixels

SYSTEM_PACKAGES = ("libegl1", "libgl1-mesa-dri")
"""Debian packages with the software renderer that VTK needs where there is no display."""

RENDER_LIBRARIES = (
    ("libEGL.so.1", "vtkEGLRenderWindow"),
    ("libOSMesa.so.8", "vtkOSOpenGLRenderWindow"),
)
"""Shared library and the VTK window that uses it, the preferred one first."""

UP = np.array([0.0, 1.0, 0.0])
TRANSLUCENT_LAYERS = 6


class RenderError(RuntimeError):
    """This machine cannot render at all; the message says what to install."""


def camera_ring(config: RenderConfig) -> list[tuple[float, float]]:
    """(azimuth, elevation) in degrees of each view; azimuth 0 looks at the front, +z."""
    step = 360.0 / config.num_views
    turns = len(config.elevations)
    return [
        ((config.first_azimuth + index * step) % 360.0, config.elevations[index % turns])
        for index in range(config.num_views)
    ]


def render_views(mesh: Mesh, config: RenderConfig) -> list[Pixels]:
    """Renders a mesh from each camera of the ring.

    Args:
        mesh: y upwards, in any unit of length.
        config: The ring.

    Returns:
        V images (R, R, 3) uint8.

    Raises:
        ObjectError: If there is nothing to see, or a view is blank: hardly a pixel of it differs
            from the background.
        RenderError: If VTK finds no way to render on this machine.
    """
    visible = Mesh(tuple(piece for piece in mesh.pieces if piece.material.opacity > 0))
    if not visible.pieces:
        raise ObjectError("it has no visible surface")
    plotter = _plotter(config.resolution * config.supersampling, config.light)
    plotter.clear_actors()
    plotter.renderer.SetBackground(*[config.background / 255] * 3)
    for piece in visible.pieces:
        _add(plotter, piece)

    ring = camera_ring(config)
    frames = [_camera_axes(azimuth, elevation) for azimuth, elevation in ring]
    target = visible.bounds.mean(axis=0)
    distance = _distance(visible, target, frames, config)
    plotter.camera.view_angle = config.field_of_view
    views = []
    for (azimuth, elevation), axes in zip(ring, frames, strict=True):
        plotter.camera.position = tuple(target + distance * axes[2])
        plotter.camera.focal_point = tuple(target)
        plotter.camera.up = tuple(UP)
        plotter.reset_camera_clipping_range()
        plotter.render()
        large = np.asarray(plotter.screenshot(return_img=True), np.uint8)
        view = _reduce(large, config.supersampling)
        share = foreground_share(view, config.background)
        if share < config.least_foreground:
            raise ObjectError(
                f"its view at azimuth {azimuth:g}, elevation {elevation:g} is blank: "
                f"{100 * share:.2f} % of the pixels differ from the background"
            )
        views.append(view)
    return views


def foreground_share(view: Pixels, background: int) -> float:
    """Part of a view's pixels that differ visibly from the background."""
    # 8 levels: more than the codec changes a plain background by, less than any shading.
    differs = np.abs(view.astype(np.int16) - background).max(axis=-1) > 8
    return float(differs.mean())


def encode_view(view: Pixels, quality: int) -> bytes:
    """Encodes (R, R, 3) as WebP."""
    stored = io.BytesIO()
    Image.fromarray(view).save(stored, "WEBP", quality=quality, method=6)
    return stored.getvalue()


def decode_view(data: bytes) -> Pixels:
    """Decodes what `encode_view` wrote, to (R, R, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _camera_axes(azimuth: float, elevation: float) -> Floats:
    """(3, 3): unit vectors to the camera's right, up, and from the object to the camera."""
    turn, rise = np.radians(azimuth), np.radians(elevation)
    towards = np.array([np.cos(rise) * np.sin(turn), np.sin(rise), np.cos(rise) * np.cos(turn)])
    right = np.cross(UP, towards)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(towards, right), towards])


def _distance(mesh: Mesh, target: Floats, frames: Sequence[Floats], config: RenderConfig) -> float:
    """Least distance from `target` at which every view fits into its part of the frame."""
    slope = np.tan(np.radians(config.field_of_view / 2)) * config.fill
    distance = 0.0
    for piece in mesh.pieces:
        used = piece.vertices[np.unique(piece.faces)] - target
        for axes in frames:
            across, up, towards = used @ axes.T[:, 0], used @ axes.T[:, 1], used @ axes.T[:, 2]
            widest = np.maximum(np.abs(across), np.abs(up))
            distance = max(distance, float((towards + widest / slope).max()))
    return distance


def _reduce(image: Pixels, factor: int) -> Pixels:
    """Averages blocks of `factor` by `factor` pixels."""
    return np.asarray(Image.fromarray(image).reduce(factor))


@functools.cache
def _plotter(size: int, brightness: float) -> pv.Plotter:
    """The one plotter of this process; building one takes seconds, reusing it milliseconds."""
    _require_renderer()
    plotter = pv.Plotter(off_screen=True, window_size=[size, size], lighting="none")
    # Relative to the camera, so that every view is lit alike: from behind the camera, and more
    # strongly from its upper left, which gives the faces of a box three different shades.
    for position, intensity in (((0.0, 0.0, 1.0), 0.5), ((-0.7, 1.0, 0.8), 0.55)):
        intensity *= brightness
        light = pv.Light(position=position, light_type="camera light", intensity=intensity)
        plotter.renderer.AddLight(light)
    plotter.renderer.enable_depth_peeling(TRANSLUCENT_LAYERS)
    # Views are rendered large and reduced; in software, multi-sampling on top of that takes
    # thirty times as long.
    assert plotter.render_window is not None
    plotter.render_window.SetMultiSamples(0)
    return plotter


def _require_renderer() -> None:
    """Fails where VTK would crash: on Linux, with neither a display nor a software renderer."""
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY"):
        return
    for library, window in RENDER_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", window)
        return
    raise RenderError(
        "there is neither a display nor a software renderer on this machine; "
        f"on Debian: apt-get install {' '.join(SYSTEM_PACKAGES)}"
    )


def _add(plotter: pv.Plotter, piece: Piece) -> None:
    """Puts the triangles of a piece into the scene."""
    surface = pv.PolyData.from_regular_faces(piece.vertices, piece.faces.astype(int))
    material = piece.material
    texture = None
    if piece.normals is not None:
        surface.point_data.active_normals = piece.normals
    if material.texture is not None and piece.uv is not None:
        surface.active_texture_coordinates = piece.uv
        pixels = material.texture
        # An alpha channel, even one without a gap, would send the piece through depth peeling.
        texture = pv.Texture(np.array(pixels if (pixels[..., 3] < 255).any() else pixels[..., :3]))
        texture.repeat = True
        texture.interpolate = True
        texture.mipmap = True
    painted = texture is None and piece.colors is not None
    if painted:
        surface.point_data["colors"] = piece.colors
    plotter.add_mesh(
        surface,
        color="white" if texture is not None else material.color,
        scalars="colors" if painted else None,
        rgb=painted,
        texture=texture,
        opacity=material.opacity,
        smooth_shading=False if piece.normals is None else None,
        ambient=0.35,
        diffuse=0.9,
        show_scalar_bar=False,
        copy_mesh=False,
        reset_camera=False,
        render=False,
    )
