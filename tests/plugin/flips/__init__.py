"""A package outside paw that adds one of each: a transfer method, a PEFT method, a kind of data, a
data set without Python, and a stage with its task."""
