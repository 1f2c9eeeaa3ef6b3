"""The vfleet command. Knows only the client, and the local cluster for `up` and `demo`."""
