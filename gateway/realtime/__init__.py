"""The real-time path: event log -> feed -> history and hub -> connections."""
