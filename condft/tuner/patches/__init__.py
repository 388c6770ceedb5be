"""Changes to the behavior of other libraries, each with its reason and the version that needs it."""
