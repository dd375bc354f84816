"""The schema's history; `Database.migrate` runs it at every start."""
