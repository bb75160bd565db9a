"""LightningModules, one per task."""

from tx_lightning.tasks.translation import Translation

__all__ = ["Translation"]
