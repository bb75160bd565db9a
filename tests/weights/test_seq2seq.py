"""BART and Marian of transformers with random weights: read, compared, decoded, written again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartModel, GenerationConfig

from tests.weights import hugging_face as hf
from tx_lightning.checkpoints import RECORD, checkpoint_record, write_atomically
from tx_lightning.data.batches import padded, row_ids
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizers
from tx_lightning.decoding import Beam, Greedy
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks import Translation
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.importing import build_task

SENTENCES = ["the quick fox", "Hello world! Straße", "dog"]


def inputs(pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids with padding at the right, target ids, and what is real of the source."""
    source, target = hf.tokens(3, 14), hf.tokens(3, 9)
    source[1, 9:], source[2, 3:] = pad, pad
    return source, target, source != pad


def save(folder: Path, model: Any) -> str:
    if model.config.model_type == "bart":
        return hf.save(folder, model, hf.bart_tokenizer(folder.with_name("tokenizer")))
    model.save_pretrained(folder)
    hf.sentence_pieces(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bart", {}),
        ("bart", {"scale_embedding": True, "activation_function": "relu", "decoder_layers": 1}),
        ("marian", {"activation_function": "swish", "scale_embedding": True}),
        ("marian", {"activation_function": "relu"}),
        ("marian", {"share_encoder_decoder_embeddings": False, "activation_dropout": 0.2}),
    ],
)
def test_logits_equal_and_the_weights_come_back_bit_for_bit(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = hf.bart(**changes) if kind == "bart" else hf.marian(**changes)
    folder = save(tmp_path / "theirs", model)
    imported = import_weights(folder, tmp_path / "m.ckpt")
    assert (imported.task, imported.notes) == ("Translation", [])
    network = hf.load(tmp_path / "m.ckpt").network
    pad = model.config.pad_token_id
    source, target, real = inputs(pad)
    given = {"attention_mask": real.long(), "decoder_input_ids": target}
    expected = model(source, **given).logits
    hf.assert_close(network(source, target), expected)
    architecture = export_weights(tmp_path / "m.ckpt", tmp_path / "ours")
    assert architecture == type(model).__name__
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(source, **given).logits, expected)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def check_translations(task: Translation, model: Any) -> None:
    """Compare what both make of sentences, token by token."""
    tokenizers = task.require_tokenizers()
    source = padded(tokenizers.source.encode_batch(SENTENCES), row_ids(tokenizers.source))
    pad = tokenizers.source.pad_id
    expected = model.generate(
        source,
        attention_mask=(source != pad).long(),
        max_new_tokens=10,
        do_sample=False,
        num_beams=1,
        suppress_tokens=[pad, *range(tokenizers.target.vocab_size, model.config.vocab_size)],
    )[:, 1:]
    for ours, theirs in zip(
        task.translate(SENTENCES, task.decoding), expected.tolist(), strict=True
    ):
        length = min(len(ours[0].tokens), 9)  # the last of theirs is always the end
        assert length > 2
        assert ours[0].tokens[:length] == theirs[:length]


@pytest.mark.parametrize("forced", [None, 0])
def test_greedy_translations_of_bart_equal(forced: int | None, tmp_path: Path) -> None:
    model = hf.bart()
    model.generation_config.forced_bos_token_id = forced
    import_weights(save(tmp_path / "theirs", model), tmp_path / "m.ckpt")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, Translation)
    check_translations(task, model)
    if forced is not None:
        found = task.translate(SENTENCES)  # by a beam
        assert all(best[0].tokens[0] == forced for best in found)


def test_greedy_translations_of_marian_equal(tmp_path: Path) -> None:
    rows = hf.sentence_pieces(tmp_path / "pieces")
    model = hf.marian(rows)
    import_weights(save(tmp_path / "theirs", model), tmp_path / "m.ckpt")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, Translation)
    check_translations(task, model)


def test_settings_of_generation_that_are_also_ours_are_taken(tmp_path: Path) -> None:
    model = hf.bart()
    options = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 6, "max_length": 21}
    model.generation_config = GenerationConfig(**options, bos_token_id=0, pad_token_id=1)
    import_weights(save(tmp_path / "theirs", model), tmp_path / "m.ckpt")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, Translation)
    assert isinstance(task.decoding, Greedy)
    assert isinstance(task.test_decoding, Beam)
    assert task.test_decoding.beam_size == 4
    for search in (task.decoding, task.test_decoding):
        assert [(type(f).__name__, vars(f)) for f in search.filters] == [
            ("NoRepeatNgram", {"size": 3}),
            ("MinLength", {"length": 5}),
        ]
        assert (search.max_length_ratio, search.max_length_offset) == (0, 20)


def test_a_bart_stops_where_its_positions_end(tmp_path: Path) -> None:
    model = hf.bart()
    model.final_logits_bias[0, 2] = -100  # it never ends by itself
    import_weights(save(tmp_path / "theirs", model), tmp_path / "m.ckpt")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, Translation)
    for search in (task.decoding, task.test_decoding):
        found = task.translate(["the quick fox " * 4], search)
        assert len(found[0][0].tokens) == 48


def test_a_bart_without_head_has_no_bias(tmp_path: Path) -> None:
    model = hf.bart()
    bare = BartModel(model.config)
    bare.load_state_dict(model.model.state_dict())
    import_weights(save(tmp_path / "theirs", bare), tmp_path / "m.ckpt")
    source, target, real = inputs(1)
    model.final_logits_bias.zero_()
    expected = model(source, attention_mask=real.long(), decoder_input_ids=target).logits
    network = hf.load(tmp_path / "m.ckpt").network
    hf.assert_close(network(source, target), expected)


def test_old_files_hold_all_tied_tables_and_computed_positions(tmp_path: Path) -> None:
    model = hf.marian()
    folder = Path(save(tmp_path / "theirs", model))
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    assert "model.encoder.embed_positions.weight" in state
    assert "lm_head.weight" in state
    torch.save(state, folder / "pytorch_model.bin")
    import_weights(str(folder), tmp_path / "m.ckpt")
    source, target, real = inputs(hf.ROWS - 1)
    expected = model(source, attention_mask=real.long(), decoder_input_ids=target).logits
    network = hf.load(tmp_path / "m.ckpt").network
    hf.assert_close(network(source, target), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("bart", {"decoder_attention_heads": 2}, "the value of decoder_attention_heads, 2"),
        ("bart", {"encoder_ffn_dim": 8}, "encoder_ffn_dim is 8; supported: the value of"),
        ("bart", {"normalize_before": True}, "normalize_before is true; supported: false"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ("marian", {"activation_function": "tanh"}, 'activation_function is "tanh"'),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings is false"),
        (
            "marian",
            {"decoder_vocab_size": 200, "share_encoder_decoder_embeddings": False},
            "decoder_vocab_size is 200; supported: 320",
        ),
    ],
)
def test_what_the_encoder_decoder_does_not_have_is_refused(
    kind: str, changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "theirs", hf.bart() if kind == "bart" else hf.marian())
    hf.change_json(tmp_path / "theirs" / "config.json", **changes)
    with pytest.raises(WeightsError) as caught:
        import_weights(folder, tmp_path / "m.ckpt")
    assert line in str(caught.value)


def test_layers_that_are_dropped_in_training_are_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", hf.bart(encoder_layerdrop=0.1))
    imported = import_weights(folder, tmp_path / "m.ckpt")
    assert imported.notes == ["encoder_layerdrop is 0.1: in training, it will be 0"]


def own(path: Path, **changes: Any) -> EncoderDecoder:
    """Write the checkpoint of a network that was trained here."""
    tokenizer = ByteLevelBPE().train(hf.TEXTS, 300)
    options: dict[str, Any] = {
        "d_model": 16,
        "n_heads": 2,
        "n_encoder_layers": 2,
        "n_decoder_layers": 1,
        "d_ff": 24,
        "positions": {
            "class_path": "tx_lightning.nn.LearnedPositions",
            "init_args": {"max_length": 48},
        },
        "embedding_norm": "torch.nn.LayerNorm",
        **changes,
    }
    settings = {
        "class_path": "tx_lightning.tasks.Translation",
        "init_args": {
            "vocab_size": hf.ROWS,
            "network": {"class_path": "tx_lightning.models.EncoderDecoder", "init_args": options},
        },
    }
    record = checkpoint_record(settings, Tokenizers.one(tokenizer).to_dict())
    task = build_task(settings)
    for parameter in task.parameters():
        parameter.data.normal_(std=0.3)
    write_atomically({"state_dict": task.state_dict(), "global_step": 1, RECORD: record}, path)
    network = task.get_submodule("network").eval()
    assert isinstance(network, EncoderDecoder)
    return network


@pytest.mark.parametrize("changes", [{}, {"output_bias": True, "scale_embeddings": False}])
def test_a_model_trained_here_may_be_a_bart(changes: dict[str, Any], tmp_path: Path) -> None:
    network = own(tmp_path / "own.ckpt", **changes)
    assert (
        export_weights(tmp_path / "own.ckpt", tmp_path / "ours") == "BartForConditionalGeneration"
    )
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    source, target, real = inputs(0)
    expected = network(source, target)
    logits = theirs(source, attention_mask=real.long(), decoder_input_ids=target).logits
    hf.assert_close(logits, expected)
    read = AutoTokenizer.from_pretrained(tmp_path / "ours")
    tokenizer = hf.load(tmp_path / "own.ckpt").tokenizer
    ended = [[*row, tokenizer.eos_id] for row in hf.encoded(tokenizer)]
    assert [read(text)["input_ids"] for text in hf.SAMPLES] == ended
    assert theirs.generation_config.decoder_start_token_id == tokenizer.bos_id
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    again = hf.load(tmp_path / "again.ckpt")
    assert torch.equal(again.network(source, target), expected)
    assert hf.encoded(again.tokenizer) == hf.encoded(tokenizer)
    assert again.tokenizer.bos_id == tokenizer.bos_id


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_embeddings": False},
        {"output_bias": True, "scale_embeddings": False, "positions": hf.AS_LARGE_AS_1},
    ],
)
def test_a_model_trained_here_may_be_a_marian(changes: dict[str, Any], tmp_path: Path) -> None:
    """The tokens but padding and BOS move up by two, and BOS is the last one, <pad>."""
    plain = {"positions": hf.HALVES, "embedding_norm": None}
    network = own(tmp_path / "own.ckpt", **{**plain, **changes})
    assert export_weights(tmp_path / "own.ckpt", tmp_path / "ours") == "MarianMTModel"
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    tokenizer = hf.load(tmp_path / "own.ckpt").tokenizer
    last = tokenizer.vocab_size - 2
    source, target, real = inputs(0)
    source, target = source.clamp(max=last + 1), target.clamp(max=last + 1)
    target[:, 0] = tokenizer.bos_id

    def moved(ids: Tensor) -> Tensor:
        return torch.where(ids < 2, last, ids - 2)

    expected = network(source, target)[:, :, 2 : last + 2].log_softmax(-1)
    given = {"attention_mask": real.long(), "decoder_input_ids": moved(target)}
    logits = theirs(moved(source), **given).logits
    hf.assert_close(logits[:, :, :last].log_softmax(-1), expected)
    assert not theirs.get_input_embeddings().weight[-1].any() or not network.share_embeddings
    assert not theirs.get_decoder().embed_tokens.weight[-1].any()
    config = theirs.generation_config
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (
        *(last, last),
        tokenizer.eos_id - 2,
    )
    read = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ended = [[*(i - 2 for i in row), 0] for row in hf.encoded(tokenizer)]
    assert [read(text)["input_ids"] for text in hf.SAMPLES] == ended
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    again = hf.load(tmp_path / "again.ckpt")
    found = again.network(moved(source), moved(target))[:, :, :last].log_softmax(-1)
    hf.assert_close(found, expected)
    assert hf.encoded(again.tokenizer) == [row[:-1] for row in ended]
    assert again.tokenizer.bos_id == again.tokenizer.pad_id == last


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"positions": "tx_lightning.nn.SinusoidalPositions", "embedding_norm": None}, "layout"),
        ({"positions": "tx_lightning.nn.RotaryPositions"}, "positions is RotaryPositions"),
        ({"pre_norm": True}, "pre_norm is true"),
        ({"embedding_norm": None}, "norm is LayerNorm.* and Identity"),
        ({"feed_forward": "tx_lightning.nn.SwiGLUFeedForward"}, "feed_forward is SwiGLU"),
        ({"tie_output": False}, "tie_output is false"),
        ({"share_embeddings": False}, "share_embeddings is false"),
        ({"positions": hf.HALVES}, "embedding_norm is LayerNorm"),
        (
            {"positions": hf.HALVES, "embedding_norm": None, "scale_embeddings": False},
            "positions is scaled",
        ),
        ({"n_decoder_layers": 0}, "n_decoder_layers is 0"),
    ],
)
def test_what_neither_has_is_refused(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    own(tmp_path / "own.ckpt", **changes)
    with pytest.raises(WeightsError, match=f"cannot be written as .*its {line}"):
        export_weights(tmp_path / "own.ckpt", tmp_path / "ours")
