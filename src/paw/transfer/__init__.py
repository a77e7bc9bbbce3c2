"""Moving a LoRA adapter to another base by two linear maps a module."""
