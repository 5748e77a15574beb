"""`upipe-node` that holds nobody dead for a minute: for agents that are killed and started again, and must not be
missed meanwhile, on a machine where a start may take longer than a death takes to be known."""

from upipe.cli.node import main
from upipe.cluster import neighbours
from upipe.cluster.timing import Timing

if __name__ == "__main__":
    neighbours.Timing = lambda: Timing(suspicion=60.0)
    main()
