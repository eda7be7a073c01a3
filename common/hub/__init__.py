"""What common/download.py is made of: sources, links, files, checks, records, manifest."""
