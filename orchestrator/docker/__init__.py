"""The Docker Engine: the one client that everybody uses who runs or builds containers."""
