"""Search for the outputs of an encoder-decoder, the same for every task that has one.

Shapes: B batch, S source length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tx_lightning.data.tokenizers import Tokenizer
from tx_lightning.decoding import Decoding, Hypothesis
from tx_lightning.models import EncoderDecoder


def search(
    network: EncoderDecoder,
    decoding: Decoding,
    source: Tensor,
    tokenizer: Tokenizer,
    indices: Sequence[int] | None = None,
    *,
    padded: bool = True,
) -> list[list[Hypothesis]]:
    """Decode sources: for each its hypotheses, the best first.

    Args:
        network: In evaluation mode.
        decoding: How to search.
        source: (B, S) ids with EOS, padded at the right; B > 0.
        tokenizer: Of the target side.
        indices: Names of the sources, so that what is sampled for one does not depend on the batch.
        padded: Whether there may be padding.
    """
    lengths = (source != network.pad_id).sum(1)
    state = network.start(source, padded=padded)
    most = network.decoder.positions.max_length
    return decoding(
        network.step,
        state,
        lengths,
        max_lengths=None if most is None else torch.full_like(lengths, most),
        indices=indices,
        vocabulary_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
