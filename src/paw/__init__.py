"""Parameter-Aware Weight transfer: train, transfer, evaluate and compare LoRA adapters across base
models. From Python: `from paw import api`."""

__version__ = "0.1.0"
