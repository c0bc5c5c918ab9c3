"""The machine beneath: words for people, files, credentials, cores and memory, the heartbeat."""
