"""Small Python drivers, one file a kind of device: the built-in workloads that are made of queues and interrupts."""
