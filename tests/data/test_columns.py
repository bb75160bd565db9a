"""One rule for rows of columns, whatever reads them: all of a file have as many as the first."""

from pathlib import Path
from typing import Any

import pytest

from tx_lightning.data import TSV, LabelledCSV, LabelledTSV
from tx_lightning.data.classification import split_line
from tx_lightning.data.errors import DataError
from tx_lightning.data.tagged_sources import CoNLL


def pairs(**options: Any) -> list[Any]:
    return list(TSV(**options).pairs("train"))


def labelled(**options: Any) -> list[Any]:
    return list(LabelledTSV(**options).examples("train"))


def commas(**options: Any) -> list[Any]:
    return list(LabelledCSV(**options).examples("train"))


def tagged(**options: Any) -> list[Any]:
    return list(CoNLL(**options).sentences("train"))


READERS = [pairs, labelled, commas, tagged]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("row", "columns"), [("a|b|c|d", 4), ("a|b", 2), ("a|b|c|", 4)])
def test_a_row_of_another_width_is_refused(
    read: Any, row: str, columns: int, tmp_path: Path
) -> None:
    """A stray tab would put a part of a text where the label or the translation is."""
    path = tmp_path / "file"
    gap = "," if read is commas else "\t"
    path.write_text(f"a|b|c\na|b|c\n{row}\n".replace("|", gap))
    with pytest.raises(DataError) as caught:
        read(train=str(path))
    assert str(caught.value).startswith(f"{path}, line 3 has {columns} ")
    assert str(caught.value).endswith("has 3")


@pytest.mark.parametrize("read", [pairs, labelled, commas])
def test_the_header_is_the_first_row(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    gap = "," if read is commas else "\t"
    path.write_text("x|y\na|b\na|b|c\n".replace("|", gap))
    first, second = ("source", "target") if read is pairs else ("text", "label")
    columns = {f"{first}_column": "x", f"{second}_column": "y"}
    with pytest.raises(DataError, match="line 3 has 3 fields, but the header has 2"):
        read(train=str(path), **columns)


@pytest.mark.parametrize("read", READERS)
def test_rows_of_one_width_are_read(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    gap = "," if read is commas else "\t"
    path.write_text("a|b|c\nd|e|f\n".replace("|", gap))
    assert len(read(train=str(path))) == (1 if read is tagged else 2)


def test_lines_of_pairs_have_two_columns_and_others_have_none() -> None:
    """What classify and predict read."""
    assert split_line("a\tb", True, "line 1") == ["a", "b"]
    assert split_line("a\tb\tc", False, "line 1") == ["a\tb\tc"]
    for line, tabs in (("a", 0), ("a\tb\tc", 2), ("a\tb\t", 2)):
        with pytest.raises(DataError, match=f"line 1 has {tabs} tabs; exactly one separates"):
            split_line(line, True, "line 1")
