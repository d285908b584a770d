"""What every run writes and reads: files that are whole or not there, digests, tables, saved objects."""
