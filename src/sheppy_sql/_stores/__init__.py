"""All SQL: one module a concern, functions over a transaction."""
