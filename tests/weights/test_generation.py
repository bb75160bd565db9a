"""generation_config.json: transformers searches as we do, and what it cannot is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from tests.weights import hugging_face as hf
from tests.weights.conftest import OWN, Trained
from tests.weights.test_gpt2 import own as own_gpt2
from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.decoding import (
    Beam,
    BeginWith,
    Decoding,
    Filter,
    Greedy,
    MinLength,
    NoRepeatNgram,
    Sampling,
)
from tx_lightning.tasks import LanguageModeling, Translation
from tx_lightning.tasks.continuation import continue_texts
from tx_lightning.weights import WeightsError, export_weights, import_weights
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.exporting import export_checkpoint
from tx_lightning.weights.generation import read_search, write_continuation, write_translation
from tx_lightning.weights.seq2seq import MARIAN

SENTENCES = [source for source, _ in hf.sentence_pairs(40, seed=3)]
IDS = SpecialIds(pad=9, bos=9, eos=0, unk=1)
PLACES = {i: i for i in range(10)}


def written(decoding: Decoding, ids: SpecialIds = IDS, longest: int = 100) -> dict[str, Any]:
    return write_translation(decoding, ids, [], longest, PLACES)[0]


def notes(decoding: Decoding, ids: SpecialIds = IDS) -> list[str]:
    return write_translation(decoding, ids, [], 100, PLACES)[1]


class Theirs:
    """A model of transformers with its tokenizer, from a folder."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.given = self.tokenizer(SENTENCES, return_tensors="pt", padding=True)

    def translate(self, config: GenerationConfig | None = None) -> list[list[str]]:
        """What `generate` gives for SENTENCES, as tokens."""
        options = {} if config is None else {"generation_config": config}
        found = self.model.generate(
            self.given["input_ids"], attention_mask=self.given["attention_mask"], **options
        )
        end = self.tokenizer.eos_token_id
        rows = [[*row, end] for row in found[:, 1:].tolist()]
        return [self._tokens(row[: row.index(end)]) for row in rows]

    def _tokens(self, ids: list[int]) -> list[str]:
        return [token.replace(" ", "") for token in self.tokenizer.convert_ids_to_tokens(ids)]


def ours(task: Translation, decoding: Decoding | None = None) -> list[list[str]]:
    entries = task.require_tokenizers().target.entries()
    found = task.translate(SENTENCES, decoding)
    return [[entries[i] for i in best.tokens] for best, *_ in found]


def translation(path: Path) -> Translation:
    task = hf.load(path)
    assert isinstance(task, Translation)
    return task


@pytest.mark.parametrize("name", OWN)
def test_generate_without_arguments_translates_as_the_checkpoint_does(
    name: str, trained: Trained, tmp_path: Path
) -> None:
    exported = export_checkpoint(trained(name), tmp_path / "ours")
    assert [note for note in exported.notes if "CTranslate2" not in note] == []
    task, theirs = translation(trained(name)), Theirs(tmp_path / "ours")
    expected = ours(task)
    assert theirs.translate() == expected
    assert len({tuple(tokens) for tokens in expected}) > len(SENTENCES) / 5
    if name == "unshared":  # as are the others; it takes its time
        return
    import_weights(str(tmp_path / "ours"), tmp_path / "again.ckpt")
    again = translation(tmp_path / "again.ckpt")
    assert ours(again) == expected
    assert isinstance(again.test_decoding, Beam)
    assert isinstance(task.test_decoding, Beam)
    assert vars(again.test_decoding) == vars(task.test_decoding)


@pytest.fixture(scope="module")
def pair(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Translation, Theirs]:
    """A translation model here and there."""
    folder = tmp_path_factory.mktemp("pair") / "ours"
    export_weights(trained("marian"), folder)
    return translation(trained("marian")), Theirs(folder)


FILTERS: list[Filter] = [MinLength(5), NoRepeatNgram(1), NoRepeatNgram(2), BeginWith([8])]


@pytest.mark.parametrize("chosen", [[], *([one] for one in FILTERS), FILTERS])
@pytest.mark.parametrize("kind", [Greedy, Beam])
def test_every_filter_means_the_same_there(
    kind: type[Greedy] | type[Beam], chosen: list[Filter], pair: tuple[Translation, Theirs]
) -> None:
    task, theirs = pair
    tokenizer = task.require_tokenizers().target
    options: dict[str, Any] = {"beam_size": 20} if kind is Beam else {}
    decoding = kind(
        length_penalty=0, max_length_ratio=0, max_length_offset=20, filters=chosen, **options
    )
    last = tokenizer.vocab_size - 2
    ids = SpecialIds(pad=last, bos=last, eos=0, unk=1)
    places = {i: i - 2 for i in range(2, tokenizer.vocab_size)}  # as it is exported
    settings, left_out = write_translation(decoding, ids, [], 100, places)
    assert left_out == []
    assert theirs.translate(GenerationConfig(**settings)) == ours(task, decoding)


def test_the_search_of_the_default_is_near_and_what_differs_is_said(
    pair: tuple[Translation, Theirs],
) -> None:
    task, theirs = pair
    decoding = Beam(max_length_ratio=0, max_length_offset=12)
    settings = written(decoding)
    assert settings["length_penalty"] == 0.48
    ours_at_40 = (45 / 15) ** 0.6  # beside a length of 10
    assert ours_at_40 == pytest.approx((40 / 10) ** 0.48, rel=0.01)
    last = task.require_tokenizers().target.vocab_size - 2
    settings |= {"pad_token_id": last, "decoder_start_token_id": last, "suppress_tokens": [last]}
    found, expected = theirs.translate(GenerationConfig(**settings)), ours(task, decoding)
    assert sum(map(list.__eq__, found, expected)) >= 0.8 * len(expected)
    [note] = notes(decoding)
    assert note == (
        "length_penalty 0.6 is written as 0.48: transformers divides by length^0.48, not by "
        "((5 + length) / 6)^0.6"
    )


@pytest.mark.parametrize(
    ("decoding", "settings"),
    [
        (Greedy(), {"num_beams": 1, "do_sample": False, "max_length": 101}),
        (Greedy(max_length_ratio=0, max_length_offset=7), {"max_length": 8}),
        (Greedy(max_length_ratio=0.5, max_length_offset=7), {"max_length": 58}),
        (Greedy(max_length_ratio=0, max_length_offset=-3), {"max_length": 2}),
        (Beam(beam_size=1), {"num_beams": 1, "do_sample": False}),
        (
            Beam(beam_size=3, n_best=2, length_penalty=0),
            {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
        ),
        (
            Sampling(n_samples=2, temperature=0.7, top_p=0.9, min_p=0.1),
            {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
        ),
        (Sampling(top_k=5), {"top_k": 5, "top_p": 1.0, "num_beams": 1}),
        (Greedy(filters=[MinLength(2), MinLength(4)]), {"min_length": 5}),
        (Greedy(filters=[NoRepeatNgram(3), NoRepeatNgram(2)]), {"no_repeat_ngram_size": 2}),
        (Greedy(filters=[BeginWith([4])]), {"forced_bos_token_id": 4}),
        (Greedy(), {"suppress_tokens": [9], "eos_token_id": 0, "decoder_start_token_id": 9}),
    ],
)
def test_settings_are_written_in_their_terms(decoding: Decoding, settings: dict[str, Any]) -> None:
    found = written(decoding)
    assert {name: found.get(name) for name in settings} == settings
    GenerationConfig(**found).validate(strict=True)
    json.dumps(found, allow_nan=False)


class Own(Greedy):
    """A search of a researcher."""


class OwnFilter(MinLength):
    """A filter of a researcher."""


@pytest.mark.parametrize(
    ("decoding", "line"),
    [
        (Own(max_length_ratio=0), "Own is written as greedy search"),
        (Sampling(max_length_ratio=0), "samples differ"),
        (
            Greedy(max_length_ratio=0, filters=[OwnFilter(3)]),
            "the filter OwnFilter is not exported",
        ),
        (
            Greedy(max_length_ratio=0, filters=[BeginWith([4, 5])]),
            "filter BeginWith is not exported",
        ),
        (Greedy(max_length_ratio=0, filters=[BeginWith([77])]), "filter BeginWith is not exported"),
        (
            Greedy(max_length_ratio=1.5, max_length_offset=4),
            "100 tokens: transformers has no limit relative to the source, here 1.5 x source + 4",
        ),
    ],
)
def test_what_they_have_no_terms_for_is_said(decoding: Decoding, line: str) -> None:
    [note] = notes(decoding)
    assert line in note


def test_a_start_that_is_the_end_may_come_again_here_alone() -> None:
    """Theirs count the start: with BART's no text could end."""
    ids = SpecialIds(pad=1, bos=2, eos=2, unk=3)
    decoding = Greedy(max_length_ratio=0, filters=[NoRepeatNgram(1)])
    assert "no_repeat_ngram_size" not in written(decoding, ids)
    assert "the filter NoRepeatNgram is not exported" in notes(decoding, ids)[0]
    assert written(Greedy(filters=[NoRepeatNgram(2)]), ids)["no_repeat_ngram_size"] == 2
    assert written(decoding, ids)["suppress_tokens"] == [1]


@pytest.mark.parametrize(
    "decoding",
    [
        Beam(length_penalty=0, max_length_ratio=0, max_length_offset=30),
        Beam(beam_size=7, length_penalty=0, max_length_ratio=0, filters=[MinLength(3)]),
        Beam(
            length_penalty=0,
            max_length_ratio=0,
            filters=[BeginWith([3]), NoRepeatNgram(4), MinLength(1)],
        ),
    ],
)
def test_a_search_comes_back(decoding: Beam) -> None:
    config = Configuration({"vocab_size": 10, **written(decoding)}, MARIAN.defaults, "config.json")
    found, left_out = read_search(config, None)
    assert left_out == []
    settings = found["test_decoding"]["init_args"]
    filters = [
        (one["class_path"].rpartition(".")[2], one["init_args"]) for one in settings.pop("filters")
    ]
    assert filters == [(type(one).__name__, vars(one)) for one in decoding.filters]
    assert vars(Beam(**settings, filters=decoding.filters)) == vars(decoding)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_length": 9}, 8),
        ({"max_new_tokens": 9}, 9),
        ({"max_new_tokens": 9, "max_length": 4}, 9),  # as there
    ],
)
def test_both_limits_are_read(given: dict[str, int], expected: int) -> None:
    config = Configuration({"vocab_size": 10, **given}, MARIAN.defaults, "config.json")
    found, _ = read_search(config, None)
    assert found["decoding"]["init_args"]["max_length_offset"] == expected


def test_a_length_penalty_that_is_not_taken_over_is_said() -> None:
    config = Configuration({"vocab_size": 10, "num_beams": 4}, MARIAN.defaults, "config.json")
    [note] = read_search(config, None)[1]
    assert note == (
        "length_penalty 1 is ignored: transformers divides by length^1, Beam by "
        "((5 + length) / 6)^0.6"
    )


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "4", [4], 10**9])
@pytest.mark.parametrize("name", ["num_beams", "max_length", "max_new_tokens"])
def test_numbers_that_cannot_be_are_refused(name: str, value: Any) -> None:
    config = Configuration({"vocab_size": 10, name: value}, MARIAN.defaults, "generation.json")
    with pytest.raises(WeightsError, match=f"generation.json: {name} is .*a whole number from"):
        read_search(config, None)


# Imported ones


def test_imported_settings_are_written_as_they_were(trained: Trained, tmp_path: Path) -> None:
    export_weights(trained("bart"), tmp_path / "theirs")
    path = tmp_path / "theirs" / "generation_config.json"
    values = {**json.loads(path.read_text("utf-8")), "temperature": 0.5}
    del values["max_length"]
    path.write_text(json.dumps(values), "utf-8")
    import_weights(str(tmp_path / "theirs"), tmp_path / "m.ckpt")
    exported = export_checkpoint(tmp_path / "m.ckpt", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / path.name).read_text("utf-8")) == values
    assert "transformers stops after 20 tokens" in exported.notes[0]

    def forget(checkpoint: Any) -> None:
        checkpoint["imported"]["generation"] = {}  # the folder had no such file

    hf.change_checkpoint(tmp_path / "m.ckpt", forget)
    export_weights(tmp_path / "m.ckpt", tmp_path / "new")
    found = json.loads((tmp_path / "new" / path.name).read_text("utf-8"))
    assert found["max_length"] == 49  # all positions and the start


# Language models


def test_a_language_model_goes_on_to_the_end_of_its_positions(tmp_path: Path) -> None:
    own_gpt2(tmp_path / "own.ckpt")
    exported = export_checkpoint(tmp_path / "own.ckpt", tmp_path / "ours")
    assert exported.notes[0] == "samples differ: transformers draws other random numbers"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.8, 200)
    assert config.max_length == 24
    task = hf.load(tmp_path / "own.ckpt")
    assert isinstance(task, LanguageModeling)
    ids = torch.tensor(task.tokenizer.encode_batch(["the quick fox"]))
    found = model.generate(ids, do_sample=False)[0, ids.shape[1] :].tolist()
    [[best]] = continue_texts(
        task.network,
        task.tokenizer,
        ["the quick fox"],
        Greedy(),
        max_new_tokens=24 - ids.shape[1],
    )
    end = task.tokenizer.eos_id
    assert found[: found.index(end) if end in found else None] == best.tokens
    assert len(found) > 5


def test_filters_of_a_language_model_count_the_prompt() -> None:
    decoding = Greedy(filters=[MinLength(6), NoRepeatNgram(1), BeginWith([4])])
    settings, left_out = write_continuation(decoding, SpecialIds(9, 9, 0, 1), [7], 50)
    assert settings["min_length"] == 6
    assert settings["no_repeat_ngram_size"] == 1
    assert settings["suppress_tokens"] == [1, 7, 9]
    assert "the filter BeginWith is not exported" in left_out[0]
