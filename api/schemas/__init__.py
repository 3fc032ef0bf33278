"""Request and response bodies of the control plane's HTTP API, by noun. The server and the client share them.

The server rejects unknown fields of requests. Clients ignore unknown fields of responses, so that an older
client keeps working with a newer server.
"""
