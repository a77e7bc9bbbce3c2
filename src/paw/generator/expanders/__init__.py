"""One file for each way from a prompt's vector to a sequence of tokens: EXPANDER(config, layout) is
a module from (batch × hidden) to (batch × tokens × hidden)."""
