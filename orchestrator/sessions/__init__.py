"""Sessions: the state machine, what is stored of them, and the loop that makes the wish come true."""
