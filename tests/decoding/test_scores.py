import pytest

from tx_lightning.decoding.scores import length_penalty


def test_length_penalty_is_equation_14_of_wu_et_al() -> None:
    assert length_penalty(1, 0.6) == 1.0
    assert length_penalty(7, 1.0) == 2.0
    assert length_penalty(19, 0.5) == 2.0
    assert length_penalty(100, 0.0) == 1.0
    assert length_penalty(10, 0.6) == pytest.approx(2.5**0.6)
