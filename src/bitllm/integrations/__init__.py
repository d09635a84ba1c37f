"""Other libraries' models on our kernels; each module imports its library when it is called."""
