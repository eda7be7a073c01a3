"""Weight files, sentencepiece models and adapters, read and written by converters."""
