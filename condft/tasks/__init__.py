"""Tasks: data, batches and metrics of what a model learns. One package for each modality; `chat` is shared."""
