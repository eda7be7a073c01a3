"""What the pages share: a model to talk to, a page of one chat, a guarded server."""
