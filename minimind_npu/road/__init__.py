"""The whole road with one dial: sizes, tokens, steps and rates from --depth, the report card."""
