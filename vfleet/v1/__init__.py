"""Stubs generated from protos/ by `make proto`. Never edited."""
