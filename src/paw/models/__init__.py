"""Base models and adapters: finding, loading, reading and writing them."""
