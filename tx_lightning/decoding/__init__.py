"""Search over a step function: greedy, beam, sampling, and the filters they share."""

from tx_lightning.decoding.beam import Beam
from tx_lightning.decoding.filters import BeginWith, Filter, MinLength, NoRepeatNgram
from tx_lightning.decoding.greedy import Greedy
from tx_lightning.decoding.sampling import Sampling
from tx_lightning.decoding.search import (
    Decoding,
    DecodingState,
    Hypothesis,
    NotFinite,
    Prefill,
    Step,
)

__all__ = [
    "Beam",
    "BeginWith",
    "Decoding",
    "DecodingState",
    "Filter",
    "Greedy",
    "Hypothesis",
    "MinLength",
    "NoRepeatNgram",
    "NotFinite",
    "Prefill",
    "Sampling",
    "Step",
]
