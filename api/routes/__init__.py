"""HTTP routes, one module a noun: each reads or calls a use case, and answers with a document."""
