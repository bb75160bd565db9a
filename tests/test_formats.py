"""A checkpoint of each format that was ever written still loads, and says what it said."""

from pathlib import Path

import pytest

from tx_lightning.checkpoints import FORMAT, load_task, read_checkpoint
from tx_lightning.tasks import Translation

FILES = Path(__file__).parent / "formats"
# What the model of each file makes of "Das Kind tanzt .", as it did when the file was written.
SAID = {1: "This boy."}


def test_there_is_a_file_of_each_format() -> None:
    assert sorted(SAID) == list(range(1, FORMAT + 1))


@pytest.mark.parametrize("number", SAID)
def test_it_loads_and_translates(number: int) -> None:
    path = FILES / f"format-{number}.ckpt"
    assert read_checkpoint(path)["tx_lightning"]["format"] == number
    task = load_task(path)
    assert isinstance(task, Translation)
    ((best, *_),) = task.translate(["Das Kind tanzt ."])
    assert best.text == SAID[number]
