"""Memoised stages: each runs once per config and content of its inputs, and its artifact appears whole or not at all."""

from paw.store.fingerprint import broken, content, digest, plain, seal, sha256
from paw.store.store import BEGUN, MANIFEST, TOKENIZER, Artifact, Input, Stage, Store, Watch, free_memory
from paw.store.write import replacing, write_text

__all__ = [
    "BEGUN",
    "MANIFEST",
    "TOKENIZER",
    "Artifact",
    "Input",
    "Stage",
    "Store",
    "Watch",
    "broken",
    "content",
    "digest",
    "free_memory",
    "plain",
    "replacing",
    "seal",
    "sha256",
    "write_text",
]
