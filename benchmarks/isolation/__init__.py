"""What it costs that templates and grammars have processes of their own."""
