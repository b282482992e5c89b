"""Out of the toolkit: an adapter becomes a plain model, a model becomes what other programs serve."""
