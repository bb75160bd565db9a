import pickle
import random
from pathlib import Path

import pytest
import sacrebleu
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from tests import processes
from tx_lightning.metrics import Confusion, ConfusionCounts, CorpusBLEU, CorpusChrF, TokenMean

WORDS = ["the", "a", "dog", "Dog", "cat,", "sleeps.", "café", "3.14", "!", "(well)", "don't"]


def corpus(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return references and noisy copies of them, some empty, of very different lengths."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(0, 15))) for _ in range(n)]
    hypotheses = [
        " ".join(rng.choice(WORDS) if rng.random() < 0.3 else word for word in line.split())
        for line in references
    ]
    hypotheses[::7] = ["" for _ in hypotheses[::7]]
    return hypotheses, references


def in_batches(metric: CorpusBLEU | CorpusChrF, size: int) -> float:
    hypotheses, references = corpus(60)
    for start in range(0, 60, size):
        metric.update(hypotheses[start : start + size], references[start : start + size])
    return metric.compute().item()


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "none"])
def test_bleu_is_sacrebleu_bit_for_bit(tokenize: str, lowercase: bool, size: int) -> None:
    hypotheses, references = corpus(60)
    oracle = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase)
    metric = CorpusBLEU(tokenize=tokenize, lowercase=lowercase)
    assert in_batches(metric, size) == oracle.corpus_score(hypotheses, [references]).score
    assert metric.signature == str(oracle.get_signature())


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_sacrebleu_bit_for_bit(word_order: int, lowercase: bool, size: int) -> None:
    hypotheses, references = corpus(60)
    oracle = sacrebleu.CHRF(word_order=word_order, lowercase=lowercase)
    metric = CorpusChrF(word_order=word_order, lowercase=lowercase)
    assert in_batches(metric, size) == oracle.corpus_score(hypotheses, [references]).score
    assert metric.signature == str(oracle.get_signature())


def test_bleu_is_smoothed_where_an_order_has_no_match() -> None:
    hypotheses, references = ["the dog sleeps now"], ["the dog bites a cat"]
    metric = CorpusBLEU()
    metric.update(hypotheses, references)
    expected = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert metric.compute().item() == expected > 0


def test_empty_updates_and_an_empty_corpus() -> None:
    for metric in (CorpusBLEU(), CorpusChrF()):
        metric.update([], [])
        assert metric.compute().item() == 0.0
        assert "version" in metric.signature


def test_reset_and_pickle_keep_the_statistics_apart() -> None:
    metric = CorpusBLEU()
    first = in_batches(metric, 10)
    copy = pickle.loads(pickle.dumps(metric))
    metric.reset()
    metric.update(["a b c d e"], ["a b c d e"])
    assert metric.compute().item() == pytest.approx(100.0)
    assert copy.compute().item() == first


def test_unequal_numbers_of_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 hypotheses were given for 1 references"):
        CorpusBLEU().update(["a", "b"], ["a"])


def test_an_unknown_tokenization_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"tokenize='13b' .* did you mean '13a'"):
        CorpusBLEU(tokenize="13b")


def test_token_mean_weighs_tokens_not_batches() -> None:
    metric = TokenMean()
    metric.update(torch.tensor(6.0, requires_grad=True), 2)
    metric.update(torch.tensor(1.0), torch.tensor(8))
    metric.update(3.0, 0)
    assert metric.compute().item() == 1.0
    assert metric.compute().dtype == torch.float64


def test_token_mean_does_not_lose_small_terms() -> None:
    metric = TokenMean()
    metric.update(1e8, 1)
    for _ in range(100):
        metric.update(torch.tensor(0.25), 0)  # each would vanish in a float32 sum
    assert metric.compute().item() == 1e8 + 25.0


def classes(n: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return given classes and labels, unbalanced, and often equal."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.rand(n, generator=generator).square().mul(n_classes).long()
    wrong = torch.rand(n, generator=generator) < 0.4
    return (labels + wrong * torch.arange(n)) % n_classes, labels


def test_confusion_by_hand() -> None:
    metric = ConfusionCounts(3)
    metric.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, -1]))  # one has no label
    metric.update(torch.tensor([1]), torch.tensor([0]))
    confusion = metric.compute()
    assert confusion.counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert confusion.accuracy == 0.5
    assert confusion.macro_f1 == 0.5  # the third class is nobody's
    assert confusion.per_class()[0] == (0.5, 0.5, 0.5, 2)
    assert confusion.per_class()[2] == (0.0, 0.0, 0.0, 0)
    nothing = Confusion(torch.zeros(2, 2, dtype=torch.int64))
    assert torch.tensor([nothing.accuracy, nothing.macro_f1]).isnan().all()


@pytest.mark.parametrize("n_classes", [2, 5, 30])
def test_confusion_is_that_of_torchmetrics(n_classes: int) -> None:
    metric = ConfusionCounts(n_classes)
    given, labels = classes(97, n_classes)
    for start in range(0, 97, 10):
        metric.update(given[start : start + 10], labels[start : start + 10])
    confusion = metric.compute()
    expected = multiclass_confusion_matrix(given, labels, n_classes)
    assert torch.equal(confusion.counts, expected)
    accuracy = multiclass_accuracy(given, labels, n_classes, average="micro")
    assert confusion.accuracy == pytest.approx(float(accuracy), abs=1e-6)
    f1 = multiclass_f1_score(given, labels, n_classes, average="macro")
    assert confusion.macro_f1 == pytest.approx(float(f1), abs=1e-6)
    for place, score in enumerate((multiclass_precision, multiclass_recall, multiclass_f1_score)):
        each = score(given, labels, n_classes, average=None)
        ours = torch.tensor([row[place] for row in confusion.per_class()])
        torch.testing.assert_close(ours, each.float())
    assert [row.support for row in confusion.per_class()] == expected.sum(1).tolist()


def _evaluate_shard(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    hypotheses, references = corpus(60)
    shard = slice(0, 41) if rank == 0 else slice(41, 60)
    bleu, chrf, mean = CorpusBLEU(), CorpusChrF(), TokenMean()
    bleu.update(hypotheses[shard], references[shard])
    chrf.update(hypotheses[shard], references[shard])
    for i in range(60)[shard]:
        mean.update(float(i), i)
    given, labels = (tensor[shard] for tensor in classes(60, 4))
    counts = ConfusionCounts(4)
    counts.update(given, labels)
    confusion = counts.compute()
    scores = [metric.compute().item() for metric in (bleu, chrf, mean)]
    scores += [confusion.accuracy, confusion.macro_f1]
    torch.save(scores, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_shards_give_the_same_digits(tmp_path: Path) -> None:
    processes.prepare()
    start_processes(_evaluate_shard, (str(tmp_path),), nprocs=2, start_method="forkserver")
    hypotheses, references = corpus(60)
    confusion = Confusion(multiclass_confusion_matrix(*classes(60, 4), 4))
    expected = [
        sacrebleu.corpus_bleu(hypotheses, [references]).score,
        sacrebleu.corpus_chrf(hypotheses, [references]).score,
        1.0,
        confusion.accuracy,
        confusion.macro_f1,
    ]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [expected, expected]
