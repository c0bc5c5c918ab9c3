"""Services of the machine: messages, files and locks, credentials, cores and memory, the heartbeat."""
