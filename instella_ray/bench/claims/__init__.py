"""The paper's claims at small sizes: two arms a claim, trained with several seeds, and a verdict; see ``docs/claims.md``."""
