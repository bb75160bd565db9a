"""GPT-2 of transformers with random weights: read, compared, continued, written again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Model

from tests.weights import hugging_face as hf
from tx_lightning.checkpoints import RECORD, checkpoint_record, write_atomically
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizers
from tx_lightning.decoding import Greedy
from tx_lightning.models import LanguageModel
from tx_lightning.tasks import LanguageModeling
from tx_lightning.tasks.continuation import continue_texts
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.importing import build_task


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return hf.gpt2_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "n_inner": 40},
        {"activation_function": "relu", "tie_word_embeddings": False},
        {"activation_function": "silu", "reorder_and_upcast_attn": True},
    ],
)
def test_logits_equal_and_the_weights_come_back_bit_for_bit(
    changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.gpt2(**changes)
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    imported = import_weights(folder, tmp_path / "m.ckpt")
    assert imported.task == "LanguageModeling"
    assert imported.notes == []
    assert imported.parameters == sum(p.numel() for p in model.parameters())
    task, ids = hf.load(tmp_path / "m.ckpt"), hf.tokens(3, 20)
    expected = model(ids).logits
    hf.assert_close(task.network(ids), expected)
    assert export_weights(tmp_path / "m.ckpt", tmp_path / "ours") == "GPT2LMHeadModel"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, expected)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_greedy_continuations_equal(tokenizer: Any, tmp_path: Path) -> None:
    model = hf.gpt2()
    import_weights(hf.save(tmp_path / "theirs", model, tokenizer), tmp_path / "m.ckpt")
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, LanguageModeling)
    prompts = ["the quick fox", "Hello world! Straße", "dog"]
    found = continue_texts(task.network, task.tokenizer, prompts, Greedy(), max_new_tokens=12)
    for prompt, ours in zip(prompts, found, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(
            **given, max_new_tokens=12, do_sample=False, pad_token_id=0,
            suppress_tokens=list(range(len(tokenizer), hf.ROWS)),
        )[0, given["input_ids"].shape[1] :].tolist()  # fmt: skip
        assert ours[0].tokens == [i for i in expected if i != 0]
        assert len(ours[0].tokens) > 3
        assert ours[0].text == tokenizer.decode(ours[0].tokens)


def test_a_model_without_head_or_with_old_buffers_is_the_same(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = hf.gpt2()
    bare = GPT2Model(model.config)
    bare.load_state_dict(model.transformer.state_dict())
    folder = tmp_path / "bare"
    hf.save(folder, bare, tokenizer)
    (folder / "model.safetensors").unlink()
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    torch.save({**bare.state_dict(), **buffers}, folder / "pytorch_model.bin")
    import_weights(str(folder), tmp_path / "m.ckpt")
    ids = hf.tokens(2, 9)
    network = hf.load(tmp_path / "m.ckpt").network
    hf.assert_close(network(ids), model(ids).logits)


def test_dropout_that_cannot_differ_is_said(tokenizer: Any, tmp_path: Path) -> None:
    folder = hf.save(tmp_path / "theirs", hf.gpt2(embd_pdrop=0.3), tokenizer)
    imported = import_weights(folder, tmp_path / "m.ckpt")
    assert imported.notes == [
        "embd_pdrop is 0.3 and resid_pdrop 0.1: in training, both will be 0.1"
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights is false; supported: true"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is true; supported: false",
        ),
        ({"add_cross_attention": True}, "add_cross_attention is true; supported: false"),
        ({"activation_function": "tanh"}, 'activation_function is "tanh"; supported: gelu, '),
    ],
)
def test_what_the_language_model_does_not_have_is_refused(
    changes: dict[str, Any], line: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = hf.save(tmp_path / "theirs", hf.gpt2(**changes), tokenizer)
    with pytest.raises(WeightsError, match="config.json: ") as caught:
        import_weights(folder, tmp_path / "m.ckpt")
    assert line in str(caught.value)
    assert not (tmp_path / "m.ckpt").exists()


def test_another_task_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder = hf.save(tmp_path / "theirs", hf.gpt2(), tokenizer)
    with pytest.raises(WeightsError, match="--task Tagging: a GPT2LMHeadModel becomes a Lang"):
        import_weights(folder, tmp_path / "m.ckpt", task="Tagging")


def own(path: Path, rows: int = hf.ROWS, **changes: Any) -> LanguageModel:
    """Write the checkpoint of a language model that was trained here."""
    tokenizer = ByteLevelBPE().train(hf.TEXTS, 300)
    options = {"d_model": 16, "n_heads": 2, "n_layers": 2, "context_length": 24, **changes}
    settings = {
        "class_path": "tx_lightning.tasks.LanguageModeling",
        "init_args": {
            "vocab_size": rows,
            "network": {"class_path": "tx_lightning.models.LanguageModel", "init_args": options},
        },
    }
    record = checkpoint_record(settings, Tokenizers.one(tokenizer).to_dict())
    task = build_task(settings)
    for parameter in task.parameters():
        parameter.data.normal_(std=0.3)
    write_atomically({"state_dict": task.state_dict(), "global_step": 1, RECORD: record}, path)
    network = task.get_submodule("network").eval()
    assert isinstance(network, LanguageModel)
    return network


NO_BIAS = {
    "bias": False,
    "norm": {"class_path": "torch.nn.LayerNorm", "init_args": {"bias": False}},
    "feed_forward": {"class_path": "tx_lightning.nn.GELUFeedForward", "init_args": {"bias": False}},
}


@pytest.mark.parametrize("changes", [{}, NO_BIAS])
def test_a_model_trained_here_is_a_gpt2(changes: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 has biases everywhere; where we have none, they are 0."""
    network = own(tmp_path / "own.ckpt", **changes)
    export_weights(tmp_path / "own.ckpt", tmp_path / "ours")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), hf.tokens(2, 20)
    hf.assert_close(theirs(ids).logits, network(ids))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    task = hf.load(tmp_path / "own.ckpt")
    assert hf.theirs(tokenizer) == hf.encoded(task.tokenizer)
    assert tokenizer.eos_token_id == task.tokenizer.eos_id
    assert set(tokenizer("the fox")) == {"input_ids", "attention_mask"}
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    again = hf.load(tmp_path / "again.ckpt")
    hf.assert_close(again.network(ids), network(ids))
    assert hf.encoded(again.tokenizer) == hf.encoded(task.tokenizer)
    ends = (again.tokenizer.eos_id, task.tokenizer.eos_id)
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"positions": "tx_lightning.nn.RotaryPositions"}, "positions is RotaryPositions"),
        ({"pre_norm": False}, "pre_norm is false"),
        ({"norm": "torch.nn.RMSNorm"}, "norm is RMSNorm"),
        ({"feed_forward": "tx_lightning.nn.SwiGLUFeedForward"}, "feed_forward is SwiGLUFeed"),
    ],
)
def test_what_gpt2_does_not_have_is_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    own(tmp_path / "own.ckpt", **changes)
    with pytest.raises(WeightsError, match=f"cannot be written as GPT-2: its {line}"):
        export_weights(tmp_path / "own.ckpt", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
