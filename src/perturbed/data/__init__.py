"""What a model is trained on: corpora, packing into windows, insertions."""
