"""Folders of weights: shards, pickles, the hub, and one clear line for what cannot be read."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.weights import hugging_face as hf
from tx_lightning.models import EncoderDecoder, LanguageModel, Tagger, TextEncoder
from tx_lightning.nn import LearnedPositions, ReLUFeedForward
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.exporting import describe
from tx_lightning.weights.folders import local_folder, read_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of GPT-2 as transformers writes it."""
    tokenizer = hf.gpt2_tokenizer(tmp_path / "tokenizer")
    return Path(hf.save(tmp_path / "theirs", hf.gpt2(), tokenizer))


def refused(folder: Path | str, line: str) -> None:
    """Check that a folder is refused with a line, and nothing is written."""
    output = Path(folder).parent / "m.ckpt"
    with pytest.raises(WeightsError) as caught:
        import_weights(str(folder), output)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def check_same(folder: Path, tensors: dict[str, Tensor]) -> None:
    found, _ = read_tensors(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def shard(folder: Path, suffix: str) -> None:
    """Write the weights in two shards and an index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    stem, ending = ("model", "safetensors") if suffix == "safetensors" else ("pytorch_model", "bin")
    names = sorted(tensors)
    places: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{part}-of-00002.{ending}"
        some = {name: tensors[name] for name in chosen}
        if ending == "bin":
            torch.save(some, folder / file)
        else:
            save_file(some, folder / file)
        places |= dict.fromkeys(chosen, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read(suffix: str, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shard(folder, suffix)
    check_same(folder, tensors)
    import_weights(str(folder), tmp_path / "m.ckpt")
    next(folder.glob(f"*1-of-*.{suffix}")).unlink()
    with pytest.raises(WeightsError, match="1-of-00002.* which is missing: download it again"):
        read_tensors(folder)


def test_shards_of_transformers_are_read(tmp_path: Path) -> None:
    model = hf.gpt2()
    hf.save(tmp_path / "t", model, hf.gpt2_tokenizer(tmp_path / "tokenizer"), shards="20KB")
    assert (tmp_path / "t" / "model.safetensors.index.json").is_file()
    tensors = {n: p for n, p in model.state_dict().items() if n != "lm_head.weight"}
    check_same(tmp_path / "t", tensors)


def test_an_index_must_fit_its_shards(folder: Path) -> None:
    shard(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    places = values["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"more": next(iter(places.values()))}}))
    refused(folder, "names tensors that its shards do not have: more")
    index.write_text("{}")
    refused(folder, "has no weight_map")
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    refused(folder, "names ../../secret.safetensors, which is missing")


def test_safetensors_come_before_a_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    check_same(folder, tensors)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused_and_has_not_run(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    torch.save({"x": Payload(f"touch {ran}")}, folder / "pytorch_model.bin")
    refused(folder, "holds Python objects besides tensors, which could run code; nothing of it")
    assert not ran.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # it would have


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([torch.ones(1)], "holds no dictionary of tensors"),
        ({"x": torch.ones(1), "step": 3}, "holds more than tensors: step"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, line: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, line)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_files_are_refused(suffix: str, kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    if suffix == "bin":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, f"{path} is ")


def test_a_folder_without_config_lists_what_is_there(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "has no config.json; it has generation_config.json, model.safetensors, token")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json; it is empty")
    (folder / "config.json").write_text("{", "utf-8")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").write_text("[]", "utf-8")
    refused(folder, "config.json holds no JSON object")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "is LlamaForCausalLM"),
        ({"architectures": ["GPT2DoubleHeadsModel"], "model_type": "gpt2"}, "GPT2DoubleHeads"),
        ({"architectures": None, "model_type": "t5"}, "model_type is t5; supported: GPT2LMHead"),
        ({"architectures": ["BertModel"], "model_type": "gpt2"}, "BertModel, model_type gpt2"),
    ],
)
def test_another_architecture_is_named_with_what_is_supported(
    values: dict[str, Any], line: str, folder: Path
) -> None:
    hf.change_json(folder / "config.json", **values)
    refused(folder, line)
    refused(folder, "supported: GPT2LMHeadModel, GPT2Model, BertForMaskedLM, ")


def test_an_architecture_that_is_not_named_follows_from_the_type(
    folder: Path, tmp_path: Path
) -> None:
    hf.change_json(folder / "config.json", architectures=None)
    assert import_weights(str(folder), tmp_path / "m.ckpt").architecture == "GPT2LMHeadModel"


def test_missing_and_left_over_tensors_and_shapes_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    less = {n: t for n, t in tensors.items() if not n.startswith("transformer.h.1.mlp")}
    save_file(less, path)
    refused(folder, "has no tensor transformer.h.1.mlp.c_fc.bias, transformer.h.1.mlp.c_fc.weight,")
    save_file({**tensors, "transformer.extra": torch.ones(1)}, path)
    refused(folder, "has tensors that its architecture does not have: transformer.extra")
    save_file({**tensors, "transformer.h.0.attn.c_attn.weight": torch.ones(16, 47)}, path)
    refused(
        folder,
        "transformer.h.0.attn.c_attn.weight is (16, 47), but by config.json it would be (16, 48)",
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"n_embd": "16"}, 'n_embd is "16"; supported: a whole number'),
        ({"n_embd": True}, "n_embd is true; supported: a whole number"),
        ({"resid_pdrop": None}, "resid_pdrop is null; supported: a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; supported: true or false"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(
    values: dict[str, Any], line: str, folder: Path
) -> None:
    hf.change_json(folder / "config.json", **values)
    refused(folder, line)


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors and no pytorch_model.bin; it has config.json")


def test_half_precision_is_read(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    import_weights(str(folder), tmp_path / "m.ckpt")
    table = hf.load(tmp_path / "m.ckpt").network.get_parameter("embedding.tokens.weight")
    assert table.dtype == torch.float32
    assert torch.equal(table, tensors["transformer.wte.weight"].float())


def test_what_exists_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_text("mine")
    with pytest.raises(WeightsError, match="m.ckpt exists already: choose a new name"):
        import_weights(str(folder), tmp_path / "m.ckpt")
    assert (tmp_path / "m.ckpt").read_text() == "mine"
    import_weights(str(folder), tmp_path / "n.ckpt")
    with pytest.raises(WeightsError, match="theirs exists already: choose a new"):
        export_weights(tmp_path / "n.ckpt", folder)
    (tmp_path / "empty").mkdir()
    export_weights(tmp_path / "n.ckpt", tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small translation model."""
    path = tmp_path_factory.mktemp("checkpoint") / "m.ckpt"
    hf.trained(path, "bart", steps=0)
    return path


def test_an_empty_folder_stays_the_one_that_it_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current one, and one behind a link."""
    here, linked = tmp_path / "here", tmp_path / "linked"
    for folder in (here, linked):
        folder.mkdir()
    (tmp_path / "link").symlink_to(linked)
    monkeypatch.chdir(here)
    number, replace = here.stat().st_ino, Path.replace

    def within(self: Path, target: Path) -> Path:
        assert {here, linked, tmp_path / "link"} & {*self.parents}  # it may be a disk of its own
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", within)
    export_weights(checkpoint, ".")
    export_weights(checkpoint, tmp_path / "link")
    assert here.stat().st_ino == number
    assert Path.cwd() == here
    assert (tmp_path / "link").is_symlink()
    for folder in (here, linked):
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(WeightsError, match="cannot be written: .*/file is a file"):
        export_weights(checkpoint, tmp_path / "file" / "out")
    with pytest.raises(WeightsError, match="file exists already"):
        export_weights(checkpoint, tmp_path / "file")
    with pytest.raises(WeightsError, match="dangling cannot be written: "):
        export_weights(checkpoint, tmp_path / "dangling")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(WeightsError, match="there is no permission for "):
        export_weights(checkpoint, tmp_path / "out")
    with pytest.raises(WeightsError, match="there is no permission for "):
        import_weights(str(tmp_path), tmp_path / "m.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_folder_is_written_whole_or_not_at_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.tmp").mkdir()  # somebody else's
    (tmp_path / "empty").mkdir()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for name in ("out", "empty", "new/deep"):
        with pytest.raises(WeightsError, match=f"{name} cannot be written: .*No space left"):
            export_weights(checkpoint, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".out.tmp", "empty", "new"]


class Other(nn.Module):
    """A network of a researcher."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()


def build(name: str, **options: Any) -> nn.Module:
    """A small network with an option that is not everybody's."""
    sizes: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_ff": 8}
    layers = {"n_encoder_layers": 1, "n_decoder_layers": 1}
    if name == "EncoderDecoder":
        return EncoderDecoder(9, **{**sizes, **layers, **options})
    if name == "LanguageModel":
        return LanguageModel(9, **{**sizes, "n_layers": 1, "context_length": 8, **options})
    encoder = {**sizes, "n_layers": 1, "max_length": 8, **options}
    return Tagger(9, 2, encoder=lambda size: TextEncoder(size, **encoder))


class OwnDecoder(EncoderDecoder):
    """A subclass that may compute something else."""


class OwnNorm(nn.LayerNorm):
    """A norm that may compute something else."""


class OwnPositions(LearnedPositions):
    """Positions that may be something else."""


class OwnFeedForward(ReLUFeedForward):
    """A sublayer that may compute something else."""


def plain_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False)


@pytest.mark.parametrize("norm", [OwnNorm, plain_norm])
@pytest.mark.parametrize("name", ["EncoderDecoder", "LanguageModel", "Tagger"])
def test_a_norm_of_another_kind_is_refused(name: str, norm: Any) -> None:
    changes = {"positions": LearnedPositions, "embedding_norm": norm}
    options = changes if name == "EncoderDecoder" else {}
    with pytest.raises(WeightsError, match="cannot be written as .*its norm is"):
        describe(build(name, norm=norm, **options))


@pytest.mark.parametrize("name", ["EncoderDecoder", "LanguageModel", "Tagger"])
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"positions": OwnPositions}, "its positions is OwnPositions"),
        ({"feed_forward": OwnFeedForward}, "its feed_forward is OwnFeedForward"),
    ],
)
def test_classes_of_a_researcher_are_refused(name: str, options: Any, line: str) -> None:
    if name == "EncoderDecoder":
        defaults = {"positions": LearnedPositions, "embedding_norm": nn.LayerNorm}
        options = {**defaults, **options}
    with pytest.raises(WeightsError, match=line):
        describe(build(name, **options))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_without_layers_is_refused(stack: str) -> None:
    options = {"positions": LearnedPositions, f"n_{stack}_layers": 0}
    with pytest.raises(WeightsError, match=f"n_{stack}_layers is 0"):
        describe(build("EncoderDecoder", **options))


@pytest.mark.parametrize(
    "network", [Other(9), OwnDecoder(9, d_model=8, n_heads=2), nn.Linear(2, 2)]
)
def test_another_network_is_refused_with_what_is_supported(network: nn.Module) -> None:
    with pytest.raises(WeightsError, match=f"a {type(network).__name__} cannot be written; supp"):
        describe(network)


# The hub


class Hub(ModuleType):
    """Stands in for huggingface_hub."""

    def __init__(self, folder: Path, *, safe: bool = True, fault: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.safe, self.fault = folder, safe, fault
        self.asked: list[tuple[str, list[str]]] = []

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((name, allow_patterns))
        if self.fault is not None:
            raise self.fault
        return str(self.folder)


def test_a_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert local_folder("openai-community/gpt2") == folder
    assert [name for name, _ in hub.asked] == ["openai-community/gpt2"]
    assert "model*.safetensors" in hub.asked[0][1]
    (folder / "model.safetensors").unlink()  # then the pickle is asked for
    local_folder("gpt2")
    assert "pytorch_model*.bin" in hub.asked[-1][1]
    assert local_folder(str(folder)) == folder
    assert len(hub.asked) == 3


def test_without_hub_or_network_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = ConnectionError("no route\nto host")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(folder, fault=fault))
    with pytest.raises(WeightsError, match="gives no model of that name: no route to host$"):
        local_folder("openai-community/gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install 'tx-lightning\[huggingface\]'"):
        local_folder("openai-community/gpt2")


@pytest.mark.parametrize(
    "name",
    ["./models/gpt2", "/nowhere/at/all", "a/b/c", "../gpt2", "a b", "a\nb", "é/ü ß", "a//b", "a:b"],
)
def test_a_path_is_no_name(name: str) -> None:
    with pytest.raises(WeightsError, match="there is no such folder$"):
        local_folder(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(WeightsError, match="is a file; give the folder that it is in"):
        local_folder(str(folder / "config.json"))


def test_without_safetensors_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(folder, "the package safetensors is missing: pip install 'tx-lightning[huggingface]'")
