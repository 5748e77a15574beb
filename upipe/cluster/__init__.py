"""The cluster layer. Security and HTTP:

    token.py      the one secret, and what is derived from it       tls.py        CA, certificates, who is who
    wire.py       bodies of requests and answers                    routes.py     THE table of routes
    guard.py      may this request go in? (pure)                    listen.py     sockets, how many strangers
    server.py     guard, table, handlers                            client.py     asking; opening.py: upgrading
    openapi.py    the table as OpenAPI (pure)                       audit.py      who changed or was refused what
    doctor.py     what would keep a node from working (pure)        probes.py     what the doctor sees
"""
