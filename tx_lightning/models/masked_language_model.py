"""The masked language model that pretrains a `TextEncoder` (BERT, Devlin et al. 2019, section 3.1).

Shapes: B batch, T length, D d_model, V vocabulary.
"""

from torch import Tensor, nn

from tx_lightning.models.classifier import EncoderFactory
from tx_lightning.models.text_encoder import TextEncoder, initialize
from tx_lightning.nn.layers import LayeredNetwork, NormFactory, build_norm
from tx_lightning.nn.linear import Linear


class MaskedLanguageModel(LayeredNetwork):
    """Logits of the token at each place: norm(GELU(W h + b)) times the embedding table, plus bias.

    Args:
        vocab_size: Rows of the embedding table.
        encoder: Builds the encoder from vocab_size.
        norm: The norm before the output projection: `torch.nn.LayerNorm` or `torch.nn.RMSNorm`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        encoder: EncoderFactory = TextEncoder,
        norm: NormFactory = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.encoder = encoder(vocab_size)
        d_model = self.encoder.d_model
        self.transform = Linear(d_model, d_model)
        self.activation = nn.GELU()
        self.norm = build_norm(norm, d_model)
        self.output = Linear(d_model, vocab_size)
        self.output.weight = self.encoder.embedding.tokens.weight
        initialize(self.transform, self.encoder.init_std)

    def forward(
        self, ids: Tensor, segments: Tensor | None = None, *, padded: bool = True
    ) -> Tensor:
        """Return the logits (B, T, V) of the token at each place of ids (B, T).

        `padded` is that of `TextEncoder`.
        """
        return self.output(self.hidden(ids, segments, padded=padded))

    def hidden(self, ids: Tensor, segments: Tensor | None = None, *, padded: bool = True) -> Tensor:
        """Return what the output projection is applied to, (B, T, D); arguments as `forward`."""
        x = self.encoder(ids, segments, padded=padded)
        return self.norm(self.activation(self.transform(x)))

    @property
    def output_weight(self) -> Tensor:
        """The output projection, (V, D)."""
        return self.output.weight

    @property
    def output_bias(self) -> Tensor:
        """What is added to the logits, (V,)."""
        return self.output.bias
