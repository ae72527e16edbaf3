"""What runs where, and the way there: sessions, providers, the event log."""
