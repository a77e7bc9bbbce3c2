"""Training an adapter with Lightning's Fabric, the loss on the answer only."""
