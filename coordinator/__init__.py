"""The coordinator: runs migrations as journaled transactions over etcd."""
