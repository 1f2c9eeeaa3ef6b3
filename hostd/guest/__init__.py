"""Drivers that are in a virtual machine: a VMM finds a function behind a UNIX socket, by the vfio-user protocol."""
