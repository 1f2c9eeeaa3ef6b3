"""hostd: one host, one simulated PCI segment."""
