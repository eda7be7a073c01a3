"""Fast paths that change no number: losses without full logits, attention over packed rows."""
