"""Faults by name: each is installed in a child of the zygote before its command runs."""
