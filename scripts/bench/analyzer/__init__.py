"""The analyzer against PEFT's KappaTuneSelector, its error, and its cost."""
