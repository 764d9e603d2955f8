"""Train the two models that ship with Coppice.

This room owns the corpus, the tokenizer, the two shapes and the trainer behind
``src/coppice/models/bundled``. It refuses evaluation sets and share-alike text.
Invariant: no text that is held out for bits per byte is trained on, in any form.
"""
