"""Lightning callbacks, one per file; none is needed, all can be combined."""

from tx_lightning.callbacks.attention_logging import AttentionLogger
from tx_lightning.callbacks.checkpoint_averaging import CheckpointAveraging
from tx_lightning.callbacks.class_report import ClassReport
from tx_lightning.callbacks.goal import Goal
from tx_lightning.callbacks.longest_batch import LongestBatch
from tx_lightning.callbacks.lr_warmup import LRWarmup
from tx_lightning.callbacks.sample_logging import SampleLogger
from tx_lightning.callbacks.throughput import Throughput

__all__ = [
    "AttentionLogger",
    "CheckpointAveraging",
    "ClassReport",
    "Goal",
    "LRWarmup",
    "LongestBatch",
    "SampleLogger",
    "Throughput",
]
