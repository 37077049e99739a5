"""Text for language models: prepared once as memory-mapped token files, read in batches by any number of processes."""

from statetrack.data.packed import PackedBatch, PackedBatches, PackedRows, PackedTokens
from statetrack.data.preparation import DataError, PrepareConfig, check, prepare, read_manifest
from statetrack.data.sources import TextSource
from statetrack.data.tokenizer import load_tokenizer

__all__ = [
    "DataError",
    "PackedBatch",
    "PackedBatches",
    "PackedRows",
    "PackedTokens",
    "PrepareConfig",
    "TextSource",
    "check",
    "load_tokenizer",
    "prepare",
    "read_manifest",
]
