"""Text to batches: sources, tokenizers, the token store, samplers, one data module per task.

The names below are imported when they are first asked for: Lightning alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tx_lightning.data.batches import TranslationBatch
    from tx_lightning.data.classification import ClassificationBatch, ClassificationData
    from tx_lightning.data.denoising import (
        DenoisingData,
        Noise,
        SpanCorruption,
        TextInfilling,
    )
    from tx_lightning.data.errors import DataError
    from tx_lightning.data.grammar import Grammar
    from tx_lightning.data.huggingface import HuggingFacePairs
    from tx_lightning.data.labelled_sources import (
        SST2,
        GrammarPolarity,
        HuggingFaceLabelled,
        LabelledCSV,
        LabelledJSONLines,
        LabelledSource,
        LabelledTSV,
        TextsOf,
    )
    from tx_lightning.data.language_modeling import LanguageModelingData
    from tx_lightning.data.masked_language_modeling import MaskedLanguageModelingData
    from tx_lightning.data.masking import Masking
    from tx_lightning.data.module import TextData
    from tx_lightning.data.multi30k import Multi30k
    from tx_lightning.data.sources import TSV, JSONLines, ParallelSource, TextPairs
    from tx_lightning.data.tagged_sources import (
        CoNLL,
        GrammarTags,
        TaggedJSONLines,
        TaggedSource,
    )
    from tx_lightning.data.tagging import TaggingBatch, TaggingData
    from tx_lightning.data.text_sources import (
        GrammarText,
        HuggingFaceTexts,
        SideOf,
        TextFiles,
        TextSource,
        TinyShakespeare,
    )
    from tx_lightning.data.tokenizers import (
        ByteLevelBPE,
        Characters,
        Tokenizer,
        Tokenizers,
        TokenizerTrainer,
        Unigram,
        Words,
    )
    from tx_lightning.data.translation import TranslationData

_MODULES = {
    "batches": ["TranslationBatch"],
    "classification": ["ClassificationBatch", "ClassificationData"],
    "denoising": ["DenoisingData", "Noise", "SpanCorruption", "TextInfilling"],
    "errors": ["DataError"],
    "grammar": ["Grammar"],
    "huggingface": ["HuggingFacePairs"],
    "labelled_sources": [
        "SST2",
        "GrammarPolarity",
        "HuggingFaceLabelled",
        "LabelledCSV",
        "LabelledJSONLines",
        "LabelledSource",
        "LabelledTSV",
        "TextsOf",
    ],
    "language_modeling": ["LanguageModelingData"],
    "module": ["TextData"],
    "masked_language_modeling": ["MaskedLanguageModelingData"],
    "masking": ["Masking"],
    "multi30k": ["Multi30k"],
    "sources": ["TSV", "JSONLines", "ParallelSource", "TextPairs"],
    "tagged_sources": ["CoNLL", "GrammarTags", "TaggedJSONLines", "TaggedSource"],
    "tagging": ["TaggingBatch", "TaggingData"],
    "text_sources": [
        "GrammarText",
        "HuggingFaceTexts",
        "SideOf",
        "TextFiles",
        "TextSource",
        "TinyShakespeare",
    ],
    "tokenizers": [
        "ByteLevelBPE",
        "Characters",
        "Tokenizer",
        "TokenizerTrainer",
        "Tokenizers",
        "Unigram",
        "Words",
    ],
    "translation": ["TranslationData"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "SST2",
    "TSV",
    "ByteLevelBPE",
    "Characters",
    "ClassificationBatch",
    "ClassificationData",
    "CoNLL",
    "DataError",
    "DenoisingData",
    "Grammar",
    "GrammarPolarity",
    "GrammarTags",
    "GrammarText",
    "HuggingFaceLabelled",
    "HuggingFacePairs",
    "HuggingFaceTexts",
    "JSONLines",
    "LabelledCSV",
    "LabelledJSONLines",
    "LabelledSource",
    "LabelledTSV",
    "LanguageModelingData",
    "MaskedLanguageModelingData",
    "Masking",
    "Multi30k",
    "Noise",
    "ParallelSource",
    "SideOf",
    "SpanCorruption",
    "TaggedJSONLines",
    "TaggedSource",
    "TaggingBatch",
    "TaggingData",
    "TextData",
    "TextFiles",
    "TextInfilling",
    "TextPairs",
    "TextSource",
    "TextsOf",
    "TinyShakespeare",
    "Tokenizer",
    "TokenizerTrainer",
    "Tokenizers",
    "TranslationBatch",
    "TranslationData",
    "Unigram",
    "Words",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
