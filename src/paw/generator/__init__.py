"""LoRA parameters generated from prompts: checkpoints as tokens, prompts as vectors, a network
between them, and a report that knows the mean."""
