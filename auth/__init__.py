"""Identity as a library: accounts, tokens, workspaces, permissions. Knows PostgreSQL, and no HTTP."""
