"""Hides messages of the libraries that do not apply to this package."""

from __future__ import annotations

import logging
import warnings

IGNORED_WARNINGS = (
    r".*isinstance.treespec, LeafSpec.. is deprecated",
    "torch.distributed.nn.functional.all_gather is deprecated",  # called by Lightning 2.6
    ".*does not have many workers",
    "The number of training batches",
    "The `srun` command is available on your system but is not used",
    "GPU available but not used",
    "Found .* in eval mode at the start of training",
    "It is recommended to use .* when logging on epoch level in distributed setting",  # all ranks log the same
    "Total length of `list` across ranks is zero",
    r"\s*(\S+( parameter)? was deprecated in v4|By default only one Jsonargparse)",  # called by Lightning 2.6
    "Checkpoint directory .* exists and is not empty",
    ".*configure_optimizers. returned .None., this fit will run with no optimizer",  # a closed form needs none
    ".*training_step. returned .None.",
    "`max_epochs` was not set",
    "Experiment logs directory .* exists and is not empty",
    "You're resuming from a checkpoint that ended before the epoch ended",
)
IGNORED_INFO = (
    "💡 Tip",
    "GPU available: False",  # the device is said once
    "Restoring states from the checkpoint path",
    "Loaded model weights from the checkpoint",
    "Restored all states from the checkpoint",
    "TPU available",
    "HPU available",
    "Seed set to",
    "\nDetected KeyboardInterrupt",
    "`Trainer.fit` stopped",
)


def keep_advice_quiet() -> None:
    """Hide Lightning's advice on the terminal."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_worth_saying)
    logging.getLogger("filelock").setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(IGNORED_INFO)
