"""One file for each way of mixing tokens: DECODER(config, layout) is a module from and to
(batch × tokens × hidden)."""
