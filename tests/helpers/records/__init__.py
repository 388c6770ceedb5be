"""Reports and results files made by hand."""
