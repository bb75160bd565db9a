"""Small models of transformers with random weights, small tokenizers, and folders of both."""

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    BertConfig,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    MarianConfig,
    MarianMTModel,
)

from tx_lightning.checkpoints import RECORD, checkpoint_record, load_task, write_atomically
from tx_lightning.data.batches import padded, row_ids
from tx_lightning.data.tokenizers import Tokenizer, Tokenizers, TokenizerTrainer, Words
from tx_lightning.tasks import Task
from tx_lightning.weights.importing import build_task

ROWS = 320  # of the tables: more than the tokenizers have entries
TEXTS = ["the quick brown fox jumps over the lazy dog.", "Hello world! Straße, naïve café"] * 20
OTHERS = ["der schnelle braune Fuchs springt über den faulen Hund.", "Здравствуй, мир! Straße"] * 20
SAMPLES = [
    "the fox",
    "Hello, lazy dog!",
    "  two  spaces",
    "Straße 漢字 \U0001f600",
    "a\tb\nc",
    "",
    " ",
]
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox jump ##s over lazy dog . , ! hello world"
).split()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def randomized(model: Any) -> Any:
    """Draw all weights anew, biases, norms and buffers that are learned included."""
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name or parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    if "final_logits_bias" in dict(model.named_buffers()):
        nn.init.normal_(model.final_logits_bias)
    return model.eval()


def byte_pairs(folder: Path, special: list[str]) -> None:
    """Write vocab.json and merges.txt."""
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(TEXTS, vocab_size=300, special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_model(str(folder))


def gpt2_tokenizer(folder: Path) -> Any:
    byte_pairs(folder, ["<|endoftext|>"])
    return GPT2Tokenizer.from_pretrained(folder)


def bart_tokenizer(folder: Path) -> Any:
    byte_pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return BartTokenizer.from_pretrained(folder)


def bert_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *"abcdefghij"]) + "\n", "utf-8")
    return BertTokenizer.from_pretrained(folder)


def gpt2(**changes: Any) -> Any:
    settings = {
        "vocab_size": ROWS,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return randomized(GPT2LMHeadModel(GPT2Config(**(settings | changes))))


def bert_config(**changes: Any) -> Any:
    settings = {
        "vocab_size": ROWS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
    }
    return BertConfig(**(settings | changes))


def _encoder_decoder(**changes: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": ROWS,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 48,
    }
    return settings | changes


def bart(**changes: Any) -> Any:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(**_encoder_decoder(**(ids | changes)))
    return randomized(BartForConditionalGeneration(config))


def marian(rows: int = ROWS, **changes: Any) -> Any:
    ids = {"pad_token_id": rows - 1, "eos_token_id": 0, "decoder_start_token_id": rows - 1}
    config = MarianConfig(**_encoder_decoder(vocab_size=rows, **(ids | changes)))
    return randomized(MarianMTModel(config))


def save(folder: Path, model: Any, tokenizer: Any, *, shards: str = "5GB") -> str:
    """Write a folder as transformers does."""
    model.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(path: Path) -> Task[Any]:
    task = load_task(path)
    assert isinstance(task, Task)
    return task


def tokens(*shape: int, low: int = 5) -> Tensor:
    """Random ids, no special ones."""
    return torch.randint(low, ROWS - 1, shape)


def encoded(tokenizer: Tokenizer, texts: list[str] = SAMPLES) -> list[list[int]]:
    return tokenizer.encode_batch(texts)


def theirs(tokenizer: Any, texts: list[str] = SAMPLES) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def change_json(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(values | changes), "utf-8")


def sentence_pieces(folder: Path) -> int:
    """Write the files of a Marian tokenizer; return the number of its entries."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"</s>": 0, "<unk>": 1}
    for side, texts in (("source", TEXTS), ("target", OTHERS)):
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=60,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc",
            minloglevel=2,
        )
        (folder / f"{side}.spm").write_bytes(model.getvalue())
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for i in range(pieces.get_piece_size()):
            if not pieces.is_control(i) and not pieces.is_unknown(i):
                entries.setdefault(pieces.id_to_piece(i), len(entries))
    entries[">>fr<<"] = len(entries)
    entries["<pad>"] = len(entries)
    (folder / "vocab.json").write_text(json.dumps(entries), "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MarianTokenizer"}), "utf-8"
    )
    return len(entries)


# Translation models that were trained here

GERMAN = "ein zwei drei vier fünf sechs sieben acht neun zehn elf Katze Hund Straße geht".split()
ENGLISH = "one two three four five six seven eight nine ten eleven cat dog street walks".split()
HALVES = {"class_path": "tx_lightning.nn.SinusoidalPositions", "init_args": {"layout": "halves"}}
AS_LARGE_AS_1 = {**HALVES, "init_args": {"layout": "halves", "scale": 1.0}}  # whatever the tokens
KINDS: dict[str, dict[str, Any]] = {
    "marian": {"positions": HALVES},
    "bart": {
        "positions": {
            "class_path": "tx_lightning.nn.LearnedPositions",
            "init_args": {"max_length": 48},
        },
        "embedding_norm": "torch.nn.LayerNorm",
    },
}


def sentence_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Words and their translations; "drei" becomes two."""
    chance, pairs = random.Random(seed), []
    for _ in range(n):
        words = [chance.randrange(len(GERMAN)) for _ in range(chance.randint(1, 7))]
        target = [ENGLISH[i] for i in words for _ in range(2 if i == 2 else 1)]
        pairs.append((" ".join(GERMAN[i] for i in words), " ".join(target)))
    return pairs


def trained(
    path: Path,
    kind: str,
    *,
    search: dict[str, Any] | None = None,
    trainer: TokenizerTrainer | None = None,
    vocab_size: int = 60,
    unused: int = 0,
    steps: int = 100,
    **changes: Any,
) -> None:
    """Train a small translation model and write its checkpoint; it learns a part.

    Args:
        path: The checkpoint.
        kind: What it can be exported to, marian or bart.
        search: Arguments of the task that say how to search.
        trainer: Of the tokenizer.
        vocab_size: Most entries of the tokenizer.
        unused: Rows of the embedding table without an entry.
        steps: Of the optimizer.
        changes: Arguments of the network.
    """
    data = sentence_pairs(400, seed=1)
    tokenizer = (trainer or Words()).train((side for pair in data for side in pair), vocab_size)
    sizes = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 32}
    settings = {
        "class_path": "tx_lightning.tasks.Translation",
        "init_args": {
            "vocab_size": tokenizer.vocab_size + unused,
            "network": {
                "class_path": "tx_lightning.models.EncoderDecoder",
                "init_args": {**sizes, "dropout": 0.0, **KINDS[kind], **changes},
            },
            **(search or {}),
        },
    }
    task = build_task(settings)
    network = task.get_submodule("network")
    sources, targets = (tokenizer.encode_batch(side) for side in zip(*data, strict=True))
    ids = row_ids(tokenizer)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.98))
    chance = random.Random(0)
    for _ in range(steps):
        chosen = [chance.randrange(len(data)) for _ in range(32)]
        source = padded([sources[i] for i in chosen], ids)
        target = padded([targets[i] for i in chosen], ids, start=True)
        logits = network(source, target[:, :-1])
        cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0).backward()
        optimizer.step()
        optimizer.zero_grad()
    record = checkpoint_record(settings, Tokenizers.one(tokenizer).to_dict())
    write_atomically({"state_dict": task.state_dict(), "global_step": 1, RECORD: record}, path)


def change_checkpoint(path: Path, change: Any) -> None:
    """Write a checkpoint anew after `change` was called with it."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    write_atomically(checkpoint, path)
