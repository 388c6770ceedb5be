"""What is learned: data and metrics, one package a modality."""
