"""The store: client, key layout, leases, watches, transactions as values. No etcd type leaves this package."""
