"""What outlives a process: tenants, keys, limits, usage and voices, in SQLite or PostgreSQL."""
