"""Training an adapter with Lightning, the loss on the answer only."""
