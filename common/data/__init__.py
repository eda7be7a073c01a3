"""From the files people have to rows of tokens.

files, encodings, records, turns, shapes and load read rows; split, labels, tokens and prepare make
token rows of them; cache keeps both, progress shows how far the work is.
"""
