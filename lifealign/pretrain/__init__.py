"""A small base model from plain text and chats: options, corpus, model, loop, and the making of it all."""
