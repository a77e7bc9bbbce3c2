"""Parameter-Aware Weight transfer: train, transfer, evaluate and compare LoRA adapters across base models."""

__version__ = "0.1.0"
