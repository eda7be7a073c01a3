"""What tools/download.py is made of: sources, links, files, checks, records, manifest."""
