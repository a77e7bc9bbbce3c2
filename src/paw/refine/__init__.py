"""Label-free refinement: a transferred adapter trained for a few steps on what the source model
with its own adapter says about unlabelled prompts."""
