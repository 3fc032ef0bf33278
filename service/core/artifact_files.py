"""File names inside artifacts, by artifact kind: those that several packages read or write.

A name that a single module uses is defined in that module.
"""

# --- data versions and slices ---
DOCUMENTS = "documents.ndjson.zst"
HASHES = "hashes.bin"
HOLDOUT = "holdout.ndjson.zst"
HOLDOUT_HASHES = "holdout.bin"

# --- tokenizers ---
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# --- base checkpoints, checkpoints and exports, as transformers names them ---
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"

# --- checkpoints only ---
METRICS = "metrics.jsonl"  # one JSON object per line, from the stage's first step on
