"""Weights from outside: GPT-2, BERT, BART and Marian of Hugging Face as checkpoints, and back."""

from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.exporting import export_weights
from tx_lightning.weights.importing import import_weights

__all__ = ["WeightsError", "export_weights", "import_weights"]
