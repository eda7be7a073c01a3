"""From the files people have to rows of tokens: files, shapes, load, cache, split, labels,
prepare."""
