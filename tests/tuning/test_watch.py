"""What a sweep's driver notes of its trials: the score is that of the epoch that is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.tuning.ledger import Ledger
from crossmost_ray.tuning.trial import EPOCHS, OF_EPOCHS, SECONDS
from crossmost_ray.tuning.watch import Watch

OTHER = "selection/agreement"
EPOCHS_OF_A_TRIAL = [(0.3, 0.5), (0.6, 0.4), (0.1, 0.9)]
"""Score and agreement."""


@pytest.mark.parametrize(
    ("metric", "keeps_best", "expected"),
    [(SCORE, True, 0.6), (SCORE, False, 0.1), (OTHER, True, 0.4), (OTHER, False, 0.9)],
)
def test_a_trials_score_is_that_of_the_epoch_that_is_its_result(
    tmp_path: Path, metric: str, keeps_best: bool, expected: float
) -> None:
    ledger = Ledger.start(Store(str(tmp_path)), [{"seed": 1}])
    watch = Watch(ledger, metric, keeps_best=keeps_best)
    trial = SimpleNamespace(config={"trial": "trial-00000", "settings": {"seed": 1}})
    for done, (score, agreement) in enumerate(EPOCHS_OF_A_TRIAL, start=1):
        told = {EPOCHS: done, OF_EPOCHS: 3, SECONDS: 2.0 * done}
        watch.on_trial_result(done, [], trial, {SCORE: score, OTHER: agreement, **told})
    entry = Ledger.read(Store(str(tmp_path))).entries["trial-00000"]
    assert (entry.score, entry.epochs, entry.seconds) == (expected, 3, 6.0)
