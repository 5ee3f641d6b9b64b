"""What the tests of the jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.runs import write_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with the shards and the model of a small run."""
    return write_inputs(tmp_path)
