"""What every process and every client of vfleet shares. Imports neither daemon."""
