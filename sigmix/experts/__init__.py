"""Experts: one z per adapted matrix with its provenance; mixtures of experts; folders of experts."""
