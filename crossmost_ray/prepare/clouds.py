"""A file of points that anyone may have written in, its points and colours out."""

from __future__ import annotations

import importlib.util
import io
import lzma
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import trimesh
from numpy.lib import format as npy
from numpy.typing import NDArray

from crossmost_ray.prepare.arrays import read_npy
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import check_ply
from crossmost_ray.prepare.mesh import Pixels, check_coordinates, far_offset

Table = NDArray[Any]

MAX_POINTS = 50_000_000
MIN_POINTS = 16

MAX_LOST = 0.01
"""Share of a cloud's points that may be NaN or infinite; so many are dropped."""

MAX_BYTES = MAX_POINTS * 128
"""Largest file that is opened."""

POINT_NAMES = ("points", "pc", "xyz")
COLOR_NAMES = ("colors", "rgb")

HEAD_LINES = 100
MAX_LINE = 10_000
"""Lines, and letters of each, within which the points of a text or PCD file must begin."""

COLOR_COLUMNS = {6: (3,), 7: (4,), 9: (3, 6), 10: (4, 7)}
"""Where colours may begin in a table of so many columns, the likeliest first: behind x, y and z,
with an intensity or a normal between, or a normal behind."""

PCD_KINDS = {"F": "f", "I": "i", "U": "u"}
LZF_RATIO = 90
"""Largest factor by which LZF unpacks: three bytes stand for 264 at most."""

LAS_HEADER = 375
LAS_RECORD = 54
"""Bytes that each variable-length record of a LAS file takes at least."""

BROKEN = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    NotImplementedError,
    EOFError,
    OSError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What the readers let through of a file that is not what its suffix says."""


def read_cloud(path: Path) -> tuple[NDArray[np.float32], Pixels | None]:
    """Reads points, and their colours where the file has them.

    The suffix tells the format:

    - .npy, and .npz with an array called points, pc or xyz (or one array only), and colors or rgb;
    - .txt, .xyz, .csv and .pts: a point a line, split by blanks, commas or semicolons. Lines before
      the first point may be one header and comments that begin with #, // or ;. Of the columns
      behind x, y and z, three in a row are colours if they are whole numbers up to 255 and one is
      above 1, or if they lie in [0, 1] and are no normals, which have length 1; the rest is left
      out. The same holds for the columns of an array;
    - .pcd: text, binary, or compressed; with the fields x, y, z and, for colours, rgb or rgba;
    - .las, and .laz if a package that unpacks it is installed;
    - .ply: its vertices, whatever faces it has.

    Points that are NaN or infinite are dropped if they are at most `MAX_LOST`; in a .npy file none
    may be. A cloud that lies far from the origin is moved there, as float32 would coarsen it.

    Returns:
        (N, 3) float32 in the file's own axes and unit, N >= `MIN_POINTS`, and (N, 3) sRGB or None.

    Raises:
        ObjectError: If the file is missing, broken, larger than `MAX_POINTS`, promises more than it
            holds, or holds too few points, too many that are NaN, or one beyond `MAX_COORDINATE`.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ObjectError(f"{path} is none of {', '.join(CLOUD_SUFFIXES)}: convert it to one")
    if not path.is_file():
        raise ObjectError(f"the file {path} is missing")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ObjectError(f"{path} is larger than {MAX_BYTES:,} bytes: thin it out")
        points, colors = reader(path)
        return _finished(np.asarray(points), colors, path)
    except ObjectError:
        raise
    except BROKEN as broken:
        reason = str(broken) or type(broken).__name__
        raise ObjectError(f"{path} cannot be read: {reason}") from broken


def unpack_lzf(packed: bytes, size: int) -> bytes:
    """Unpacks LZF, the compression of PCD files.

    A byte below 32 is followed by so many bytes and one more, to be taken as they are. Any other
    starts a copy of what is out already: its upper three bits are the length less 2 (7: the next
    byte is added), its lower five and the next byte how far back it begins, less 1.

    Args:
        packed: Whole tokens.
        size: Bytes that come out.

    Raises:
        ValueError: If something else comes out, or a copy begins before the first byte.
    """
    out = bytearray()
    here, end = 0, len(packed)
    while here < end and len(out) <= size:
        token = packed[here]
        here += 1
        if token < 32:
            out += packed[here : here + token + 1]
            here += token + 1
            continue
        length = (token >> 5) + 2
        if length == 9:
            length += packed[here]
            here += 1
        back = ((token & 31) << 8 | packed[here]) + 1
        here += 1
        if back > len(out):
            raise ValueError("a copy begins before the first byte")
        # Where it reaches into what it writes itself, it repeats.
        copied = out[-back:][:length]
        out += (copied * (length // back + 1))[:length]
    if len(out) != size:
        raise ValueError(f"it unpacks to {len(out):,} bytes or more, not {size:,}")
    return bytes(out)


def _finished(
    points: Table, colors: Table | None, path: Path
) -> tuple[NDArray[np.float32], Pixels | None]:
    """What `read_cloud` promises of every cloud, whichever reader it comes from."""
    if len(points) > MAX_POINTS:
        raise ObjectError(f"{path} holds more than {MAX_POINTS:,} points: thin it out")
    points = points.astype(np.float64)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(points).all(axis=1))
    lost = (~finite).mean() if len(points) else 0.0
    if lost > MAX_LOST:
        raise ObjectError(
            f"{100 * lost:.1f} % of the points of {path} are NaN or infinite, more than "
            f"{100 * MAX_LOST:g} %: remove them"
        )
    points = points[finite]
    if len(points) < MIN_POINTS:
        raise ObjectError(f"{path} holds {len(points)} points, fewer than {MIN_POINTS}")
    check_coordinates(points, str(path))
    offset = far_offset(points.min(axis=0), points.max(axis=0))
    if colors is not None:
        if len(colors) != len(finite):
            raise ObjectError(f"{path} holds {len(finite)} points, but {len(colors)} colours")
        colors = _to_bytes(colors[finite])
    return (points - offset).astype(np.float32), colors


def _to_bytes(colors: Table) -> Pixels:
    """Brings colours in [0, 1], [0, 255] or [0, 65535] to bytes.

    Raises:
        ValueError: If they are in none of these.
    """
    if colors.dtype == np.uint8:
        return colors
    values = colors.astype(np.float64)
    greatest = values.max(initial=0)
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or greatest > 65535:
        raise ValueError("its colours lie neither in 0 to 1 nor in 0 to 255")
    # Whole numbers of 0 and 1 alone are bytes only where their type says so.
    scale = 255.0 if greatest <= 1 and colors.dtype.kind == "f" else 1.0
    return np.round(values * scale / (257.0 if greatest > 255 else 1.0)).astype(np.uint8)


def _split_columns(table: Table) -> tuple[Table, Table | None]:
    """Points and, if they are evident, colours of an (N, C) table; see `read_cloud`."""
    if table.ndim != 2 or table.shape[1] < 3:
        raise ValueError(f"its shape is {table.shape}, expected a row of 3 or more columns a point")
    for start in COLOR_COLUMNS.get(table.shape[1], ()):
        columns = table[:, start : start + 3].astype(np.float64)
        least, greatest = columns.min(initial=0), columns.max(initial=0)
        if not np.isfinite(columns).all() or least < 0 or greatest == 0:
            continue
        if 1 < greatest <= 255 and (columns == np.round(columns)).all():
            return table[:, :3], columns
        length = np.linalg.norm(columns, axis=1)
        if greatest <= 1 and (np.abs(length - 1) < 0.01).mean() < 0.99:
            return table[:, :3], columns
    return table[:, :3], None


def _read_npy(path: Path) -> tuple[Table, Table | None]:
    return _split_columns(read_npy(path))


def _read_npz(path: Path) -> tuple[Table, Table | None]:
    with zipfile.ZipFile(path) as archive:
        members = {Path(entry.filename).stem: entry for entry in archive.infolist()}
        names = [name for name in POINT_NAMES if name in members] or list(members)
        if not names or (len(members) > 1 and names[0] not in POINT_NAMES):
            raise ValueError(
                f"it holds {', '.join(sorted(members)[:8]) or 'nothing'}; "
                f"its points must be called {', '.join(POINT_NAMES)}, or be alone"
            )
        points, colors = _split_columns(_read_member(archive, members[names[0]]))
        for name in COLOR_NAMES:
            if name in members and name != names[0]:
                return points, _read_member(archive, members[name])[:, :3]
    return points, colors


def _read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Table:
    """An array of an archive, which unpacks to no more than its header promises."""
    if entry.file_size > MAX_BYTES:
        raise ValueError(f"{entry.filename} unpacks to {entry.file_size:,} bytes: thin it out")
    with archive.open(entry) as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
        if dtype.kind not in "iuf" or len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"{entry.filename} holds {dtype} of shape {shape}, expected numbers")
        promised = math.prod(shape) * dtype.itemsize
        if promised > entry.file_size:
            raise ValueError(f"{promised:,} bytes are promised, {entry.file_size:,} are there")
        array = np.frombuffer(stream.read(promised), dtype)
        return array.reshape(shape, order="F" if is_fortran else "C")


def _read_text(path: Path) -> tuple[Table, Table | None]:
    # Of unknown encodings this one reads every byte; only a header may hold what is not ASCII.
    with path.open(encoding="latin-1") as stream:
        skipped, delimiter, width = _find_points(stream)
        stream.seek(0)
        most = min(_most_rows(path.stat().st_size, width), MAX_POINTS + 1)
        table = _load_text(stream, most, skipped, delimiter)
    return _split_columns(table)


def _load_text(
    stream: IO[Any], most: int, skipped: int = 0, delimiter: str | None = None
) -> NDArray[np.float64]:
    """At most so many rows of numbers, allocated at once; comments and blank lines are none."""
    with warnings.catch_warnings():
        # That blank lines are not counted, and that there may be none.
        warnings.simplefilter("ignore", UserWarning)
        return np.loadtxt(
            stream,
            delimiter=delimiter,
            comments=["#", "//"],
            skiprows=skipped,
            max_rows=most,
            ndmin=2,
        )


def _most_rows(num_bytes: int, width: int) -> int:
    """Rows that so much text can hold: a number takes a digit and what stands behind it."""
    return num_bytes // (2 * width) + 1


def _find_points(stream: IO[str]) -> tuple[int, str | None, int]:
    """Lines before the first point, what stands between its numbers (None: blanks), how many."""
    headers = 0
    for number in range(HEAD_LINES):
        line = stream.readline(MAX_LINE)
        text = line.strip()
        if not line:
            break
        if len(line) == MAX_LINE:
            raise ValueError(f"line {number + 1} is longer than {MAX_LINE:,} letters")
        if not text or text.startswith(("#", "//", ";")):
            continue
        delimiter = next((mark for mark in ",;" if mark in text), None)
        words = text.split(delimiter)
        if len(words) >= 3 and _are_numbers(words):
            return number, delimiter, len(words)
        headers += 1
        if headers > 1:
            raise ValueError(f"line {number + 1} holds no point: '{text[:60]}'")
    raise ValueError(f"its first {HEAD_LINES} lines hold no point")


def _are_numbers(words: list[str]) -> bool:
    try:
        return bool([float(word) for word in words])
    except ValueError:
        return False


def _read_pcd(path: Path) -> tuple[Table, Table | None]:
    with path.open("rb") as stream:
        header = _pcd_header(stream)
        dtype = _pcd_dtype(header)
        count = int(header["POINTS"][0] if "POINTS" in header else header["WIDTH"][0])
        if not 0 <= count <= MAX_POINTS:
            raise ValueError(f"it promises {count:,} points, more than {MAX_POINTS:,}: thin it out")
        kind = header["DATA"][0].lower()
        if kind == "ascii":
            table = _pcd_text(stream, dtype, count)
        else:
            table = _pcd_binary(stream, dtype, count, is_packed=kind == "binary_compressed")
    points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=1)
    name = next((name for name in ("rgb", "rgba") if name in (dtype.names or ())), None)
    if name is None or dtype[name].itemsize != 4 or dtype[name].shape:
        return points, None
    # 0x00RRGGBB; a float is these four bytes, not their value.
    field = np.ascontiguousarray(table[name])
    packed = field.view("<u4")
    if field.dtype.kind == "f":
        # Some writers of text do put the value in; as bytes, colours are far below 1.
        is_value = (field >= 1) & (field < 2**24)
        packed = np.where(is_value, np.where(is_value, field, 0).astype(np.uint32), packed)
    colors = np.stack([packed >> shift & 255 for shift in (16, 8, 0)], axis=1)
    return points, colors.astype(np.uint8)


def _bytes_left(stream: IO[bytes]) -> int:
    return os.fstat(stream.fileno()).st_size - stream.tell()


def _pcd_header(stream: IO[bytes]) -> dict[str, list[str]]:
    header: dict[str, list[str]] = {}
    for _ in range(HEAD_LINES):
        key, *values = stream.readline(MAX_LINE).decode("ascii", errors="replace").split() or [""]
        header[key] = values
        if key == "DATA":
            if values and values[0].lower() in ("ascii", "binary", "binary_compressed"):
                return header
            raise ValueError(f"its DATA is {' '.join(values)}, not ascii, binary or compressed")
    raise ValueError(f"its first {HEAD_LINES} lines hold no DATA: it is no PCD file")


def _pcd_dtype(header: dict[str, list[str]]) -> np.dtype[Any]:
    """Fields of a point, little-endian; padding called _ is left without a name of its own."""
    names, sizes, kinds = header["FIELDS"], header["SIZE"], header["TYPE"]
    counts = header.get("COUNT", ["1"] * len(names))
    fields = []
    for index, name in enumerate(names):
        width, size = int(counts[index]), int(sizes[index])
        if not 0 < width <= 10_000:
            raise ValueError(f"its field {name} has a COUNT of {width}")
        unique = f"{name}{index}" if name == "_" or name in names[:index] else name
        shape = () if width == 1 else (width,)
        fields.append((unique, f"<{PCD_KINDS[kinds[index]]}{size}", shape))
    dtype = np.dtype(fields)
    missing = [axis for axis in "xyz" if axis not in names or dtype[axis].shape]
    if missing:
        raise ValueError(f"it has no field {', '.join(missing)} of one number")
    return dtype


def _pcd_text(stream: IO[bytes], dtype: np.dtype[Any], count: int) -> Table:
    names = dtype.names or ()
    widths = [math.prod(dtype[name].shape) for name in names]
    # Before as many rows as are promised are allocated.
    possible = _most_rows(_bytes_left(stream), max(sum(widths), 1))
    if count > possible:
        raise ValueError(f"{count:,} points are promised; there is no room for {possible:,}")
    columns = _load_text(stream, max(count, 1))
    if columns.shape[0] < count or columns.shape[1] != sum(widths):
        raise ValueError(
            f"{count:,} points of {sum(widths)} numbers are promised, "
            f"{columns.shape[0]:,} of {columns.shape[1]} are there"
        )
    table = np.empty(count, dtype)
    for name, width, end in zip(names, widths, np.cumsum(widths), strict=True):
        # What is no whole number, such as NaN, may stand in a field of them: it is no coordinate.
        with np.errstate(invalid="ignore"):
            block = columns[:count, end - width : end].astype(dtype[name].base)
        table[name] = block.reshape(table[name].shape)
    return table


def _pcd_binary(stream: IO[bytes], dtype: np.dtype[Any], count: int, *, is_packed: bool) -> Table:
    promised = count * dtype.itemsize
    if not is_packed:
        if promised > _bytes_left(stream):
            raise ValueError(f"{promised:,} bytes are promised, {_bytes_left(stream):,} are there")
        return np.frombuffer(stream.read(promised), dtype)
    packed_size, size = struct.unpack("<II", stream.read(8))
    there = _bytes_left(stream)
    if packed_size > there or size != promised or size > LZF_RATIO * packed_size:
        raise ValueError(
            f"{promised:,} bytes are promised, of {packed_size:,} that unpack to {size:,}; "
            f"{there:,} are there"
        )
    data = unpack_lzf(stream.read(packed_size), size)
    # Field after field, not point after point.
    table = np.empty(count, dtype)
    start = 0
    for name in dtype.names or ():
        end = start + count * dtype[name].itemsize
        table[name] = np.frombuffer(data[start:end], dtype[name].base).reshape(table[name].shape)
        start = end
    return table


def _read_las(path: Path) -> tuple[Table, Table | None]:
    if importlib.util.find_spec("laspy") is None:
        raise ObjectError(f"{path} cannot be read without laspy: pip install laspy[lazrs]")
    import laspy

    _check_las(path)
    if path.suffix.lower() == ".laz" and not laspy.LazBackend.detect_available():
        raise ObjectError(f"{path} cannot be unpacked without lazrs: pip install laspy[lazrs]")
    try:
        cloud = laspy.read(path)
    except laspy.errors.LaspyException as broken:
        raise ValueError(str(broken)) from broken
    points = np.stack([np.asarray(cloud.x), np.asarray(cloud.y), np.asarray(cloud.z)], axis=1)
    if "red" not in set(cloud.point_format.dimension_names):
        return points, None
    colors = np.stack([np.asarray(cloud[name]) for name in ("red", "green", "blue")], axis=1)
    # Sixteen bits in the format; some writers fill the lower eight only, some fill none.
    return points, colors if colors.any() else None


def _check_las(path: Path) -> None:
    """Refuses a file whose header promises more records or points than it holds."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(LAS_HEADER)
    if head[:4] != b"LASF" or len(head) < 227:
        raise ValueError("it does not begin with the header of a LAS file")
    start, records = struct.unpack_from("<II", head, 96)
    width, count = struct.unpack_from("<HI", head, 105)
    if head[25] >= 4 and len(head) >= 255:
        count = max(count, struct.unpack_from("<Q", head, 247)[0])
        extended_start, extended = struct.unpack_from("<QI", head, 235)
        if extended * LAS_RECORD > max(size - extended_start, 0):
            raise ValueError(f"it promises {extended:,} records more than its {size:,} bytes hold")
    if count > MAX_POINTS:
        raise ValueError(f"it promises {count:,} points, more than {MAX_POINTS:,}: thin it out")
    packed = path.suffix.lower() == ".laz"
    there = MAX_BYTES if packed else size - start
    if count * width > there or records * LAS_RECORD > size:
        raise ValueError(f"it promises {count:,} points, more than its {size:,} bytes hold")


def _read_ply(path: Path) -> tuple[Table, Table | None]:
    data = path.read_bytes()
    check_ply(data)
    scene = trimesh.load_scene(io.BytesIO(data), file_type="ply", process=False)
    (shape,) = scene.geometry.values()
    colors = getattr(shape, "colors", None)
    if colors is None or np.shape(colors) != (len(shape.vertices), 4):
        return np.asarray(shape.vertices), None
    return np.asarray(shape.vertices), np.asarray(colors)[:, :3]


READERS: dict[str, Callable[[Path], tuple[Table, Table | None]]] = {
    ".csv": _read_text,
    ".las": _read_las,
    ".laz": _read_las,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pcd": _read_pcd,
    ".ply": _read_ply,
    ".pts": _read_text,
    ".txt": _read_text,
    ".xyz": _read_text,
}
CLOUD_SUFFIXES = tuple(READERS)
"""Formats that `read_cloud` knows."""
