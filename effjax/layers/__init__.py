"""Small layers that every skeleton shares: projections, norms, embeddings, the scan over depth."""
