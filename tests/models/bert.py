"""Small models of Hugging Face's BERT with random weights, and those weights under our names."""

import torch
from torch import Tensor, nn
from transformers import BertConfig

VOCABULARY, D_MODEL, N_HEADS, D_FF, MAX_LENGTH, PAD_ID = 19, 16, 4, 24, 12, 0

NAMES = {
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "norm",
    "cls.predictions.decoder": "logits",
    "bert.pooler.dense": "pooler",
    "classifier": "head",
    "encoder.layer.": "layers.",
    "bert.": "encoder.",
    "embeddings.word_embeddings": "embedding.tokens",
    "embeddings.token_type_embeddings": "embedding.segments",
    "embeddings.position_embeddings.weight": "positions.table",
    "embeddings.LayerNorm": "embedding.norm",
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "attention_residual.norm",
    "intermediate.dense": "feed_forward.inner",
    "output.LayerNorm": "feed_forward_residual.norm",
    "output.dense": "feed_forward.outer",
    "logits": "output",
}


def config(activation: str = "gelu", eps: float = 1e-5, n_labels: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        intermediate_size=D_FF,
        hidden_act=activation,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MAX_LENGTH,
        layer_norm_eps=eps,
        pad_token_id=PAD_ID,
        num_labels=n_labels,
    )


def randomized(model: nn.Module) -> dict[str, Tensor]:
    """Draw all weights of a BERT anew, and return them under our names."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs, ours = model.state_dict(), {}
    for key, value in theirs.items():
        if ".self.key." in key or ".self.value." in key or key == "cls.predictions.bias":
            continue  # joined to the queries below; the bias is there twice
        if ".self.query." in key:
            parts = [theirs[key.replace("query", part)] for part in ("query", "key", "value")]
            key, value = (
                key.replace("attention.self.query", "self_attention.input"),
                torch.cat(parts),
            )
        for old, new in NAMES.items():
            key = key.replace(old, new)
        ours[key] = value
    return ours
