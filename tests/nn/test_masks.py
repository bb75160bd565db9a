"""True = may attend."""

import torch

from tx_lightning.nn.masks import additive_mask, causal_mask, padding_mask

CPU = torch.device("cpu")


def test_padding_mask() -> None:
    mask = padding_mask(torch.tensor([[5, 6, 9], [5, 9, 9], [9, 9, 9]]), pad_id=9)
    assert mask.shape == (3, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False], [False] * 3]


def test_causal_mask() -> None:
    assert causal_mask(3, 3, CPU).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_causal_mask_after_earlier_keys() -> None:
    assert causal_mask(2, 4, CPU).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(1, 4, CPU).all()
    assert torch.equal(causal_mask(2, 6, CPU), causal_mask(6, 6, CPU)[-2:])


def test_additive_mask() -> None:
    bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    mask = torch.tensor([[True, False]])
    inf = float("inf")
    assert additive_mask(mask, bias)[0, 0].tolist() == [[1, -inf], [3, -inf]]
    assert additive_mask(None, bias) is bias


def test_additive_mask_broadcasts_batch_and_heads() -> None:
    mask = padding_mask(torch.tensor([[5, 0], [5, 5], [0, 0]]), pad_id=0)  # (3, 1, 1, 2)
    combined = additive_mask(mask, torch.ones(1, 4, 2, 2))
    assert combined.shape == (3, 4, 2, 2)
    assert torch.equal(combined.isfinite(), mask.expand(3, 4, 2, 2))
