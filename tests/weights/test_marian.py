"""Marian's layout: the same function with another vocabulary and another start of decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.weights import hugging_face as hf
from tests.weights.test_tokenizers import FAMILIES, read
from tx_lightning.checkpoints import RECORD, read_checkpoint
from tx_lightning.data.tokenizers import (
    ByteLevelBPE,
    Characters,
    SpecialIds,
    Tokenizer,
    Tokenizers,
    TokenizerTrainer,
    Unigram,
    Words,
)
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import SinusoidalPositions
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.exporting import describe, export_checkpoint
from tx_lightning.weights.marian import NEVER, has_layout, with_layout
from tx_lightning.weights.tokenizer_files import special_ids_of

TEXTS = ["the quick fox", "Hello, lazy <pad> dog!", "</s> Straße 漢字", "<unk>", "  a\tb\n", ""]


def halves(width: int, heads: int, bidirectional: bool) -> SinusoidalPositions:
    return SinusoidalPositions(width, heads, bidirectional, layout="halves")


def network(rows: int, pad: int, **options: Any) -> EncoderDecoder:
    """A network with all weights drawn anew."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_ff": 12}
    depths: dict[str, Any] = {"n_encoder_layers": 2, "n_decoder_layers": 2}
    found = EncoderDecoder(rows, **sizes, **depths, positions=halves, pad_id=pad, **options)
    for parameter in found.parameters():
        parameter.data.normal_(std=0.4)
    return found.eval()


def moved(
    tokenizers: Tokenizers, rows: int, **options: Any
) -> tuple[EncoderDecoder, EncoderDecoder, Tokenizers]:
    """A network, the same in Marian's layout, and the tokenizers of that."""
    own = network(rows, tokenizers.target.pad_id, **options)
    scale, shared = own.target_embedding.scale, own.share_embeddings
    state, found, _ = with_layout(own.state_dict(), tokenizers, shared=shared, scale=scale)
    options = {**options, "output_bias": True}
    other = network(found.target.vocab_size, found.target.pad_id, **options)
    other.load_state_dict(state)
    return own, other, found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", ["own", "bart"])  # bart: decoding starts with the end of a text
def test_the_function_is_the_same(kind: str, shared: bool, scaled: bool, tmp_path: Path) -> None:
    if kind == "own":
        tokenizers = Tokenizers.one(Words().train(hf.TEXTS, 40))
    else:
        family, build, values = FAMILIES["bart"]
        build(tmp_path)
        tokenizers = read(tmp_path, family, **values)
    own, other, found = moved(
        tokenizers, 310, share_embeddings=shared, scale_embeddings=scaled, output_bias=not scaled
    )
    old, new = tokenizers.target, found.target
    ids = special_ids_of(old)
    kept = [i for i in range(old.vocab_size) if i == ids.eos or i not in (ids.pad, ids.bos)]
    places = dict(zip(kept, range(len(kept)), strict=True))

    def renumbered(rows: Tensor) -> Tensor:
        return rows.clone().apply_(lambda i: places.get(i, new.pad_id))

    source = torch.tensor([kept[4:9], [*kept[-3:], ids.pad, ids.pad]])
    target = torch.tensor([[ids.bos, *kept[5:8]], [ids.bos, *kept[1:3], kept[9]]])
    begun = renumbered(target)
    begun[:, 0] = new.bos_id
    expected = own(source, target)[:, :, kept].log_softmax(-1)
    logits = other(renumbered(source), begun)
    hf.assert_close(logits[:, :, : len(kept)].log_softmax(-1), expected)
    assert not other.target_embedding.tokens.weight[new.bos_id].any()
    assert new.bos_id == new.pad_id == len(kept) == new.vocab_size - 1
    if ids.bos == ids.eos:
        assert float(logits[0, 0, -1].detach()) == NEVER
    else:
        start = own(source, target)[:, :, ids.bos] - own(source, target)[:, :, kept[0]]
        hf.assert_close(logits[:, :, -1] - logits[:, :, 0], start)


@pytest.mark.parametrize("trainer", [Words(), Characters(), Unigram(), ByteLevelBPE()])
def test_texts_are_cut_as_before(trainer: TokenizerTrainer) -> None:
    old = trainer.train(hf.TEXTS, 290)
    tokenizers = Tokenizers.one(old)
    _, _, found = moved(tokenizers, old.vocab_size)
    new = found.target
    assert found.source is new
    assert new.encode_batch(TEXTS) == [[i - 2 for i in row] for row in old.encode_batch(TEXTS)]
    assert new.entries() == [*old.entries()[2:], "<pad>"]
    every = [list(range(2, old.vocab_size))]
    assert new.decode_batch([[i - 2 for i in every[0]]]) == old.decode_batch(every)
    assert special_ids_of(new) == SpecialIds(
        pad=new.vocab_size - 1, bos=new.vocab_size - 1, eos=0, unk=1
    )
    assert Tokenizer.from_json(new.to_json()).encode_batch(TEXTS) == new.encode_batch(TEXTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizers_of_others_are_numbered_anew_as_well(name: str, tmp_path: Path) -> None:
    family, build, values = FAMILIES[name]
    build(tmp_path)
    tokenizers = read(tmp_path, family, **values)
    old = tokenizers.target
    ids = special_ids_of(old)
    if name == "gpt2":  # its padding is the end of a text and whatever is unknown
        ids = SpecialIds(pad=5, bos=6, eos=0, unk=0)
        settings = json.loads(old.to_json())
        old = Tokenizer.foreign(json.dumps({**settings, "tx_lightning": None}), ids, {0: "<e>"})
        tokenizers = Tokenizers.one(old)
    assert has_layout(tokenizers)
    _, _, found = moved(tokenizers, old.vocab_size + 3)
    gone = {ids.pad, ids.bos} - {ids.eos}
    kept = [i for i in range(old.vocab_size) if i not in gone]
    texts = [text for text in TEXTS if not gone & set(old.encode_batch([text])[0])]
    assert len(texts) > 2
    assert found.target.encode_batch(texts) == [
        [kept.index(i) for i in row] for row in old.encode_batch(texts)
    ]


def test_what_has_no_such_layout(tmp_path: Path) -> None:
    words, others = Words().train(hf.TEXTS, 40), Words().train(hf.OTHERS, 40)
    assert has_layout(Tokenizers.one(words))
    assert not has_layout(Tokenizers(words, others))
    hf.byte_pairs(tmp_path, ["<|endoftext|>"])
    family, _, values = FAMILIES["gpt2"]
    settings = json.loads(read(tmp_path, family, **values).target.to_json())

    def ids(**changes: Any) -> Tokenizers:
        chosen = {"pad": 1, "bos": 2, "eos": 0, "unk": 3, **changes}
        return Tokenizers.one(Tokenizer.foreign(json.dumps(settings), SpecialIds(**chosen), {}))

    assert has_layout(ids())
    assert not has_layout(ids(unk=1))  # what is unknown would be padding
    assert not has_layout(ids(prefix=(2,)))  # texts begin with what starts decoding


def test_positions_that_are_scaled_are_no_marian(monkeypatch: pytest.MonkeyPatch) -> None:
    own, plain = network(9, 0), SinusoidalPositions.embed
    assert describe(own).model_type == "marian"

    def scaled(self: SinusoidalPositions, x: Tensor, start: int = 0) -> Tensor:
        return x + 0.1 * (plain(self, x, start) - x)

    monkeypatch.setattr(SinusoidalPositions, "embed", scaled)
    with pytest.raises(WeightsError, match="its positions is scaled; Marian has those of scale 1"):
        describe(own)


def test_two_vocabularies_keep_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    hf.trained(path, "marian", steps=0, share_embeddings=False)

    def other(checkpoint: Any) -> None:
        target = Words().train(hf.OTHERS, 25)
        checkpoint[RECORD]["tokenizers"]["target"] = target.to_json()

    hf.change_checkpoint(path, other)
    exported = export_checkpoint(path, tmp_path / "ours")
    assert "separate vocabularies" in exported.notes[-1]
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    config = model.generation_config
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    entries = hf.load(path).require_tokenizers().target.vocab_size
    assert config.suppress_tokens == [0, 1, *range(entries, model.config.vocab_size)]
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    again, before = (hf.load(p).require_tokenizers() for p in (tmp_path / "again.ckpt", path))
    assert again.target.entries() == before.target.entries()
    assert again.source.entries() == before.source.entries()


def test_a_denoising_model_keeps_its_rows(tmp_path: Path) -> None:
    """Those without a token are what it was pretrained with."""
    path = tmp_path / "m.ckpt"
    hf.trained(path, "marian", steps=0, unused=4)

    def pretrain(checkpoint: Any) -> None:
        checkpoint[RECORD]["task"]["class_path"] = "tx_lightning.tasks.Denoising"

    hf.change_checkpoint(path, pretrain)
    export_weights(path, tmp_path / "ours")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    table = read_checkpoint(path)["state_dict"]["network.target_embedding.tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert model.generation_config.max_length == 1025


def test_special_words_in_a_text_are_text_there_as_well(tmp_path: Path) -> None:
    for kind in ("marian", "bart"):
        hf.trained(tmp_path / f"{kind}.ckpt", kind, steps=0)
        export_weights(tmp_path / f"{kind}.ckpt", tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        text = "zwei </s> drei <pad> vier<s> <unk> eins"
        expected = hf.load(tmp_path / f"{kind}.ckpt").tokenizer
        first = 2 if kind == "marian" else 0
        ids = [i - first for i in [*expected.encode_batch([text])[0], expected.eos_id]]
        assert tokenizer(text)["input_ids"] == ids
