"""CTranslate2's converter takes what is exported, and decodes as we do, token for token."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.weights import hugging_face as hf
from tests.weights.conftest import OWN, Trained
from tests.weights.test_gpt2 import own as own_gpt2
from tests.weights.test_seq2seq import save as save_seq2seq
from tx_lightning.data.tokenizers import Characters
from tx_lightning.decoding import Greedy
from tx_lightning.tasks import LanguageModeling, Translation
from tx_lightning.tasks.continuation import continue_texts
from tx_lightning.weights import import_weights
from tx_lightning.weights.exporting import export_checkpoint
from tx_lightning.weights.importing import IMPORTED

ctranslate2 = pytest.importorskip("ctranslate2", reason="the package ctranslate2 is missing")

SENTENCES = [source for source, _ in hf.sentence_pairs(40, seed=2)]
LONGEST = 20
GREEDY = Greedy(max_length_ratio=0, max_length_offset=LONGEST)


def converted(folder: Path) -> str:
    """Convert a folder as `ct2-transformers-converter --model FOLDER` does."""
    from ctranslate2.converters import TransformersConverter

    return str(TransformersConverter(str(folder)).convert(str(folder.with_suffix(".ct2"))))


def theirs(folder: Path, texts: list[str], **options: Any) -> list[list[str]]:
    """What CTranslate2 decodes greedily, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    translator = ctranslate2.Translator(converted(folder), intra_threads=1)
    source = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]
    found = translator.translate_batch(
        source, beam_size=1, max_decoding_length=LONGEST, min_decoding_length=0, **options
    )
    return [[token.replace(" ", "") for token in result.hypotheses[0]] for result in found]


def ours(checkpoint: Path, texts: list[str]) -> list[list[str]]:
    """What we decode greedily, as tokens."""
    task = hf.load(checkpoint)
    assert isinstance(task, Translation)
    entries = task.require_tokenizers().target.entries()
    return [[entries[i] for i in best.tokens] for best, *_ in task.translate(texts, GREEDY)]


def check_same(checkpoint: Path, folder: Path, texts: list[str] = SENTENCES) -> None:
    """Export a checkpoint, convert the folder and compare what both decode."""
    exported = export_checkpoint(checkpoint, folder)
    assert not [note for note in exported.notes if "CTranslate2" in note]
    expected = ours(checkpoint, texts)
    assert theirs(folder, texts) == expected
    assert len({tuple(tokens) for tokens in expected}) > len(texts) / 4  # not the same each time


@pytest.mark.parametrize("name", OWN)
def test_a_model_trained_here_decodes_alike(name: str, trained: Trained, tmp_path: Path) -> None:
    check_same(trained(name), tmp_path / "ours")


def test_padding_is_not_generated_however_probable(trained: Trained, tmp_path: Path) -> None:
    """Rows that we never generate are gone."""

    def prefer(checkpoint: Any) -> None:
        bias = checkpoint["state_dict"]["network.output.bias"]
        bias[:2], bias[-3:] = 50.0, 50.0  # padding, BOS, and rows without a token

    path = tmp_path / "m.ckpt"
    path.write_bytes(trained("unshared").read_bytes())
    hf.change_checkpoint(path, prefer)
    check_same(path, tmp_path / "ours")


def marian(folder: Path, start: float) -> str:
    """Write a Marian of transformers; the embedding of its start token is `start` everywhere."""
    rows = hf.sentence_pieces(folder)
    model = hf.marian(rows)
    model.model.shared.weight.data[-1] = start
    model.save_pretrained(folder)
    return str(folder)


def test_an_imported_marian_decodes_alike(tmp_path: Path) -> None:
    import_weights(marian(tmp_path / "theirs", 0.0), tmp_path / "m.ckpt")
    exported = export_checkpoint(tmp_path / "m.ckpt", tmp_path / "ours")
    assert not [note for note in exported.notes if "CTranslate2" in note]
    texts = [" ".join(text.split()[i:]) for text in hf.TEXTS[:2] for i in range(4)]
    assert theirs(tmp_path / "ours", texts) == ours(tmp_path / "m.ckpt", texts)


def test_a_marian_that_was_exported_imported_and_trained_on_decodes_alike(
    trained: Trained, tmp_path: Path
) -> None:
    """Training moves the embedding of its start token away from 0."""
    export_checkpoint(trained("marian"), tmp_path / "theirs")
    import_weights(str(tmp_path / "theirs"), tmp_path / "m.ckpt")
    before = ours(tmp_path / "m.ckpt", SENTENCES)
    assert before == ours(trained("marian"), SENTENCES)

    def train(checkpoint: Any) -> None:
        del checkpoint[IMPORTED]
        checkpoint["state_dict"]["network.target_embedding.tokens.weight"][-1] = 0.5
        checkpoint["state_dict"]["network.output.bias"][-1] = 50.0

    hf.change_checkpoint(tmp_path / "m.ckpt", train)
    assert ours(tmp_path / "m.ckpt", SENTENCES) != before
    check_same(tmp_path / "m.ckpt", tmp_path / "ours")


def test_an_imported_bart_decodes_alike(tmp_path: Path) -> None:
    """It has no place for what is never generated: padding, here, is improbable."""
    model = hf.bart(vocab_size=300)
    model.final_logits_bias[0, 1] = -100.0
    folder = save_seq2seq(tmp_path / "theirs", model)
    hf.change_json(tmp_path / "theirs" / "config.json", normalize_before=False)
    import_weights(folder, tmp_path / "m.ckpt")
    export_checkpoint(tmp_path / "m.ckpt", tmp_path / "ours")
    assert theirs(tmp_path / "ours", hf.TEXTS[:2]) == ours(tmp_path / "m.ckpt", hf.TEXTS[:2])


def test_a_language_model_continues_alike(tmp_path: Path) -> None:
    """What is never generated has to be said: GPT-2 has no bias of logits."""
    own_gpt2(tmp_path / "m.ckpt", rows=300)
    export_checkpoint(tmp_path / "m.ckpt", tmp_path / "ours")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, LanguageModeling)
    texts = ["the quick", "Hello world", "dog."]
    found = continue_texts(task.network, task.tokenizer, texts, Greedy(), max_new_tokens=10)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    generator = ctranslate2.Generator(converted(tmp_path / "ours"), intra_threads=1)
    for text, best in zip(texts, found, strict=True):
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])],
            beam_size=1,
            max_length=10,
            include_prompt_in_result=False,
            suppress_sequences=[["<pad> "], ["<s> "], ["<unk> "]],
        )[0]
        assert result.sequences_ids[0] == best[0].tokens


# What it does not take is said


def notes(checkpoint: Path, folder: Path) -> list[str]:
    found = export_checkpoint(checkpoint, folder).notes
    return [note for note in found if note.startswith("CTranslate2 cannot run this model")]


def test_what_the_converter_does_not_take_is_said(trained: Trained, tmp_path: Path) -> None:
    hf.trained(tmp_path / "rows.ckpt", "bart", unused=2, steps=0)
    [note] = notes(tmp_path / "rows.ckpt", tmp_path / "rows")
    assert "the embedding table has 36 rows, the tokenizer 34 entries" in note
    with pytest.raises(ValueError, match="expected a vocabulary of size 36"):
        ctranslate2.Translator(converted(tmp_path / "rows"))

    import_weights(marian(tmp_path / "theirs", 0.7), tmp_path / "start.ckpt")
    [note] = notes(tmp_path / "start.ckpt", tmp_path / "start")
    assert "it starts decoding from zeros" in note
    converted(tmp_path / "start")  # it would not notice

    def other(checkpoint: Any) -> None:
        target = Characters().train(hf.ENGLISH, 30)
        checkpoint["tx_lightning"]["tokenizers"]["target"] = target.to_json()

    path = tmp_path / "two.ckpt"
    path.write_bytes(trained("unshared").read_bytes())
    hf.change_checkpoint(path, other)
    [note] = notes(path, tmp_path / "two")
    assert "source and target have separate vocabularies" in note
