"""Score hypotheses as published Multi30k results are: lower-cased, Moses-tokenized BLEU.

    python benchmarks/tokenized_bleu.py HYPOTHESES REFERENCE --language de

HYPOTHESES holds detokenized text, one sentence a line, as `predict` writes it. REFERENCE is a file
that is lower-cased, normalized and tokenized already: test_2016_flickr.lc.norm.tok.de. What this
script makes of the raw test_2016_flickr.de is exactly that file. The score is not comparable with
sacreBLEU on detokenized text.
"""

import argparse
import sys
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU
from sacremoses import MosesPunctNormalizer, MosesTokenizer


def moses(lines: list[str], language: str) -> list[str]:
    """Lower-case, normalize punctuation, tokenize and escape, as the reference files were made."""
    normalizer, tokenizer = MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language)
    return [
        tokenizer.tokenize(normalizer.normalize(line.lower()), return_str=True, escape=True)
        for line in lines
    ]


def tokenized_bleu(hypotheses: list[str], reference: list[str], language: str) -> tuple[float, str]:
    """Corpus BLEU of detokenized hypotheses against a tokenized reference, with its signature."""
    bleu = BLEU(tokenize="none", force=True)  # force: the reference is tokenized on purpose
    score = bleu.corpus_score(moses(hypotheses, language), [reference]).score
    return score, str(bleu.get_signature())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("hypotheses", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--language", default="de")
    arguments = parser.parse_args()
    # Only "\n" ends a line: str.splitlines would also split at other characters in the text.
    hypotheses, reference = (
        path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for path in (arguments.hypotheses, arguments.reference)
    )
    if len(hypotheses) != len(reference):
        print(
            f"error: {arguments.hypotheses} has {len(hypotheses)} lines and "
            f"{arguments.reference} has {len(reference)}; they must be of the same split",
            file=sys.stderr,
        )
        return 1
    score, signature = tokenized_bleu(hypotheses, reference, arguments.language)
    print(f"{score:.2f} (lower-cased, Moses-tokenized; {signature})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
