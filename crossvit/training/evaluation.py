"""Loss and accuracy over the validation images, exact over processes."""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.images import ImageError
from .distributed import Processes


def evaluate(
    model: nn.Module, loader: DataLoader, place: Processes, autocast: AbstractContextManager, multi_label: bool
) -> dict[str, float]:
    """{"loss", "top1", "top5"} or, with several labels per image, {"loss", "map"}, in percent, of every image once.

    loader: batches of (images, targets, counts). The model comes back in the mode it was in. With fewer than 6
    classes there is no "top5".
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # images, loss, right at the first, among the first five
    scores: list[Tensor] = []
    classes = 0
    for images, targets, counts in loader:
        images, targets = (x.to(place.device, non_blocking=True) for x in (images, targets))
        with torch.no_grad(), autocast:
            logits = model(images)
        logits, targets, classes = logits.float()[counts], targets[counts], logits.shape[1]
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
            right = logits.new_zeros(2)
            scores.append(torch.stack([logits, targets]).cpu())
        else:
            loss = F.cross_entropy(logits, targets, reduction="none")
            ranks = (~(logits <= logits.gather(1, targets[:, None]))).sum(dim=1)  # NaN is never right
            right = torch.stack([(ranks < 1).sum(), (ranks < 5).sum()])
        sums += torch.cat([torch.stack([loss.new_tensor(len(logits)), loss.sum()]).double(), right.double()]).cpu()
    model.train(was_training)
    count, loss, top1, top5 = place.sum(sums).tolist()
    if not count:
        raise ImageError("none of the validation images can be read")
    found = {"loss": loss / count}
    if multi_label:
        everywhere = torch.cat([part for parts in place.gather(scores) for part in parts], dim=1)
        return found | {"map": 100 * mean_average_precision(everywhere[0], everywhere[1])}
    found["top1"] = 100 * top1 / count
    return found | {"top5": 100 * top5 / count} if classes > 5 else found


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """The mean over the classes with positive labels of the average precision of scores (N, C) for labels (N, C).

    Equal scores are one threshold, as scikit-learn counts them. NaN without any positive label.
    """
    precisions = []
    for score, label in zip(scores.T.double(), labels.T.double()):
        if label.sum() == 0:
            continue
        order = score.argsort(descending=True, stable=True)
        score, label = score[order], label[order]
        last = torch.cat([score[1:] != score[:-1], torch.tensor([True])])  # of each run of equal scores
        found = label.cumsum(0)[last]
        precision = found / (torch.arange(len(score))[last] + 1)
        precisions.append((precision * found.diff(prepend=found.new_zeros(1))).sum() / label.sum())
    return torch.stack(precisions).mean().item() if precisions else float("nan")
