"""Translation models that several modules export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.weights import hugging_face as hf

# So wide that it hardly matters how many beams live on beside those that have ended: transformers
# keeps all, we keep those among the best.
BEAM = {
    "test_decoding": {
        "class_path": "tx_lightning.decoding.Beam",
        "init_args": {
            "beam_size": 20,
            "length_penalty": 0.0,
            "max_length_ratio": 0.0,
            "max_length_offset": 20,
        },
    }
}
OWN: dict[str, dict[str, Any]] = {
    "marian": {"kind": "marian"},
    "unshared": {
        "kind": "marian",
        "share_embeddings": False,
        "scale_embeddings": False,
        "positions": hf.AS_LARGE_AS_1,
        "output_bias": True,
        "unused": 3,
    },
    "bart": {"kind": "bart"},
}
Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The checkpoint of a translation model of a kind, trained once."""
    folder = tmp_path_factory.mktemp("trained")

    def checkpoint(name: str) -> Path:
        path = folder / f"{name}.ckpt"
        if not path.exists():
            hf.trained(path, search=BEAM, **OWN[name])
        return path

    return checkpoint
