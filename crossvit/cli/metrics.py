"""What an evaluation counts."""

import torch
from torch import Tensor


class Counts:
    """Right answers of the model and of each of its branches, and who was taken for whom; sums, so that processes add.

    `values` (1 + 2 (1 + branches),) int64: the images, then how many were right at first and among the first five, of
    the model and of each branch. `confusion` (classes, classes) int64: rows are the truth, columns the answers.
    """

    def __init__(self, classes: int, branches: int, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(3 + 2 * branches, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, logits: list[Tensor], targets: Tensor) -> None:
        """logits: the model's and every branch's, (B, classes) each; targets (B,)."""
        self.values[0] += len(targets)
        for i, own in enumerate(logits):
            ranked = own.topk(min(5, own.shape[1]), dim=1).indices
            right = (ranked == targets[:, None]) & ~own.isnan().any(dim=1, keepdim=True)  # NaN is never right
            self.values[1 + 2 * i] += right[:, 0].sum()
            self.values[2 + 2 * i] += right.sum()
            if i == 0:
                cells = targets * len(self.confusion) + ranked[:, 0]
                self.confusion += cells.bincount(minlength=self.confusion.numel()).view_as(self.confusion)

    @property
    def images(self) -> int:
        return int(self.values[0])

    def accuracies(self) -> list[tuple[float, float]]:
        """(top-1, top-5) of the model and of every branch, in percent; NaN without images."""
        shares = 100 * self.values[1:].double() / self.values[0]
        return [(float(one), float(five)) for one, five in shares.view(-1, 2)]
