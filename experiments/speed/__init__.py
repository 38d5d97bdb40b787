"""How fast: measurements on real Llama 2 sizes, each a command of its own."""
