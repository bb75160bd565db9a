"""What translate, generate and classify share: standard input and output, devices, options."""

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tasks import test_classification as classification
from tests.tasks import test_tagging as tagging
from tests.test_classify import write
from tests.test_generate import checkpoint as language_model
from tests.test_translate import checkpoint as translator
from tx_lightning import text_verbs
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import load_task
from tx_lightning.data import text
from tx_lightning.data.tokenizers import Characters, Words
from tx_lightning.decoding import Greedy
from tx_lightning.errors import ConfigurationError
from tx_lightning.metrics import CorpusBLEU
from tx_lightning.tasks.continuation import continue_texts
from tx_lightning.text_verbs import device_named, read_lines

__all__ = ["language_model", "translator"]  # fixtures

VERBS = ["translate", "generate", "classify"]


class Failing(io.RawIOBase):
    """Gives some bytes, then fails as a broken disk does."""

    def __init__(self, content: bytes, error: Exception) -> None:
        self.content = io.BytesIO(content)
        self.error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if chunk := self.content.read(len(buffer)):
            buffer[: len(chunk)] = chunk
            return len(chunk)
        raise self.error


@pytest.fixture(scope="module")
def tasks(
    translator: Path, language_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A task for each verb, and a tagger."""
    folder = tmp_path_factory.mktemp("labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TX_LIGHTNING_CACHE", str(folder))
        classifier, tagger = classification.make_task(), tagging.make_task()
        classification.ready(classification.make_data(), classifier)
        tagging.ready(tagging.make_data(), tagger)
    files = {
        "translate": translator,
        "generate": language_model,
        "classify": write(classifier, classification.settings(), folder / "classifier.ckpt"),
        "tag": write(tagger, tagging.settings(), folder / "tagger.ckpt"),
    }
    return {verb: load_task(file) for verb, file in files.items()}


@pytest.fixture
def run(
    tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a verb; its status, what it wrote and what it complained of."""
    for verb in VERBS:
        task = tasks[verb]
        monkeypatch.setattr(f"tx_lightning.{verb}.load_task", lambda *_, task=task, **__: task)

    def call(verb: str, *words: str, given: Any = b"") -> tuple[int, str, str]:
        stream = io.BytesIO(given) if isinstance(given, bytes) else given
        monkeypatch.setattr("sys.stdin", None if stream is None else io.TextIOWrapper(stream))
        short = ["--max_new_tokens=2"] if verb == "generate" else []
        status = main([verb, "model.ckpt", *short, *words])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_reading_comes_after_the_lines_before_it(run: Any, verb: str) -> None:
    """The reader's thread used to die in silence, and the verb waited for ever."""
    for error, says in (
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "Is a directory"),
        (RuntimeError("whatever else"), "whatever else"),
    ):
        broken = io.BufferedReader(Failing(b"one\ntwo\nthree", error))
        status, out, said = run(verb, "--batch_size=1", given=broken)
        assert status == 1
        assert said == f"error: standard input cannot be read: {says}\n"
        assert out.count("\n--- " if verb == "generate" else "\n") == (
            1 if verb == "generate" else 2
        )


@pytest.mark.parametrize("verb", VERBS)
def test_closed_streams_are_one_line(run: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, said = run(verb, given=None)
    assert (status, out) == (1, "")
    assert said.startswith("error: standard input is closed: ")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        assert run(verb, given=b"one\n")[0] == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line(run: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with full.open("w") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", file)
        status, _, said = run(verb, given=b"one\n")
    assert status == 1
    assert said == "error: standard output cannot be written: No space left on device\n"


WRONG = [
    (b"one\ntw\0o\n", "line 2 holds a NUL byte"),
    (b"\xffone\n", "line 1: not UTF-8: byte 1 (0xff); if the file is LATIN1"),
    (b"\xff\xfeo\0n\0e\0\n", "line 1: not UTF-8: byte 1 (0xff); if the file is UTF-16"),
    (b"one\n" + b"x" * 70 + b"\n", "line 2 is longer than"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("content", "says"), WRONG)
def test_what_is_no_text_is_named_by_line(
    run: Any, verb: str, content: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (text, text_verbs):
        monkeypatch.setattr(module, "LONGEST_LINE", 64)
    status, _, said = run(verb, given=content)
    assert status == 1
    assert said.startswith(f"error: standard input, {says}")
    assert len(said.splitlines()) == 1


def test_prompts_are_text_of_one_or_more_lines(run: Any) -> None:
    status, out, said = run("generate", "--prompt", "one", "--prompt", "tw\0o")
    assert (status, out) == (1, "")
    assert said.startswith("error: prompt 2 holds a NUL byte")
    assert run("generate", "--prompt", "\ufeffa\r\nb") == run("generate", "--prompt", "a\nb")
    for prompt in ("{a: 1, a: 2}", "a: [", "---\n- x: 1\n  x: 2", ".nan", "null", "[" * 2000):
        status, out, said = run("generate", f"--prompt={prompt}")
        assert (status, said) == (0, "")
        assert out.startswith(prompt)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([b"a", b"\xc3\xa4", b"\xc3", b"\0", b"\r", b"\n", b"\xef\xbb\xbf", b"\t"]),
        min_size=1,
        max_size=12,
    ).map(b"".join)
)
@example(b"\xef\xbb\xbfa\r\nb")
@example(b"a" * 70)
def test_standard_input_and_files_have_the_same_rules(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("rules") / "file"
    file.write_bytes(content)

    def outcome(lines: Callable[[], list[str]], name: str) -> tuple[list[str], str]:
        try:
            return lines(), ""
        except ValueError as error:
            where, _, _ = str(error).removeprefix(name).partition(" (")
            return [], where.split(":")[0].split(" holds")[0]

    def of_file() -> list[str]:
        return list(text.read_lines(file))

    def of_input() -> list[str]:
        return [line for batch in read_lines(io.BytesIO(content), 2) for line in batch]

    if content != b"\xef\xbb\xbf":  # an empty file is an error, no input is not
        assert outcome(of_input, "standard input") == outcome(of_file, str(file))


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "meta", "xpu:0", "abacus", "", "cpu:3"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_device_that_is_not_there_is_one_line(run: Any, verb: str, name: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has one")
    status, out, said = run(verb, "--device", name, given=b"one\n")
    assert (status, out) == (2, "")
    assert said == f"error: --device {name}: there is no such device here; there are 'cpu'\n"


def test_devices_that_are_there_are_known_by_kind_and_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cuda", "cuda:0", "cuda:1", "cpu"):
        assert device_named(name) == torch.device(name)
    with pytest.raises(ConfigurationError, match=r"cuda:2: .*'cuda:1', 'cuda:0', 'cpu'"):
        device_named("cuda:2")
    with pytest.raises(ConfigurationError, match="mps: there is no such device"):
        device_named("mps")


# Options by verb; --decoding.* are those of a search, which its constructor checks.
OPTIONS = {
    "translate": (
        "decoding beam_size n_best length_penalty batch_size batch_tokens device "
        "decoding.max_length_ratio decoding.max_length_offset decoding.filters decoding.class_path "
        "trust"
    ).split(),
    "generate": (
        "decoding max_new_tokens past_context stride new_document stop_at_end json batch_size "
        "batch_tokens device temperature top_k top_p min_p n_samples seed beam_size n_best trust"
    ).split(),
    "classify": "all json batch_size batch_tokens device trust".split(),
}
ODD = ["0", "-1", ".nan", "1e300", "1" + 18 * "0", "", "x", "null", "[]", "true"]
# What is not refused: it means something.
FINE = {
    ("length_penalty", "0"),
    ("decoding.max_length_ratio", "0"),
    ("decoding.max_length_offset", "0"),
    ("decoding.max_length_offset", "-1"),
    ("decoding.filters", "[]"),
    ("temperature", "1e300"),
    ("temperature", "1" + 18 * "0"),
    ("top_k", "1" + 18 * "0"),
    ("top_k", "null"),
    ("top_p", "null"),
    ("min_p", "null"),
    ("min_p", "0"),
    ("seed", "0"),
    ("seed", "1" + 18 * "0"),
    ("batch_size", "1" + 18 * "0"),
    ("batch_tokens", "1" + 18 * "0"),
    ("new_document", "true"),
    ("stop_at_end", "true"),
    ("json", "true"),
    ("all", "true"),
    ("trust", "x"),
    ("trust", "null"),
    ("trust", "true"),
}


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb in OPTIONS for option in OPTIONS[verb]]
)
def test_odd_values_of_options_are_one_line(run: Any, verb: str, option: str) -> None:
    for value in ODD:
        status, out, said = run(verb, f"--{option}={value}", given=b"one\n")
        if (option, value) in FINE:
            assert (status, said) == (0, ""), value
            assert out.endswith("\n")
        else:
            assert status in (1, 2), value
            assert out == ""
            assert len(said.splitlines()) == 1, said
            assert said.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ["average", "nowhere", "--last"],
        ["average", "nowhere", "--best"],
        ["average", "nowhere", "--best", "1", "--metric"],
        ["import", "nowhere", "--output", "o.ckpt", "--task"],
        ["import", "nowhere", "--output", "o.ckpt", "--n_texts"],
        ["export", "nowhere"],
        ["reproduce"],
    ],
)
def test_other_verbs_answer_odd_values_with_one_line(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "nowhere").mkdir()
    for value in ODD:
        assert main([*words, value]) in (1, 2)
        out, said = capsys.readouterr()
        assert out == ""
        assert len(said.splitlines()) == 1, said
        assert said.startswith("error: ")


def test_every_option_is_tried() -> None:
    for verb, tried in OPTIONS.items():
        module = __import__(f"tx_lightning.{verb}", fromlist=["_parser"])
        own = {action.dest for action in module._parser()._actions}
        own -= {"help", "checkpoint", "prompt", "print_config", "decoding.help"}
        short = set(getattr(module, "SHORT", {}))
        assert own | short <= set(tried)


def test_every_sequence_of_texts_refuses_a_text(tasks: dict[str, Any]) -> None:
    language_model, tokenizer = tasks["generate"], tasks["translate"].tokenizers.source
    calls: list[Callable[[Any], object]] = [
        tasks["translate"].translate,
        tasks["classify"].classify,
        tasks["tag"].tag,
        lambda text: tasks["tag"].tag([text]),
        lambda text: continue_texts(
            language_model.network, language_model.tokenizer, text, Greedy(), max_new_tokens=1
        ),
        tokenizer.encode_batch,
        tokenizer.encode_words,
        lambda text: tokenizer.encode_words([text]),
        lambda text: Words().train(text, 10),
        lambda text: Characters().train(text, 10),
        lambda text: CorpusBLEU().update(text, text),
        lambda text: CorpusBLEU().update([text], "a"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"lists? of texts") as caught:
            call("abc")
        assert "\n" not in str(caught.value)


def test_sizes_of_the_python_interface_are_checked(tasks: dict[str, Any]) -> None:
    language_model = tasks["generate"]

    def more(**sizes: Any) -> object:
        network, tokenizer = language_model.network, language_model.tokenizer
        return continue_texts(network, tokenizer, ["a"], Greedy(), **{"max_new_tokens": 1, **sizes})

    calls: list[Callable[[Any], object]] = [
        lambda size: tasks["translate"].translate(["eins"], batch_tokens=size),
        lambda size: tasks["classify"].classify(["one"], batch_tokens=size),
        lambda size: tasks["tag"].tag([["one"]], batch_tokens=size),
        lambda size: more(batch_tokens=size),
    ]
    for size in (0, -1, 1.5, True):
        for call in calls:
            with pytest.raises(ValueError, match="batch_tokens must be"):
                call(size)
        with pytest.raises(ValueError, match="max_new_tokens must be"):
            more(max_new_tokens=size)
    with pytest.raises(ValueError, match="max_new_tokens must be at most 1,000,000"):
        more(max_new_tokens=10**18)
