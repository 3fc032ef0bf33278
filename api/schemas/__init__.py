"""What crosses HTTP, by noun: the request and response bodies of the control plane, as its contract has them.

The server answers with these and the client reads them. Requests refuse unknown fields; of answers a client
ignores what it does not know, so that an older client goes on working.
"""
