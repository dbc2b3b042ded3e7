"""Classification accuracy, counted per class and summed over ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.distributed.runtime import Runtime


@dataclass(frozen=True)
class ClassCounts:
    """Stimuli shown of each class, and how many of them were classified correctly.

    Attributes: all int64 (classes,), on the device.
        shown: stimuli of the class.
        top1: those whose class was the likeliest.
        top5: those whose class was among the five likeliest.
    """

    shown: torch.Tensor
    top1: torch.Tensor
    top5: torch.Tensor

    @classmethod
    def zeros(cls, classes: int, device: torch.device | str = "cpu") -> "ClassCounts":
        """Before any stimulus was seen."""
        shown, top1, top5 = torch.zeros(3, classes, dtype=torch.int64, device=device)
        return cls(shown, top1, top5)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> None:
        """Count a batch: logits (stimuli, classes), labels (stimuli,), weight (stimuli,), 0 for padding."""
        likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        counts = (weight > 0).long()
        correct = (likeliest == labels[:, None]).long() * counts[:, None]
        self.shown.index_add_(0, labels, counts)
        self.top1.index_add_(0, labels, correct[:, 0])
        self.top5.index_add_(0, labels, correct.sum(1))

    def over_ranks(self, runtime: Runtime) -> "ClassCounts":
        """The counts of all ranks together, the same on every rank; one exchange."""
        shown, top1, top5 = runtime.sum(torch.stack((self.shown, self.top1, self.top5)))
        return ClassCounts(shown, top1, top5)

    def accuracy(self) -> float:
        """Share of the stimuli whose class was the likeliest."""
        return float(self.top1.sum() / self.shown.sum())


def classification_report(counts: ClassCounts, classes: list[str]) -> dict[str, Any]:
    """The `classification` block of metrics.json.

    Args:
        counts: of all ranks.
        classes: names, in label order.
    """
    shown, top1, top5 = (tensor.cpu().numpy() for tensor in (counts.shown, counts.top1, counts.top5))
    present = shown > 0
    recall = top1[present] / shown[present]
    return {
        "top1": float(top1.sum() / shown.sum()),
        "top5": float(top5.sum() / shown.sum()),
        "balanced_accuracy": float(recall.mean()),
        "per_class": {classes[index]: float(top1[index] / shown[index]) for index in np.flatnonzero(present)},
    }
