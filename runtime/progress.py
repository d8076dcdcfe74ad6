"""A run's progress, and its guard against steps that are not finite."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.cli import UsageError, need

MAX_SKIPPED = 10  # in a row, after which a run ends
BEFORE = "any checkpoint was saved before that: if it happens again, resume with a lower --lr and --changed"
# Names in last.pth -> attributes of Progress
SAVED = {"step": "step", "streak": "skipped_in_a_row", "taken": "steps_done", "skipped": "skipped", "sums": "sums"}


class Progress:
    """Steps done, and statistics of the epoch so far. All of it is in last.pth."""

    def __init__(self):
        self.step = 0  # of the whole run
        self.skipped_in_a_row = self.steps_done = self.skipped = 0  # the latter two in this epoch
        self.sums: dict[str, float] = {}  # of statistics over this epoch's steps, averaged over ranks
        self.pending: dict[str, Tensor] = {}  # this rank's, since the last gather()

    def state_dict(self) -> dict:
        return {key: getattr(self, name) for key, name in SAVED.items()}

    def load_state_dict(self, state: dict):
        for key, name in SAVED.items():
            setattr(self, name, state[key])

    def add(self, stats: dict[str, Tensor], finite: bool):
        """Count a step. The statistics stay on the device."""
        self.step += 1
        if not finite:
            self.skipped_in_a_row, self.skipped = self.skipped_in_a_row + 1, self.skipped + 1
            return
        self.skipped_in_a_row, self.steps_done = 0, self.steps_done + 1
        for name, value in stats.items():
            self.pending[name] = self.pending.get(name, 0) + value.double()

    def gather(self):
        """Average the pending statistics over ranks and add them to the sums."""
        if not self.pending:
            return
        total, world = torch.stack(list(self.pending.values())), 1
        if dist.is_initialized():
            world = dist.get_world_size()
            dist.all_reduce(total)
        for name, value in zip(self.pending, total.tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0) + value / world
        self.pending = {}

    def close_epoch(self, batch_size: int) -> dict[str, float]:
        """The epoch's mean statistics, unreadable images and skipped steps; counting starts again."""
        record = {name: value / max(self.steps_done, 1) for name, value in self.sums.items()}
        record["unreadable"] = round(record.get("unreadable", 0) * self.steps_done * batch_size)
        record["skipped"] = self.skipped
        self.sums, self.steps_done, self.skipped = {}, 0, 0
        return record


class NonFiniteGuard:
    """Keeps loss, gradients and weights that are not finite out of the model and its checkpoints."""

    def __init__(self, model: nn.Module, progress: Progress):
        self.parameters, self.progress = list(model.parameters()), progress
        self.statistics = [b for b in model.buffers() if b.is_floating_point()]  # of batch norm

    def remember(self):
        """Save batch norm's statistics before the forward pass updates them."""
        self.before = torch._foreach_add(self.statistics, 0)

    def finite(self, loss: Tensor) -> Tensor:
        """Whether this rank's loss and gradients are finite, as a bool tensor."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).isfinite().all() & loss.isfinite()

    def undo(self):
        """Skip this step. Raises UsageError after MAX_SKIPPED skipped steps in a row."""
        torch._foreach_copy_(self.statistics, self.before)
        if self.progress.skipped_in_a_row + 1 == MAX_SKIPPED:
            steps = f"{MAX_SKIPPED} steps in a row, up to step {self.progress.step + 1},"
            raise UsageError(f"{steps} gave a loss or gradients that are not finite; {BEFORE}")

    def check_weights(self):
        """Raises UsageError if any weight is not finite, so that it is never saved."""
        finite = torch.stack(torch._foreach_norm(self.parameters)).isfinite().all()
        need(finite, f"the weights are not finite after step {self.progress.step}; {BEFORE}")
