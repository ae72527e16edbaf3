"""One Docker engine: how it is reached, what it can do, and how its answers and its absence become our errors."""

from __future__ import annotations
