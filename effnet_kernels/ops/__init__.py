"""One folder per op: the reference that defines it, its schema, and a file per backend."""
