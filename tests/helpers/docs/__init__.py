"""Pages of the documentation as the tests read them."""
