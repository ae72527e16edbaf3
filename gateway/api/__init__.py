"""The REST resources: one module each, its schemas and handlers together."""
