"""LightningModules, one per task."""

from tx_lightning.tasks.classification import Classification
from tx_lightning.tasks.denoising import Denoising
from tx_lightning.tasks.language_modeling import LanguageModeling
from tx_lightning.tasks.masked_language_modeling import MaskedLanguageModeling
from tx_lightning.tasks.tagging import Tagging
from tx_lightning.tasks.task import Task
from tx_lightning.tasks.translation import Translation

__all__ = [
    "Classification",
    "Denoising",
    "LanguageModeling",
    "MaskedLanguageModeling",
    "Tagging",
    "Task",
    "Translation",
]
