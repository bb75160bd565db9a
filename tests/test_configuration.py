"""What words and files set, before they are parsed."""

from pathlib import Path

from tx_lightning.configuration import differences, flat, given, without_option


def test_nested_settings_become_dotted_keys_without_init_args() -> None:
    tree = {
        "model": {"class_path": "A", "init_args": {"net": {"init_args": {"d": 3}}, "empty": {}}},
        "trainer": {"callbacks": [{"class_path": "B", "init_args": {"n": 1}}], "devices": [0, 1]},
    }
    assert flat(tree) == {
        "model.class_path": "A",
        "model.net.d": 3,
        "model.empty": {},
        "trainer.callbacks.0.class_path": "B",
        "trainer.callbacks.0.n": 1,
        "trainer.devices": [0, 1],
    }


def test_the_last_of_files_and_words_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed_everything: 1\nmodel: {init_args: {dim: 2, lr: 1}}\n")
    second.write_text("model: {init_args: {dim: 3}}\n")
    words = ["fit", "--config", str(first), "-c", str(second), "--model.init_args.lr=5"]
    assert given(words) == {"seed_everything": 1, "model.dim": 3, "model.lr": 5}
    section = ["--model", '{"class_path": "A", "init_args": {"dim": 4}}']
    assert given([*words, *section])["model.dim"] == 4


def test_what_cannot_be_read_is_left_to_the_parser(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    words = ["--config", str(broken), "--config", "nowhere.yaml", "--x", "[", "--seed=2", "--last"]
    assert given(words) == {"x": "[", "seed": 2, "last": None}


def test_an_option_is_taken_out_in_both_spellings() -> None:
    words = ["--a", "1", "--resume", "runs/x", "--resume=runs/y", "--resumes", "2"]
    assert without_option(words, "resume") == ["--a", "1", "--resumes", "2"]


def test_differences_name_the_keys_of_either_side() -> None:
    ours = {"class_path": "A", "init_args": {"dim": 2, "only": 1, "same": [1]}}
    theirs = {"class_path": "A", "init_args": {"dim": 3, "other": 2, "same": [1]}}
    assert differences(ours, theirs) == {"dim": (2, 3), "only": (1, None), "other": (None, 2)}
