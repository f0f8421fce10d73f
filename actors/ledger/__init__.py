"""The ledger: what this edge's live requests are made of, for when the engine dies."""
