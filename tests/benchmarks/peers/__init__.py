"""Servers that ours is compared to: each the way its own documentation would have it, and no slower than it can be."""
