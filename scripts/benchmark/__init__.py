"""The benchmark: uPipe and its peers in turn on the same work, on this machine, in one run. See scripts/bench."""
