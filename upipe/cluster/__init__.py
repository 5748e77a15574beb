"""Many hosts: agents that find each other, place pipes, and mirror queues."""
