"""What a frozen network knows of the responses: features, exact PCA and regression, layer by layer."""
