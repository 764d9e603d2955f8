"""A weight-only model that drafts for itself, beside plain decoding and the paper's formula."""
