"""The typed YAML recipe: what a run is, read and checked before anything starts."""
