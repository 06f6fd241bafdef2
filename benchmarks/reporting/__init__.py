"""What stored runs say: read, compared with targets and accepted times, shown."""
