"""Pure torch building blocks: no Lightning, no tokenizer, no YAML."""

from tx_lightning.nn.attention import MultiHeadAttention, naive_attention, record_attention
from tx_lightning.nn.feed_forward import (
    GELUFeedForward,
    ReLUFeedForward,
    SwiGLUFeedForward,
    SwishFeedForward,
)
from tx_lightning.nn.layers import DecoderLayer, EncoderLayer
from tx_lightning.nn.positions import (
    AlibiPositions,
    LearnedPositions,
    NoPositions,
    Positions,
    RotaryPositions,
    SinusoidalPositions,
    T5RelativePositions,
)

__all__ = [
    "AlibiPositions",
    "DecoderLayer",
    "EncoderLayer",
    "GELUFeedForward",
    "LearnedPositions",
    "MultiHeadAttention",
    "NoPositions",
    "Positions",
    "ReLUFeedForward",
    "RotaryPositions",
    "SinusoidalPositions",
    "SwiGLUFeedForward",
    "SwishFeedForward",
    "T5RelativePositions",
    "naive_attention",
    "record_attention",
]
