"""What is computed: layers, the transformer, and the zoo of published shapes."""
