"""Drop-in recurrent modules, and finding and replacing recurrent matrices in any model."""
