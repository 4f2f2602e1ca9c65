"""Images in: order, store, pipeline."""
