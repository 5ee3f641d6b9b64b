"""Folders of results as a run and a sweep leave them, without training anything.

Votes and predictions are drawn at random around a truth; what is counted of them is counted by the
project's own evaluation, so that its files have its format.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from crossmost_ray.config import AdaptConfig, EvaluationConfig, config_dict, load_config
from crossmost_ray.schema import SHARD_SCHEMA
from crossmost_ray.training.votes import VOTES_SCHEMA

CLASSES = ("bed", "chair", "desk", "lamp", "plant", "shelf", "sofa", "table")
TERMS = ("self_training_image", "self_training_point", "fairness_image", "fairness_point")
VERSIONS = {"crossmost_ray": "0.1", "ray": "2.60.0", "torch": "2.9.0"}

State = Literal["done", "running", "interrupted", "failed", "stopped", "empty"]


def write_run(
    folder: Path,
    *,
    state: State = "done",
    epochs: int = 4,
    objects: int = 90,
    classes: Sequence[str] = CLASSES,
    shards: Path | None = None,
    labels: bool = True,
    skill: float = 0.7,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    towers: Sequence[str] = ("image", "point"),
    name: str | None = None,
) -> Path:
    """Writes the folder of a run.

    Args:
        folder: Made if it is missing.
        state: `empty` is a run that has only just begun.
        epochs: Finished ones; a run that is not done has half of them.
        objects: Objects adapted to, if no shards are given.
        classes: C names.
        shards: Folder of shards whose objects are voted on; None writes one without points beside
            the run, if `labels`.
        labels: Whether a label is within reach: without, there is no evaluation of accuracy.
        skill: Share of right votes in the last epoch, about.
        seed: Other votes for another one.
        settings: Dotted keys that differ from the furniture config.
        towers: Those that are trained.
        name: Of the run; None takes the folder's.
    """
    name = name or folder.name
    if shards is None and labels:
        shards = write_labels(folder.parent / f".{folder.name}-shards", objects, classes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = run_config(name, shards or folder / "no-such-shards", settings or {})
    _write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    ids, truth = _objects(shards, objects, classes, seed)
    finished = {"done": epochs, "empty": 0}.get(state, epochs // 2)
    command = ["python", "jobs/adapt.py", "configs/adapt/furniture.yaml", f"name={name}"]
    _json(
        folder / "run.json",
        {
            "command": command,
            "started": _time(-3600),
            "versions": VERSIONS,
            "host": "node-1",
            "num_objects": len(ids),
            "steps_per_epoch": 34,
        },
    )
    _json(folder / "status.json", status(state))
    if state == "empty":
        return folder
    _json(folder / "classes.json", list(classes))
    _lines(folder / "metrics.jsonl", metric_rows(finished, skill=skill, seed=seed, towers=towers))
    _lines(folder / "events.jsonl", events(state))
    if state == "running":
        _json(folder / "progress.json", {"epoch": finished, "step": 34 * finished + 5, "eta_s": 81})
    write_votes(folder / "votes", ids, truth, finished, len(classes), skill, seed, towers)
    if state == "done" and labels:
        splits = {"transductive": truth, "test": np.arange(160) % len(classes)}
        write_evaluation(folder, {"zero-shot": skill - 0.15, "teacher": skill}, splits, classes)
    return folder


def write_sweep(
    folder: Path,
    *,
    trials: int = 8,
    state: State = "done",
    detailed: int = 4,
    evaluated: bool = True,
    epochs: int = 3,
    seed: int = 0,
) -> Path:
    """Writes the folder of a sweep whose score depends on the threshold, and little on the rest.

    Args:
        folder: Made if it is missing.
        trials: Of each ten, the seventh fails and the fifth is stopped by the scheduler; in a
            running sweep the last is running and the one before it runs with it.
        state: Of the sweep.
        detailed: Trials that have votes, too.
        evaluated: Whether finished trials were measured.
        epochs: Of a finished trial.
        seed: Other scores for another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base = run_config("furniture", folder / "no-such-shards", {})
    _write(
        folder / "sweep.yaml",
        yaml.safe_dump(
            {
                "name": folder.name,
                "base": "configs/adapt/furniture.yaml",
                "overrides": {"optim.epochs": epochs},
                "metric": "selection/score",
                "num_trials": trials,
                "base_config": base,
            },
            sort_keys=False,
        ),
    )
    command = ["python", "jobs/sweep.py", "configs/sweep/threshold.yaml"]
    _json(folder / "run.json", {"command": command, "started": _time(-600), "versions": VERSIONS})
    _json(folder / "status.json", status(state) | {"stage": "trials"})
    entries = [trial_entry(place, rng, epochs=epochs) for place in range(trials)]
    if state == "running":
        for entry in entries[-2:]:
            entry |= {"status": "running", "epochs": 1, "error": None}
    write_ledger(folder, entries)
    # One config for all: to write a thousand takes longer than what is tested.
    config = yaml.safe_dump(base, sort_keys=False)
    for place, entry in enumerate(entries):
        trial = folder / "trials" / entry["trial"]
        if place < detailed or entry["status"] == "running":
            status_of: State = entry["status"] if entry["status"] != "pending" else "empty"
            write_run(
                trial,
                state=status_of,
                epochs=epochs,
                settings=entry["settings"],
                labels=False,
                seed=place,
            )
            continue
        trial.mkdir(parents=True, exist_ok=True)
        _write(trial / "config.yaml", config.replace("name: furniture", f"name: {trial.name}"))
        rows = metric_rows(entry["epochs"], skill=entry["score"] or 0.3, seed=place)
        _lines(trial / "metrics.jsonl", rows)
    done = [entry for entry in entries if entry["status"] == "done"]
    if state == "done":
        best = max(done, key=lambda entry: entry["score"])
        _json(folder / "summary.json", {"best": best["trial"], "metric": "selection/score"})
        _write(folder / "best.yaml", yaml.safe_dump(base))
        if evaluated:
            models = {"zero-shot": 0.55} | {entry["trial"]: 0.4 + entry["score"] for entry in done}
            splits = {"test": np.arange(120) % len(CLASSES)}
            write_evaluation(folder / "evaluation", models, splits, CLASSES)
    return folder


def trial_entry(place: int, rng: np.random.Generator, *, epochs: int = 3) -> dict[str, Any]:
    """One entry of a ledger. The score is the higher the nearer the threshold is to 0.7."""
    threshold = float(rng.choice([0.5, 0.6, 0.7, 0.8, 0.9]))
    settings = {
        "pseudo_labels.threshold": threshold,
        "ema.start": round(float(rng.uniform(0.8, 0.99)), 4),
        "optim.lr": float(f"{10 ** rng.uniform(-5, -3):.3g}"),
        "model": str(rng.choice(["models/small", "models/large"])),
        "seed": int(rng.integers(0, 5)),
    }
    score = 0.42 - abs(threshold - 0.7) + float(rng.normal(0, 0.02))
    status_of = {7: "failed", 5: "stopped"}.get(place % 10, "done")
    failed = status_of == "failed"
    return {
        "trial": f"trial-{place:05d}",
        "settings": settings,
        "status": status_of,
        "epochs": {"done": epochs, "stopped": 1, "failed": 0}[status_of],
        "score": None if failed else round(score, 6),
        "seconds": 5.0 if failed else round(60 + float(rng.uniform(0, 60)), 2),
        "error": "the loss is not finite at step 12; lower optim.lr" if failed else None,
        "started": _time(-500 + place),
    }


def write_ledger(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes `trials.json` whole, as a sweep does."""
    fresh = folder / "trials.json.new"
    _json(fresh, {"trials": list(entries)})
    fresh.replace(folder / "trials.json")


def run_config(name: str, shards: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The furniture config, spelled out, with dotted keys set."""
    overrides = [f"name={name}", f"data.shards={shards}", "data.test_shards=null"]
    overrides += ["data.open_set_shards=null"]
    overrides += [f"{key}={value}" for key, value in settings.items()]
    config = load_config(AdaptConfig, "configs/adapt/furniture.yaml", overrides)
    return config_dict(config)


def status(state: State) -> dict[str, Any]:
    """What `status.json` holds of a run in a state."""
    ago = 3600 if state == "interrupted" else 2
    said = {"interrupted": "running", "empty": "running"}.get(state, state)
    error = "ConfigError: the shard part-00003.parquet is damaged" if state == "failed" else None
    return {"status": said, "heartbeat": _time(-ago), "error": error, "stage": "training"}


def metric_rows(
    epochs: int, *, skill: float, seed: int, towers: Sequence[str] = ("image", "point")
) -> list[dict[str, float]]:
    """Rows of epochs: losses fall, scores rise."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for epoch in range(epochs):
        done = (epoch + 1) / max(1, epochs)
        terms = [term for term in TERMS if term.rpartition("_")[2] in towers]
        losses = {f"loss/{t}": 2.2 - 0.9 * done + 0.05 * float(rng.normal()) for t in terms}
        score = skill * (0.6 + 0.4 * done)
        row = {
            "epoch": epoch,
            "step": 34 * (epoch + 1),
            "seconds": 20.0 + float(rng.uniform(0, 3)),
            "pairs_per_s": 52.0 + float(rng.normal()),
            "objects_per_s": 4.5 + 0.1 * float(rng.normal()),
            "num_workers": 2,
            "loss": sum(losses.values()),
            **losses,
            **{f"pseudo/selected_{tower}": 0.3 + 0.5 * done for tower in towers},
            "data/wait_share": 0.06 + 0.02 * float(rng.uniform()),
            "system/memory_mb": 900.0 + 12 * epoch,
            "selection/score": score,
            "selection/information": 0.9 * score,
            "selection/student": 0.7 + 0.2 * done,
            "health/confident": 0.3 + 0.5 * done,
            "health/classes_used": 5.0 + 2 * done,
            "health/never_confident": max(0, 2 - epoch),
        }
        if len(towers) == 2:
            row |= {"selection/agreement": 0.5 + 0.3 * done, "teacher/agreement": 0.5 + 0.2 * done}
        if epoch:
            row |= {"health/flips": 0.3 / (epoch + 1), "selection/persistence": 0.6 + 0.3 * done}
        rows.append(row)
    return rows


def events(state: State) -> list[dict[str, Any]]:
    """What befell a run in a state."""
    log: list[dict[str, Any]] = [
        {"time": _time(-3600), "event": "started", "num_workers": 2, "step": 0}
    ]
    if state in ("done", "failed"):
        log.append({"time": _time(-3000), "event": "workers lost", "workers": {"1": "node died"}})
        log.append({"time": _time(-2990), "event": "started", "num_workers": 1, "step": 34})
    if state == "stopped":
        said = "2 of 8 classes take all labels"
        log.append(
            {
                "time": _time(-2000),
                "event": "health",
                "kind": "collapse",
                "action": "stop",
                "epoch": 1,
                "says": said,
            }
        )
        log.append({"time": _time(-1999), "event": "stopped early", "epoch": 1, "says": said})
    return log


def write_votes(
    folder: Path,
    ids: Sequence[str],
    truth: np.ndarray,
    epochs: int,
    num_classes: int,
    skill: float,
    seed: int,
    towers: Sequence[str] = ("image", "point"),
) -> None:
    """Writes the votes of every epoch; the last class is never one that the towers are sure of."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.argsort(np.array(ids))
    truth, n = truth[order], len(ids)
    luck = np.random.default_rng([seed, 2]).random((2, n))
    other = np.random.default_rng([seed, 3]).integers(1, num_classes, (2, n))
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, 4, epoch])
        now = skill * (0.75 + 0.25 * (epoch + 1) / epochs)
        right = luck < np.array([[now], [now - 0.06]])
        said = np.where(right, truth, (truth + other) % num_classes).astype(np.int16)
        sure = np.clip(rng.beta(5, 2, (2, n)) * np.where(right, 1.0, 0.75), 0.15, 0.999)
        sure = np.where(said == num_classes - 1, 0.4 * sure, sure).astype(np.float32)
        if "point" not in towers:
            first = np.zeros(n, np.int64)
        elif "image" not in towers:
            first = np.ones(n, np.int64)
        else:
            first = sure.argmax(axis=0)
        label, confidence = said[first, np.arange(n)], sure[first, np.arange(n)]
        columns: dict[str, Any] = {"object_id": [ids[k] for k in order]}
        for place, tower in enumerate(("image", "point")):
            trained = tower in towers
            columns |= {
                f"{tower}_class": said[place] if trained else [None] * n,
                f"{tower}_confidence": sure[place] if trained else [None] * n,
                f"{tower}_label": label if trained else [None] * n,
                f"{tower}_selected": confidence > 0.6 if trained else [None] * n,
                f"student_{tower}_class": said[place] if trained else [None] * n,
            }
        columns["label_confidence"] = confidence
        table = pa.table({name: columns[name] for name in VOTES_SCHEMA.names}, schema=VOTES_SCHEMA)
        pq.write_table(table, folder / f"epoch-{epoch:04d}.parquet")


def write_evaluation(
    folder: Path,
    models: Mapping[str, float],
    splits: Mapping[str, np.ndarray],
    classes: Sequence[str],
) -> None:
    """Writes metrics, confusions and predictions of models of some skill, as a measurement does."""
    from crossmost_ray.evaluation.counts import count_table
    from crossmost_ray.evaluation.summary import confusion_table, summarize

    folder.mkdir(parents=True, exist_ok=True)
    counted = {}
    for split, truth in splits.items():
        tables, sums = [], {}
        for model, skill in models.items():
            table, sums[model] = _predictions(split, truth, classes, model, skill)
            tables.append(table)
        predictions = pa.concat_tables(tables)
        counted[split] = count_table(
            predictions, list(models), classes, probability=sums, confident=0.6
        )
        (folder / "predictions" / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(predictions, folder / "predictions" / split / "part-00000.parquet")
    names = {split: list(classes) for split in splits}
    pq.write_table(confusion_table(counted, names), folder / "confusion.parquet")
    _json(folder / "metrics.json", summarize(counted, names, list(models)))


def write_labels(folder: Path, objects: int, classes: Sequence[str], seed: int) -> Path:
    """Writes shards of objects that have a label and a single point."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "object_id": f"object/{seed}-{place:06d}",
            "captions": [],
            "label": classes[place % len(classes)],
            "points": [[0.0, 0.0, 0.0]],
            "views": [],
        }
        for place in range(objects)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), folder / "part-00000.parquet")
    return folder


def _objects(
    shards: Path | None, objects: int, classes: Sequence[str], seed: int
) -> tuple[list[str], np.ndarray]:
    if shards is None:
        ids = [f"object/{seed}-{place:06d}" for place in range(objects)]
        return ids, np.arange(objects) % len(classes)
    tables = [
        pq.read_table(file, columns=["object_id", "label"])
        for file in sorted(shards.glob("*.parquet"))
    ]
    table = pa.concat_tables(tables)
    names = {name: place for place, name in enumerate(classes)}
    labels = [names.get(label, 0) for label in table["label"].to_pylist()]
    return table["object_id"].to_pylist(), np.array(labels)


def _predictions(
    split: str, truth: np.ndarray, classes: Sequence[str], model: str, skill: float
) -> tuple[pa.Table, dict[str, list[float]]]:
    """What a model says of objects, and the sum of its probabilities by opinion."""
    from crossmost_ray.evaluation.predictor import prediction_schema

    C, n = len(classes), len(truth)
    seed = sum(model.encode()) + 1000 * sum(split.encode())
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "object_id": [f"{split}/{place:06d}" for place in range(n)],
        "label": [classes[k] for k in truth],
        "model": [model] * n,
    }
    towers = []
    for _ in range(2):
        logits = rng.normal(0, 1, (n, C))
        logits[np.arange(n), truth] += 4 * skill - 1
        towers.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    sums = {}
    for opinion, prob in zip(("image", "point", "fused"), (*towers, sum(towers) / 2), strict=True):
        ranked = prob.argsort(axis=1)[:, ::-1][:, :5]
        columns[f"ranked_{opinion}"] = [[classes[k] for k in row] for row in ranked]
        columns[f"confidence_{opinion}"] = prob.max(axis=1).astype(np.float32)
        columns[f"entropy_{opinion}"] = -(prob * np.log(prob)).sum(axis=1).astype(np.float32)
        sums[opinion] = prob.sum(axis=0).tolist()
    schema = prediction_schema(EvaluationConfig())
    return pa.table({name: columns[name] for name in schema.names}, schema=schema), sums


def _time(offset_s: float) -> str:
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset_s)
    return now.isoformat(timespec="seconds")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))
