"""Classification accuracy equals scikit-learn's, however the stimuli are batched and padded."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from train.evaluation.classification import ClassCounts, classification_report


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_classification_is_scikit_learns(ranks):
    rng = np.random.default_rng(0)
    classes, n = 12, 101
    names = [f"object {k}" for k in range(classes)]
    labels = rng.integers(0, classes - 1, n)  # the last class is never shown
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    counts = ClassCounts.zeros(classes)
    for rank in range(ranks):
        mine = np.arange(n)[rank::ranks]
        padded = np.concatenate([mine, np.zeros(3, int)])
        weight = torch.tensor([1.0] * len(mine) + [0.0] * 3)
        half = len(padded) // 2
        for part in (slice(None, half), slice(half, None)):
            counts.add(torch.from_numpy(logits[padded[part]]), torch.from_numpy(labels[padded[part]]), weight[part])
    block = classification_report(counts, names)
    guess = logits.argmax(axis=1)
    assert block["top1"] == pytest.approx(accuracy_score(labels, guess))
    assert block["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(classes)))
    assert block["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, guess))
    recall = recall_score(labels, guess, labels=range(classes - 1), average=None)
    assert block["per_class"] == pytest.approx(dict(zip(names, recall, strict=False)))
    json.dumps(block, allow_nan=False)


def test_fewer_classes_than_five():
    counts = ClassCounts.zeros(3)
    counts.add(torch.tensor([[3.0, 1, 2], [1, 3, 2]]), torch.tensor([0, 0]), torch.ones(2))
    block = classification_report(counts, ["a", "b", "c"])
    assert (block["top1"], block["top5"], block["per_class"]) == (0.5, 1.0, {"a": 0.5})
