"""BERT of transformers with random weights, with each of its heads: read, compared, written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from tests.weights import hugging_face as hf
from tx_lightning.checkpoints import RECORD, checkpoint_record, read_checkpoint, write_atomically
from tx_lightning.data.tokenizers import Tokenizers, Words
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.importing import build_task

LABELS = {0: "good", 1: "bad", 2: "so so"}
HEADS = [
    (BertForMaskedLM, AutoModelForMaskedLM, "MaskedLanguageModeling"),
    (BertForSequenceClassification, AutoModelForSequenceClassification, "Classification"),
    (BertForTokenClassification, AutoModelForTokenClassification, "Tagging"),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return hf.bert_tokenizer(tmp_path / "tokenizer")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Ids with padding at the right, segments, and what is real."""
    ids = hf.tokens(3, 14)
    ids[1, 9:], ids[2, 3:] = 0, 0
    segments = torch.zeros_like(ids)
    segments[:, 2:] = 1
    return ids, segments, ids != 0


def check_equal(ours: Tensor, theirs: Tensor, real: Tensor) -> None:
    """Compare logits, those of tokens without the padding."""
    if ours.dim() == 3:
        ours, theirs = ours[real], theirs[real]
    hf.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "auto", "task_name"), HEADS)
@pytest.mark.parametrize("changes", [{}, {"layer_norm_eps": 1e-3, "type_vocab_size": 3}])
def test_logits_equal_and_the_weights_come_back_bit_for_bit(
    kind: Any, auto: Any, task_name: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.randomized(kind(hf.bert_config(id2label=LABELS, **changes)))
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    imported = import_weights(folder, tmp_path / "m.ckpt")
    assert (imported.task, imported.notes) == (task_name, [])
    task = hf.load(tmp_path / "m.ckpt")
    ids, segments, real = inputs()
    expected = model(ids, attention_mask=real.long(), token_type_ids=segments).logits
    check_equal(task.network(ids, segments), expected, real)
    alone = model(ids, attention_mask=real.long()).logits
    check_equal(task.network(ids), alone, real)
    assert export_weights(tmp_path / "m.ckpt", tmp_path / "ours") == kind.__name__
    again = auto.from_pretrained(tmp_path / "ours")
    logits = again(ids, attention_mask=real.long(), token_type_ids=segments).logits
    assert torch.equal(logits, expected)
    if kind is not BertForMaskedLM:
        assert again.config.id2label == LABELS
        assert read_checkpoint(tmp_path / "m.ckpt")[RECORD]["labels"] == list(LABELS.values())
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_a_classifier_may_have_other_activations(
    activation: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.randomized(BertForSequenceClassification(hf.bert_config(hidden_act=activation)))
    import_weights(hf.save(tmp_path / "theirs", model, tokenizer), tmp_path / "m.ckpt")
    ids, segments, real = inputs()
    expected = model(ids, attention_mask=real.long(), token_type_ids=segments).logits
    network = hf.load(tmp_path / "m.ckpt").network
    check_equal(network(ids, segments), expected, real)


def test_the_sentence_head_of_pretraining_is_left_out_and_said(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.randomized(BertForPreTraining(hf.bert_config()))
    imported = import_weights(hf.save(tmp_path / "theirs", model, tokenizer), tmp_path / "m.ckpt")
    assert imported.notes == [
        f"left out: {what}, as a MaskedLanguageModeling has none"
        for what in (
            "the head that predicts the next sentence (cls.seq_relationship.*)",
            "the pooler (bert.pooler.*)",
        )
    ]
    ids, segments, real = inputs()
    expected = model(ids, attention_mask=real.long(), token_type_ids=segments).prediction_logits
    check_equal(hf.load(tmp_path / "m.ckpt").network(ids, segments), expected, real)


def test_names_of_tensorflow_are_read(tokenizer: Any, tmp_path: Path) -> None:
    model = hf.randomized(BertForMaskedLM(hf.bert_config()))
    folder = Path(hf.save(tmp_path / "theirs", model, tokenizer))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    assert any(name.endswith("gamma") for name in old)
    save_file(old, folder / "model.safetensors")
    import_weights(str(folder), tmp_path / "m.ckpt")
    ids, segments, real = inputs()
    expected = model(ids, attention_mask=real.long(), token_type_ids=segments).logits
    check_equal(hf.load(tmp_path / "m.ckpt").network(ids, segments), expected, real)


def test_a_model_without_head_needs_a_task_and_gets_a_new_head(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.randomized(BertModel(hf.bert_config(id2label=LABELS)))
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    with pytest.raises(WeightsError, match="a BertModel has no head: say with --task .*Tagging"):
        import_weights(folder, tmp_path / "m.ckpt")
    ids, segments, real = inputs()
    vectors = model(ids, attention_mask=real.long(), token_type_ids=segments).last_hidden_state
    new = {
        "Classification": "head.weight, head.bias",
        "Tagging": "head.weight, head.bias",
        "MaskedLanguageModeling": "transform.weight, transform.bias, norm.weight, norm.bias and 1",
    }
    for task, names in new.items():
        path = tmp_path / f"{task}.ckpt"
        imported = import_weights(folder, path, task=task)
        assert f"new, and to be trained: {names}" in imported.notes[-1]
        network = hf.load(path).network
        check_equal(network.get_submodule("encoder")(ids, segments), vectors, real)
        import_weights(folder, tmp_path / f"{task} again.ckpt", task=task)  # the same each time
        again = hf.load(tmp_path / f"{task} again.ckpt").network.state_dict()
        assert all(torch.equal(again[name], own) for name, own in network.state_dict().items())
    pooler = hf.load(tmp_path / "Classification.ckpt").network.get_parameter("pooler.weight")
    assert torch.equal(pooler, model.pooler.dense.weight)


def test_another_task_gets_a_new_head_and_keeps_what_it_can(tokenizer: Any, tmp_path: Path) -> None:
    tagger = hf.randomized(BertForTokenClassification(hf.bert_config(id2label=LABELS)))
    folder = hf.save(tmp_path / "theirs", tagger, tokenizer)
    imported = import_weights(folder, tmp_path / "m.ckpt", task="Classification")
    assert imported.notes == [
        "left out: the head of a classifier (classifier.*), as a Classification has none",
        "new, and to be trained: pooler.weight, pooler.bias, head.weight, head.bias",
    ]
    pretrained = hf.randomized(BertForPreTraining(hf.bert_config()))
    folder = hf.save(tmp_path / "pretrained", pretrained, tokenizer)
    imported = import_weights(folder, tmp_path / "n.ckpt", task="Classification", n_texts=2)
    assert imported.notes[-1] == "new, and to be trained: head.weight, head.bias"
    record = read_checkpoint(tmp_path / "n.ckpt")[RECORD]
    assert (record["labels"], record["n_texts"]) == (["LABEL_0", "LABEL_1"], 2)


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        (BertForMaskedLM, {"position_embedding_type": "relative_key"}, 'is "relative_key"'),
        (BertForMaskedLM, {"is_decoder": True}, "is_decoder is true; supported: false"),
        (BertForMaskedLM, {"hidden_act": "relu"}, 'hidden_act is "relu"; supported: "gelu"'),
        (BertForMaskedLM, {"hidden_act": "tanh"}, 'hidden_act is "tanh"; supported: '),
        (
            BertForSequenceClassification,
            {"problem_type": "regression"},
            'problem_type is "regression"; supported: "single_label_classification" or null',
        ),
        (BertForSequenceClassification, {"num_labels": 1}, "supported: two classes or more"),
    ],
)
def test_what_our_networks_do_not_have_is_refused(
    kind: Any, changes: dict[str, Any], line: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = hf.save(tmp_path / "theirs", kind(hf.bert_config(**changes)), tokenizer)
    with pytest.raises(WeightsError) as caught:
        import_weights(folder, tmp_path / "m.ckpt")
    assert line in str(caught.value)


def test_weights_that_are_not_tied_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = hf.randomized(BertForMaskedLM(hf.bert_config()))
    folder = Path(hf.save(tmp_path / "theirs", model, tokenizer))
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.zeros(hf.ROWS, 16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="decoder.weight differs from bert.embeddings.word_emb"):
        import_weights(str(folder), tmp_path / "m.ckpt")


def own(path: Path, task_name: str, network: str, **changes: Any) -> Any:
    """Write the checkpoint of a network that was trained here."""
    tokenizer = Words().train(hf.TEXTS, 100)
    options = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_length": 24}
    encoder = options | changes.pop("encoder", {})
    arguments: dict[str, Any] = {
        "vocab_size": hf.ROWS,
        "network": {
            "class_path": f"tx_lightning.models.{network}",
            "init_args": {
                "encoder": {"class_path": "tx_lightning.models.TextEncoder", "init_args": encoder},
                **changes,
            },
        },
    }
    labels = None
    if task_name != "MaskedLanguageModeling":
        labels = list(LABELS.values())
        arguments["n_classes" if task_name == "Classification" else "n_tags"] = len(labels)
    settings = {"class_path": f"tx_lightning.tasks.{task_name}", "init_args": arguments}
    record = checkpoint_record(
        settings, Tokenizers.one(tokenizer).to_dict(), labels=labels, n_texts=1
    )
    task = build_task(settings)
    for parameter in task.parameters():
        parameter.data.normal_(std=0.3)
    write_atomically({"state_dict": task.state_dict(), "global_step": 1, RECORD: record}, path)
    return task.get_submodule("network").eval()


@pytest.mark.parametrize(
    ("task_name", "network", "auto"),
    [
        ("MaskedLanguageModeling", "MaskedLanguageModel", AutoModelForMaskedLM),
        ("Classification", "Classifier", AutoModelForSequenceClassification),
        ("Tagging", "Tagger", AutoModelForTokenClassification),
    ],
)
@pytest.mark.parametrize("segments", [0, 2])
def test_a_model_trained_here_is_a_bert(
    task_name: str, network: str, auto: Any, segments: int, tmp_path: Path
) -> None:
    ours = own(tmp_path / "own.ckpt", task_name, network, encoder={"n_segments": segments})
    export_weights(tmp_path / "own.ckpt", tmp_path / "ours")
    theirs = auto.from_pretrained(tmp_path / "ours")
    ids, _, real = inputs()
    check_equal(ours(ids), theirs(ids, attention_mask=real.long()).logits, real)
    tokenizer = hf.load(tmp_path / "own.ckpt").tokenizer
    read = AutoTokenizer.from_pretrained(tmp_path / "ours")
    around = [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in hf.encoded(tokenizer)]
    assert [read(text)["input_ids"] for text in hf.SAMPLES] == around
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    assert torch.equal(hf.load(tmp_path / "again.ckpt").network(ids), ours(ids))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"encoder": {"positions": "tx_lightning.nn.AlibiPositions"}}, "positions is Alibi"),
        ({"encoder": {"pre_norm": True}}, "pre_norm is true"),
        ({"encoder": {"embedding_norm": False}}, "embedding_norm is false"),
        ({"encoder": {"norm": "torch.nn.RMSNorm"}}, "norm is RMSNorm"),
        ({"pooling": "mean"}, "pooling is mean; BERT has cls"),
    ],
)
def test_what_bert_does_not_have_is_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    own(tmp_path / "own.ckpt", "Classification", "Classifier", **changes)
    with pytest.raises(WeightsError, match=f"cannot be written as BERT: its {line}"):
        export_weights(tmp_path / "own.ckpt", tmp_path / "ours")
