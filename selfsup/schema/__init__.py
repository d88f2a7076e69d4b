"""The schema of a configuration: frozen sections that refuse keys they do not know, with every default.

`selfsup.config` reads, merges, explains and writes them, and gives out their names.
"""
