"""Whole networks: ids in, logits out."""

from tx_lightning.models.encoder_decoder import EncoderDecoder

__all__ = ["EncoderDecoder"]
