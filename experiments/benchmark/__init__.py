"""Time, memory and compile time of `attend` compared with its peers, in one process."""
