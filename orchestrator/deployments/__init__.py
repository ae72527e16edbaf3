"""Apps from Git: queued, cloned, built, run behind Traefik, swapped, rolled back and removed."""
