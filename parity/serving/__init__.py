"""The server: one thread per backend decodes what clients request, and Starlette answers them."""
