"""The graph: a declared pipe as data (spec), what is wrong with it (validate, inspect), how it lies on a host (plan).

Data and pure functions: no processes, no queues, no clock.
"""
