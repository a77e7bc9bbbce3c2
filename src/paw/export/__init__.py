"""Models to use elsewhere: an adapter merged into its base, a base compressed."""
