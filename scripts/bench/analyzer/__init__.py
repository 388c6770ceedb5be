"""The analyzer beside PEFT's KappaTuneSelector."""
