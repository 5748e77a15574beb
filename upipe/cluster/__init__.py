"""The cluster layer. Every module, by what it is for; "pure" ones take events and `now`, and do nothing themselves.

The agent
    agent.py         one agent, from start to end          options.py      what the user said to `upipe-node`
    node_id.py       data directory, id, number of life    resources.py    what this machine has
    handlers.py      what the agent answers                errands.py      tasks that nobody waits for
    metrics.py       counters for Prometheus
Who is there
    neighbours.py    shell of membership                   membership.py   who is in the cluster (pure)
    roster.py        what is held of others (pure)         member.py       one of them: its states (pure)
    member_events.py events and commands                   probing.py      pings (pure)
    dialing.py       which addresses to dial (pure)        handshake.py    who may join (pure)
    timing.py        knobs                                 messages.py     what nodes say to each other
    discovery.py     multicast DNS                         seeds.py        --join and dns://
    interfaces.py    addresses of this machine             multicast.py    does multicast work here?
    address.py       HOST:PORT                             peers.py        asking other agents
Which worker runs where
    pipes.py         shell of the schedulers               scheduler.py    one pipe, in one agent (pure)
    known_pipes.py   which there are, what is told of them pipe_requests.py what users ask of them
    pipe_commands.py what schedulers command, done
    ballot.py        who coordinates (pure)                planning.py     what its record becomes (pure)
    record.py        what is replicated (pure)             dealings.py     its events, commands, messages
    ledger.py        records on disk                       outbox.py       what is on its way to other agents
    placement.py     which worker on which node (pure)     room.py         nodes that fill (pure)
    sizes.py         memory of queues (pure)               offers.py       what a node offers to a pipe (pure)
    lanes.py         queues between nodes (pure)           layout.py       what one node does (pure)
    mending.py       mirrors that broke (pure)             backlog.py      what waits for a full disk (pure)
    desk.py          where the submitting process is served
A pipe on a node
    parts.py         all parts of pipes here               part.py         one: keeper, ferry, reports
    part_means.py    what a part needs of its agent        promises.py     room here that a pipe was promised
    store.py         contents by SHA-256                   fitting.py      does this node fit what a pipe brings?
    keepers.py       the agent's end of a keeper           keeping.py      what the two say to each other
    halts.py         is a stopped one killed? (pure)
    keeper_line.py   their connection                      last_letters.py dead letters of ended pipes
    keeper.py        the process with queues and workers   keeper_runner.py   it follows plans
    keeper_queues.py its queues                            keeper_supervisor.py  decides for its workers (pure)
    copies.py        what an owner of queues does to one
    keeper_written.py how far sources came                 keeper_output.py   what workers print
Queues in two copies
    ferry.py         a pipe's mirrors on one node          passages.py     which queue feeds which (pure)
    stations.py      its queues
    gate.py          what a host may tell (pure)           tail_watch.py   when something was finished
    mirror.py        the two ends at work                  mirror_end.py   what they share
    mirror_state.py  the two ends (pure)                   records.py      what they say, in bytes
    lines.py         one link per peer                     link.py         a connection of many mirrors
    outlet.py        how a link writes                     inlet.py        how it reads
    pulse.py         silence and pauses (pure)
From outside
    reach.py         finding an agent                      submitting.py   contents, then the pipe
    shipping.py      what travels with a pipe              archive.py      directories as equal bytes
    runner.py        a pipe, as its declarer sees it       own_queues.py   the queues of that process
    attending.py     asking what there is (pure)           books.py        the report (pure)
    jobs.py          submitted scripts                     job_process.py  the process beside a script
Security and HTTP
    token.py         the one secret, what is derived       tls.py          CA, certificates, who is who
    tls_choice.py    which OpenSSL encrypts                tls_engine.py   contexts of another than Python's
    tls_records.py   their connections
    wire.py          bodies of requests and answers        routes.py       THE table of routes
    guard.py         may this request go in? (pure)        listen.py       sockets, how many strangers
    server.py        guard, table, handlers                client.py       asking
    opening.py       leaving HTTP                          openapi.py      the table as OpenAPI (pure)
    audit.py         who changed or was refused what
    doctor.py        what would keep a node from working (pure)            probes.py  what the doctor sees
"""
