"""Labels as shards spell them in, the classes that they name out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def match_labels(labels: Sequence[str | None], classes: Sequence[str]) -> list[str | None]:
    """Gives each label the spelling of the class that it names.

    Data sets write one class apart, with underscores or run together: `night stand`, `night_stand`,
    `nightstand`. Compared as they are, all objects of a class could count as misjudged.

    Args:
        labels: As the shards have them; None for an object without one.
        classes: C names.

    Returns:
        For each label the class that is spelled the same, else the class that is spelled the same
        but for spaces and underscores, if there is just one; else the label as it is.
    """
    count = Counter(map(_letters, classes))
    spelling = {_letters(name): name for name in classes if count[_letters(name)] == 1}
    exact = set(classes)
    return [
        label if label is None or label in exact else spelling.get(_letters(label), label)
        for label in labels
    ]


def _letters(name: str) -> str:
    return re.sub(r"[\s_]+", "", name)
