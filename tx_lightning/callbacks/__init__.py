"""Lightning callbacks, one per file; none is needed, all can be combined."""

from tx_lightning.callbacks.lr_warmup import LRWarmup

__all__ = ["LRWarmup"]
