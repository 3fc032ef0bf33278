"""Request and response bodies of the control plane's HTTP API, by noun. The server and the client share them.

Requests refuse unknown fields. Clients ignore unknown fields of responses, so that an older client keeps
working with a newer server.
"""
