"""The one ordered log of events: its contract, its implementations, and the outbox that feeds it."""
