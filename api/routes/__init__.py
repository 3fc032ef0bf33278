"""HTTP routes, one module per noun.

Each route reads rows or calls an operation, and answers with a schema.
"""
