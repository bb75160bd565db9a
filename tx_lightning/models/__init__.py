"""Whole networks: ids in, logits out."""

from tx_lightning.models.classifier import Classifier, EncoderFactory, Tagger
from tx_lightning.models.encoder_decoder import EncoderDecoder
from tx_lightning.models.language_model import LanguageModel, LanguageModelState
from tx_lightning.models.masked_language_model import MaskedLanguageModel
from tx_lightning.models.text_encoder import TextEncoder

__all__ = [
    "Classifier",
    "EncoderDecoder",
    "EncoderFactory",
    "LanguageModel",
    "LanguageModelState",
    "MaskedLanguageModel",
    "Tagger",
    "TextEncoder",
]
