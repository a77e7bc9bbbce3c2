"""Memoised stages: each runs once per configuration and content of its inputs, and its artifact
appears whole or not at all."""

from paw.store.claim import Claims, Holder
from paw.store.fingerprint import content, digest, plain, sha256
from paw.store.meter import peak_gpu, reset_gpu, tell_gpu, usage
from paw.store.stage import Artifact, Context, Input, Kept, Stage, Watch
from paw.store.stop import Preempted
from paw.store.store import BEGUN, MANIFEST, TOKENIZER, Busy, Store, free_memory
from paw.store.write import replacing, write_text

__all__ = [
    "BEGUN",
    "MANIFEST",
    "TOKENIZER",
    "Artifact",
    "Busy",
    "Claims",
    "Context",
    "Holder",
    "Input",
    "Kept",
    "Preempted",
    "Stage",
    "Store",
    "Watch",
    "content",
    "digest",
    "free_memory",
    "peak_gpu",
    "plain",
    "replacing",
    "reset_gpu",
    "sha256",
    "tell_gpu",
    "usage",
    "write_text",
]
