"""The studies, over one shared configuration, store and statistics."""
