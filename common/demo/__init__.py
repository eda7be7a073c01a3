"""What the pages share: a model that answers, a page of one chat, a guarded server."""
