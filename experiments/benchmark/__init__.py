"""How fast, how small and how quick to compile: `attend` beside its peers, in one process."""
