"""Turning a source's axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import TypeAdapter

from crossmost_ray.prepare.axes import axes_matrix
from crossmost_ray.prepare.config import Axes

EVERY = [
    "".join(pair for pair in map("".join, zip(signs, letters, strict=True)))
    for letters in itertools.permutations("xyz")
    for signs in itertools.product(("", "-"), repeat=3)
]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("xyz", [1, 2, 3]),
        ("+x+y+z", [1, 2, 3]),
        ("yzx", [2, 3, 1]),  # its y for x, its z for y, its x for z
        ("x-zy", [1, -3, 2]),
        ("xz-y", [1, 3, -2]),
        ("-xyz", [-1, 2, 3]),
    ],
)
def test_each_of_our_axes_takes_the_named_one(axes: str, expected: list[float]) -> None:
    point = np.array([[1, 2, 3]], np.float32)
    turned = point @ axes_matrix(axes).T
    assert turned.tolist() == [expected]
    assert turned.dtype == np.float32


def test_every_string_that_a_config_takes_is_its_own_signed_permutation() -> None:
    for axes in EVERY:
        TypeAdapter(Axes).validate_python(axes)
    matrices = np.array([axes_matrix(axes) for axes in EVERY])
    assert len(np.unique(matrices.reshape(-1, 9), axis=0)) == len(EVERY) == 48
    assert (matrices @ matrices.transpose(0, 2, 1) == np.eye(3)).all(), "lengths stay"
    determinants = np.linalg.det(matrices).round().astype(int)
    assert sorted(determinants) == [-1] * 24 + [1] * 24


@pytest.mark.parametrize("axes", ["xxz", "x-xz", "zzz", "-y+yz"])
def test_a_repeated_axis_is_refused(axes: str) -> None:
    TypeAdapter(Axes).validate_python(axes)  # its pattern alone does not see it
    with pytest.raises(ValueError, match="must name x, y and z once each"):
        axes_matrix(axes)


@pytest.mark.parametrize("axes", ["", "xy", "xyzx", "x y z", "--xyz", "xyw", "XYZ", "xyz\n"])
def test_what_is_no_axes_is_refused_with_an_example(axes: str) -> None:
    with pytest.raises(ValueError, match=r"such as 'yzx' or 'x-zy'"):
        axes_matrix(axes)
