"""A page to look at images: python -m drift_jax.serve --from=SOURCE.

One thread draws (`worker`), what browsers send is checked (`requests`,
`limits`), an ASGI application answers (`app`), and `server` lets them in.
"""
