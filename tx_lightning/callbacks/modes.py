"""Training or evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every submodule in training or evaluation mode, and afterwards back into its own.

    Args:
        module: The module.
        training: Which of the two.
    """
    before = {child: child.training for child in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for child, was_training in before.items():
            child.training = was_training
