"""A run as a page: what it learnt from, how it went, what came of it."""
