"""The places where sessions run: one contract, one module a kind."""
