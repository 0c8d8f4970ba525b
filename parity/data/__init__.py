"""From text to batches: corpora, documents, tokenizers, token files and the order of the windows."""
