"""Mathematics only: tensors in, tensors or a result dataclass out."""
